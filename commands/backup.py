"""Backup and restore of a SQLite database, also while a server writes to it; checks of backup files."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa
from click import ClickException

from auth import admin_token_file
from config import Settings
from database import error_text, stored_secrets
from migrations import upgrade
from models import NEWEST_KEY, Base, is_encrypted, now
from storage.files import copy_owner, make_folder, whole_file
from storage.sqlite import COMPANIONS, Progress, copy, files, no_server, read_only_engine


class BackupError(ClickException):
    """A backup or restore that was refused or failed; the message is one sentence for the operator."""


def back_up(settings: Settings, file: Path, *, overwrite: bool, progress: Progress) -> None:
    """Copy the database as it is now to `file`, which appears whole and checked, or not at all.

    The copy has everything committed before the call. Writers are not blocked.

    :raises BackupError: if `file` exists, or the copy cannot be made or is damaged.
    """
    check_name(settings, file, overwrite=overwrite)
    with written(file) as draft:
        copy(settings.database_file, draft, progress)
        check(draft, "The copy")


def restore(settings: Settings, file: Path, *, progress: Progress) -> Path | None:
    """Replace the instance's database with a copy of `file`.

    :returns: the new name of the replaced database, if there was one.
    :raises BackupError: if a server runs, or `file` cannot be restored; nothing has changed then.
    """
    target = settings.database_file
    check_name(settings, file, overwrite=True)
    make_folder(target.parent)
    try:
        # Locked to the end: a server that starts meanwhile waits for the restored database.
        with no_server(settings), usable_backup(settings, file) as source, written(target) as draft:
            copy(source, draft, progress)
            copy_owner(target if target.exists() else target.parent, draft)
            return _set_aside(target)
    except BlockingIOError:
        raise BackupError("A server runs on this instance: stop it first.") from None


@contextmanager
def usable_backup(settings: Settings, file: Path) -> Iterator[Path]:
    """Check a backup file, and yield it, or an upgraded copy if its schema is an older one.

    :raises BackupError: if the file cannot be restored into the instance.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = file
        if check(file, str(file)) != upgrade.revisions()[-1]:
            source = Path(folder) / "lanyard.db"
            copy(file, source)
            run_revisions(source, str(file))
            check(source, str(file))
        with read_only_engine(source).connect() as connection:
            for _, _, stored in stored_secrets(connection):
                if is_encrypted(stored) and not is_encrypted(stored, settings.secret_keys):
                    raise BackupError(
                        f"{file} has encrypted secrets: LANYARD_SECRET_KEY must hold the key of the"
                        " instance that it is a backup of."
                    )
        yield source


def run_revisions(file: Path, name: str) -> None:
    """Bring a SQLite file, which may be empty, to the newest schema.

    :param name: names the file in errors.
    :raises BackupError: if that fails.
    """
    try:
        upgrade.run_on_file(file)
    except Exception as error:
        reason = error_text(error)
        raise BackupError(f"{name} cannot be brought to the schema of this Lanyard: {reason}.") from error


def check(file: Path, name: str) -> str:
    """Check that the file is an undamaged database with Lanyard's tables, and return its schema's revision.

    Tables of an older revision are not checked: the upgrade does that.

    :param name: names the file in errors.
    :raises BackupError: if a check fails.
    :raises SettingError: if its schema is unknown.
    """
    try:
        with read_only_engine(file).connect() as connection:
            damage = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
            if damage != "ok":
                raise BackupError(f"{name} is damaged: {damage}.")
            schema = upgrade.read_revision(connection, name)
            for table in Base.metadata.sorted_tables if schema == upgrade.revisions()[-1] else ():
                connection.execute(sa.select(table).limit(0))  # fails if a column is missing
            if schema is None or connection.scalar(sa.select(NEWEST_KEY)) is None:
                raise BackupError(f"{name} is not a database of Lanyard: it has no signing key.")
            return schema
    except sa.exc.DatabaseError as error:
        raise BackupError(f"{name} cannot be read as a database of Lanyard: {error_text(error)}.") from None


def check_name(settings: Settings, file: Path, *, overwrite: bool) -> None:
    """Refuse a name that a backup must not have.

    :raises BackupError: if it is a file of the instance or a folder, or exists and must not be overwritten.
    """
    own = [admin_token_file(settings), *(files(settings) if settings.uses_sqlite else [])]
    if file.resolve() in [path.resolve() for path in own]:
        raise BackupError(f"{file} is a file of the instance itself.")
    if file.is_dir():
        raise BackupError(f"{file} is a folder: name a file.")
    if file.exists() and not overwrite:
        raise BackupError(f"There is a {file} already: --force replaces it.")


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """Yield a draft for `file`, as `whole_file` does.

    :raises BackupError: if it cannot be made or written.
    """
    try:
        with whole_file(file) as draft:
            yield draft
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", error)
        raise BackupError(f"{file} cannot be written: {reason}.") from None


def _set_aside(target: Path) -> Path | None:
    """Give the database, if there is one, a second name; it keeps its own until it is replaced."""
    aside = None
    if target.exists():
        _make_single(target)
        aside = target.with_name(f"{target.name}.replaced-{now():%Y%m%dT%H%M%SZ}")
        if aside.exists():
            raise BackupError(f"There is a {aside} already: move it away.")
        os.link(target, aside)
    # Left by a damaged database; SQLite would write them into the restored one.
    for ending in COMPANIONS:
        companion = Path(f"{target}{ending}")
        if aside and companion.exists():
            companion.replace(f"{aside}{ending}")
        companion.unlink(missing_ok=True)
    return aside


def _make_single(file: Path) -> None:
    """Write what is in the -wal into the database file, which fails while another process has it open."""
    try:
        with closing(sqlite3.connect(file, timeout=1)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise BackupError("Another process uses the database: end it first.") from None
    except sqlite3.DatabaseError:
        pass  # damaged: the restore replaces it
