"""Backup and restore of a SQLite database, also while a server writes to it; checks of backup files."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa
from click import ClickException

from auth import admin_token_file
from config import VERSION, Settings
from database import ENCRYPTED, error_text
from migrations import upgrade
from models import Base, is_encrypted, now
from storage.files import copy_owner, sync_folder
from storage.sqlite import COMPANIONS, files, no_server, open_read_only

PAGES = 1024  # copied at a time, in some milliseconds

Progress = Callable[[int, int], None]  # called with the number of steps done, and of all steps


class BackupError(ClickException):
    """A backup or restore that was refused or failed; the message is one sentence for the operator."""


def back_up(settings: Settings, file: Path, *, overwrite: bool, progress: Progress) -> None:
    """Copy the database as it is now to `file`, which appears whole and checked, or not at all.

    The copy has everything committed before the call. Writers are not blocked.

    :raises BackupError: if `file` exists, or the copy cannot be made or is damaged.
    """
    check_name(settings, file, overwrite=overwrite)
    with whole_file(file) as draft:
        _copy(settings.database_file, draft, progress)
        check(draft, "The copy")


def restore(settings: Settings, file: Path, *, progress: Progress) -> Path | None:
    """Replace the instance's database with a copy of `file`.

    :returns: the new name of the replaced database, if there was one.
    :raises BackupError: if a server runs, or `file` cannot be restored; nothing has changed then.
    """
    target = settings.database_file
    check_name(settings, file, overwrite=True)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Locked to the end: a server that starts meanwhile waits for the restored database.
        with no_server(settings), usable_backup(settings, file) as source, whole_file(target) as draft:
            _copy(source, draft, progress)
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
            _copy(file, source, lambda done, total: None)
            run_revisions(source, str(file))
            check(source, str(file))
        _check_secrets(settings, source, str(file))
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


def _check_secrets(settings: Settings, file: Path, name: str) -> None:
    """Check that LANYARD_SECRET_KEY decrypts every encrypted secret in the file."""
    with closing(open_read_only(file)) as connection:
        for column in ENCRYPTED:
            for (stored,) in connection.execute(f"SELECT {column.name} FROM {column.table.name}"):  # noqa: S608
                if stored and is_encrypted(stored) and not is_encrypted(stored, settings.secret_keys):
                    raise BackupError(
                        f"{name} has encrypted secrets: LANYARD_SECRET_KEY must hold the key of the"
                        " instance that it is a backup of."
                    )


def check(file: Path, name: str) -> str:
    """Check that the file is an undamaged database with Lanyard's tables, and return its schema's revision.

    Tables of an older revision are not checked: the upgrade does that.

    :param name: names the file in errors.
    :raises BackupError: if a check fails.
    """
    newest = upgrade.revisions()[-1]
    try:
        with closing(open_read_only(file)) as connection:
            damage = _first(connection, "PRAGMA integrity_check(1)")
            if damage != "ok":
                raise BackupError(f"{name} is damaged: {damage}.")
            schema = _first(connection, "SELECT version_num FROM alembic_version")
            if schema and schema not in upgrade.revisions():
                raise BackupError(
                    f"{name} has schema {schema}, which is newer than schema {newest} of this Lanyard"
                    f" {VERSION}: use the newer Lanyard."
                )
            for table in Base.metadata.sorted_tables if schema == newest else ():
                connection.execute(f"{sa.select(table)} LIMIT 0")  # fails if a column is missing
            if not schema or not _first(connection, "SELECT kid FROM signing_keys"):
                missing = "signing key" if schema else "schema version"
                raise BackupError(f"{name} is not a database of Lanyard: it has no {missing}.")
            return schema
    except sqlite3.Error as error:
        lacks_table = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
        problem = "is not a database of Lanyard" if lacks_table else "cannot be read as a database"
        raise BackupError(f"{name} {problem}: {error}.") from None


def _first(connection: sqlite3.Connection, statement: str) -> str | None:
    row = connection.execute(statement).fetchone()
    return str(row[0]) if row else None


def check_name(settings: Settings, file: Path, *, overwrite: bool) -> None:
    """Refuse a name that a backup must not have.

    :raises BackupError: if it is a file of the instance or a folder, or exists and must not be overwritten.
    """
    if settings.uses_sqlite and any(file.resolve() == path.resolve() for path in files(settings)):
        raise BackupError(f"{file} is the instance's own database.")
    if file.resolve() == admin_token_file(settings).resolve():
        raise BackupError(f"{file} holds the instance's admin token.")
    if file.is_dir():
        raise BackupError(f"{file} is a folder: name a file.")
    if file.exists() and not overwrite:
        raise BackupError(f"There is a {file} already: --force replaces it.")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield an empty file of mode 0600 that durably replaces `file` unless the block raises.

    :raises BackupError: if it cannot be made or written.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            yield draft
            with open(draft, "rb") as written:
                os.fsync(written.fileno())
            os.replace(draft, file)
            sync_folder(file.parent)
        finally:
            for ending in ("", *COMPANIONS):
                Path(f"{draft}{ending}").unlink(missing_ok=True)
    except OSError as error:
        raise BackupError(f"{file} cannot be written: {error.strerror}.") from None


def _copy(source: Path, draft: Path, progress: Progress) -> None:
    try:
        with closing(open_read_only(source)) as origin, closing(sqlite3.connect(draft)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # the finished file is fsynced once
            # One snapshot for all steps: otherwise every write of a server would restart the copy.
            origin.isolation_level = None
            origin.execute("BEGIN")
            origin.execute("SELECT count(*) FROM sqlite_master").fetchone()
            origin.backup(
                copy, pages=PAGES, progress=lambda status, left, total: progress(total - left, total)
            )
            # A single file, without a -wal.
            copy.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise BackupError(f"{source} cannot be copied: {error}.") from None


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
