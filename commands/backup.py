"""Backup and restore of a SQLite database, also while a server writes to it; checks of backup files."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from click import ClickException

from config import VERSION, Settings
from database import ENCRYPTED, error_text
from migrations import upgrade
from models import Base, is_encrypted, now
from storage.files import give_to_owner_of, sync_folder
from storage.sqlite import nobody_serving, open_read_only

PAGES = 1024  # copied at a time: some milliseconds
_COMPANIONS = ("-wal", "-shm", "-journal")

Progress = Callable[[int, int], None]  # called with the pages copied so far, and all pages


class BackupError(ClickException):
    """A backup or restore that was refused or failed; its text is one sentence for the operator."""


def back_up(settings: Settings, file: Path, *, overwrite: bool, progress: Progress) -> None:
    """Copy the database as it is now to `file`, which appears whole and checked, or not at all.

    The copy has everything committed before the call. Writers are not blocked.

    :raises BackupError: when `file` exists, or the copy cannot be made or is damaged.
    """
    refuse_own_files(settings, file)
    refuse_overwriting(file, overwrite)
    with draft_beside(file) as draft:
        _copy(settings.database_file, draft, progress)
        check(draft, "The copy")
        put_in_place(draft, file)


def restore(settings: Settings, file: Path, *, progress: Progress) -> Path | None:
    """Replace the instance's database with a copy of `file`.

    :returns: where the replaced database is kept, if there was one.
    :raises BackupError: when a server runs, or `file` cannot be restored: nothing has changed then.
    """
    target = settings.database_file
    refuse_own_files(settings, file)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Held to the end: a server that starts meanwhile waits for the restored database.
        with nobody_serving(settings), draft_beside(target) as draft:
            _copy(file, draft, progress)
            _bring_up_to_date(draft, str(file))
            check_secrets(settings, draft, str(file))
            give_to_owner_of(target if target.exists() else target.parent, draft)
            kept = _set_aside(target)
            put_in_place(draft, target)
            return kept
    except BlockingIOError:
        raise BackupError("A server runs on this instance: stop it first.") from None


@contextmanager
def up_to_date(file: Path) -> Iterator[Path]:
    """Check a backup file, and yield it, or an upgraded copy when its schema is an older one.

    :raises BackupError: when the file cannot be restored.
    """
    if check(file, str(file)) == upgrade.revisions()[-1]:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lanyard.db"
        _copy(file, copy, lambda done, total: None)
        _bring_up_to_date(copy, str(file))
        yield copy


def _bring_up_to_date(file: Path, what: str) -> None:
    if check(file, what) != upgrade.revisions()[-1]:
        run_revisions(file, what)
        check(file, what)


def run_revisions(file: Path, what: str) -> None:
    """Bring a SQLite file, which may be empty, to the newest schema.

    :raises BackupError: when that fails; `what` names the file in it.
    """
    try:
        upgrade.run_on_file(file)
    except Exception as error:
        reason = error_text(error)
        raise BackupError(f"{what} cannot be brought to the schema of this Lanyard: {reason}.") from error


def check_secrets(settings: Settings, file: Path, what: str) -> None:
    """Check that LANYARD_SECRET_KEY decrypts every secret in the file that is encrypted.

    :raises BackupError: when it does not; `what` names the file in it.
    """
    with closing(open_read_only(file)) as connection:
        for column in ENCRYPTED:
            for (stored,) in connection.execute(f"SELECT {column.name} FROM {column.table.name}"):  # noqa: S608
                if stored and is_encrypted(stored) and not is_encrypted(stored, settings.secret_keys):
                    raise BackupError(
                        f"{what} has encrypted secrets: LANYARD_SECRET_KEY must hold the key of the"
                        " instance that it was made of."
                    )


def check(file: Path, what: str) -> str:
    """Check that the file is a sound database with Lanyard's tables, and return its schema's revision.

    The tables of an older revision are left to the upgrade to look at.

    :raises BackupError: when it is not; `what` names the file in it.
    """
    try:
        with closing(open_read_only(file)) as connection:
            found = _first(connection, "PRAGMA integrity_check(1)")
            columns = _columns(connection)
            schema = "alembic_version" in columns and _first(
                connection, "SELECT version_num FROM alembic_version"
            )
            key = "signing_keys" in columns and _first(connection, "SELECT kid FROM signing_keys")
    except sqlite3.Error as error:
        raise BackupError(f"{what} cannot be read as a database: {error}.") from None
    if found != "ok":
        raise BackupError(f"{what} is damaged: {found}.")
    known = upgrade.revisions()
    if schema and schema not in known:
        raise BackupError(
            f"{what} has schema {schema}, which is newer than schema {known[-1]} of this Lanyard {VERSION}:"
            " use the newer Lanyard."
        )
    lacking = _lacking(columns) if schema == known[-1] else None
    if lacking or not schema or not key:
        lacking = lacking or ("a signing key" if schema else "a schema version")
        raise BackupError(f"{what} is no database of Lanyard's: it lacks {lacking}.")
    return schema


def _columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the names of every table's columns."""
    found: dict[str, set[str]] = defaultdict(set)
    for table, column in connection.execute(
        "SELECT t.name, c.name FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c"
        " WHERE t.type = 'table'"
    ):
        found[table].add(column)
    return found


