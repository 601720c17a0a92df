"""Backup and restore: a copy of the database taken while it is written to, and put back."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from config import Settings
from models import Base, now
from storage.files import give_to_owner_of, sync_folder
from storage.sqlite import nobody_serving, open_read_only

PAGES = 1024  # copied at a time: some milliseconds
_COMPANIONS = ("-wal", "-shm", "-journal")

Progress = Callable[[int, int], None]  # told of pages copied so far, and of all there are


class BackupError(Exception):
    """Why there is no backup, or no restoring; its text is one sentence for the operator."""


def back_up(settings: Settings, file: Path, *, overwrite: bool, progress: Progress) -> None:
    """Copy the database as it is now into `file`, which appears whole and checked, or not at all.

    Whatever was committed before the call is in it; writers go on meanwhile.

    :raises BackupError: when there is a file already, or the copy cannot be made or is no good.
    """
    _refuse_postgresql(settings)
    refuse_own_files(settings, file)
    refuse_overwriting(file, overwrite)
    with draft_beside(file) as draft:
        _copy(settings.database_file, draft, progress)
        check(draft, "The copy")
        put_in_place(draft, file)


def restore(settings: Settings, file: Path, *, progress: Progress) -> Path | None:
    """Put the database in `file` in the place of the instance's own.

    :returns: where the replaced database is kept, if there was one.
    :raises BackupError: when a server runs, or `file` is no good database of Lanyard's: nothing has
        changed then.
    """
    _refuse_postgresql(settings)
    target = settings.database_file
    refuse_own_files(settings, file)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Held to the end: a server that starts meanwhile waits, and finds the restored database.
        with nobody_serving(settings), draft_beside(target) as draft:
            _copy(file, draft, progress)
            check(draft, str(file))
            give_to_owner_of(target if target.exists() else target.parent, draft)
            kept = _set_aside(target)
            put_in_place(draft, target)
            return kept
    except BlockingIOError:
        raise BackupError("A server runs on this instance: stop it first.") from None


def check(file: Path, what: str) -> None:
    """Check that the file is a sound database with Lanyard's tables.

    :raises BackupError: when it is not; `what` names it there.
    """
    try:
        with closing(open_read_only(file)) as connection:
            found = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
            tables = {
                row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            columns = {table: _columns(connection, table) for table in tables & set(Base.metadata.tables)}
            keys = "signing_keys" in tables and connection.execute("SELECT 1 FROM signing_keys").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"{what} cannot be read as a database: {error}.") from None
    if found != ["ok"]:
        raise BackupError(f"{what} is damaged: {found[0]}.")
    lacking = _lacking(columns)
    if lacking or not keys:
        raise BackupError(f"{what} is no database of Lanyard's: it lacks {lacking or 'a signing key'}.")


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    # The name is one of our own tables': it cannot be a parameter.
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _lacking(columns: dict[str, set[str]]) -> str | None:
    """The first table or column that is not there, by name."""
    for name, table in Base.metadata.tables.items():
        for column in table.columns:
            if column.name not in columns.get(name, ()):
                return f"{name}.{column.name}" if name in columns else f"the table {name}"
    return None


def _refuse_postgresql(settings: Settings) -> None:
    if not settings.uses_sqlite:
        raise BackupError("The database is PostgreSQL's: pg_dump and pg_restore are for that.")


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