def _first(connection: sqlite3.Connection, statement: str) -> str | None:
    row = connection.execute(statement).fetchone()
    return str(row[0]) if row else None


def _lacking(columns: dict[str, set[str]]) -> str | None:
    """Return the name of the first table or column that is missing."""
    for name, table in Base.metadata.tables.items():
        for column in table.columns:
            if column.name not in columns.get(name, ()):
                return f"{name}.{column.name}" if name in columns else f"the table {name}"
    return None


def refuse_own_files(settings: Settings, file: Path) -> None:
    """Refuse a name that a copy must not have.

    :raises BackupError: when it is the database's own, or no file's.
    """
    live = settings.database_file
    own = [live, *(Path(f"{live}{ending}") for ending in _COMPANIONS)]
    if settings.uses_sqlite and any(file.resolve() == path.resolve() for path in own):
        raise BackupError(f"{file} is the instance's own database.")
    if file.is_dir():
        raise BackupError(f"{file} is a folder: name a file.")


def refuse_overwriting(file: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, unless it may be.

    :raises BackupError: when it is.
    """
    if file.exists() and not overwrite:
        raise BackupError(f"There is a {file} already: --force replaces it.")


@contextmanager
def draft_beside(file: Path) -> Iterator[Path]:
    """An empty file of mode 0600 to write to, gone at the end whatever happens.

    :raises BackupError: when it cannot be made or written.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise BackupError(f"{file.parent} cannot be written to: {error.strerror}.") from None
    try:
        yield draft
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        raise BackupError(f"{file} cannot be written: {error.strerror}.") from None
    finally:
        for ending in ("", *_COMPANIONS):
            with suppress(FileNotFoundError):
                os.unlink(f"{draft}{ending}")


def _copy(source: Path, draft: Path, progress: Progress) -> None:
    try:
        with closing(open_read_only(source)) as origin, closing(sqlite3.connect(draft)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # it is fsynced as a whole, when it is whole
            # One snapshot for all steps: else every write of a server would start the copy anew.
            origin.isolation_level = None
            origin.execute("BEGIN")
            origin.execute("SELECT count(*) FROM sqlite_master").fetchone()
            origin.backup(
                copy, pages=PAGES, progress=lambda status, left, total: progress(total - left, total)
            )
            # A single file, that needs no -wal beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise BackupError(f"{source} cannot be copied: {error}.") from None


def put_in_place(draft: Path, file: Path) -> None:
    """Give the draft, which is whole, the name of the file, for good."""
    with open(draft, "rb") as written:
        os.fsync(written.fileno())
    os.replace(draft, file)
    sync_folder(file.parent)


def _set_aside(target: Path) -> Path | None:
    """Give the database, and what belongs to it, a second name; its own is there until it is replaced."""
    if not target.exists():
        _drop_companions(target)
        return None
    _make_single(target)
    aside = target.with_name(f"{target.name}.replaced-{now():%Y%m%dT%H%M%SZ}")
    if aside.exists():
        raise BackupError(f"There is a {aside} already: move it away.")
    os.link(target, aside)
    # Of a damaged one there may be some left. Beside the new one they would be written into it.
    for ending in _COMPANIONS:
        with suppress(FileNotFoundError):
            os.replace(f"{target}{ending}", f"{aside}{ending}")
    return aside


def _drop_companions(target: Path) -> None:
    for ending in _COMPANIONS:
        with suppress(FileNotFoundError):
            os.unlink(f"{target}{ending}")


def _make_single(file: Path) -> None:
    """Write what is in the -wal into the database file, which only works while nobody else has it open."""
    try:
        with closing(sqlite3.connect(file, timeout=1)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise BackupError("Another process uses the database: end it first.") from None
    except sqlite3.DatabaseError:
        pass  # damaged: that is what a backup is for
