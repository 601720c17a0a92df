"""The SQLite backend: the file, its pragmas, its one write lock, and the lock files beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import sqlalchemy as sa
from flask import Flask
from gevent import monkey

from storage.files import copy_owner, keep_private, make_folder, whole_file

if TYPE_CHECKING:
    from config import Settings

Progress = Callable[[int, int], None]  # called with the number of steps done, and of all steps

COMPANIONS = ("-wal", "-shm", "-journal")  # endings of SQLite's own files beside a database
# Locked by another process, read-only, failing, full, or not to be opened.
_TRANSIENT = re.compile("SQLITE_(BUSY|LOCKED|READONLY|IOERR|FULL|CANTOPEN)")
BUSY_TIMEOUT = 5.0  # seconds to wait for the write lock
# Seconds for a transaction that may fail and be repeated; 0 would always fail under load.
SHORT_TIMEOUT = 0.25

CHECKPOINT = 4000  # pages (16 MB) that the WAL grows to before a checkpoint, which costs two fsyncs
NATIVE_SLEEP = 0.005  # seconds a request that waits for the lock keeps the process to itself
SHORTEST_SLEEP = 0.0001  # seconds
LONGEST_SLEEP = 0.001  # seconds; unbounded, long waiters would poll less often than newcomers, and starve
PAGE_SIZE = 4096  # bytes, SQLite's default
PAGES = 1024  # copied at a time, in some milliseconds
RESERVE = 8 * 1024**2  # bytes of the disk that are kept for transactions that end access
ROOM = 256 * 1024  # bytes, several times what a token needs

_native_sleep = monkey.get_original("time", "sleep")

_turn = threading.Lock()


def url(settings: Settings) -> sa.URL:
    """Return the database's URL for SQLAlchemy."""
    # mode=rw: a missing file is an error to report, never replaced by a new and empty one.
    file = f"file:{quote(str(settings.database_file))}"
    return sa.URL.create("sqlite", database=file, query={"mode": "rw", "uri": "true"})


def engine_options(settings: Settings, serving: bool) -> dict[str, Any]:
    return {"connect_args": {"timeout": BUSY_TIMEOUT}, "paramstyle": "named"}


def listen(engine: sa.Engine, serving: bool) -> None:
    """Set the pragmas of every new connection."""

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(driver: sqlite3.Connection, record: Any) -> None:
        driver.execute("PRAGMA foreign_keys = ON")
        driver.execute("PRAGMA synchronous = FULL")
        driver.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")
        record.info["synchronous"] = "FULL"


def open_database(settings: Settings) -> None:
    """Check the file, or create it, with mode 0600 and in WAL mode.

    :raises sqlite3.DatabaseError: when it is damaged or no database.
    """
    path = settings.database_file
    is_new = not path.exists()
    # The -wal and -shm files take the database file's mode. Unlike SQLite's, an error here names the file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if not is_new:
        # Before the first write, which might damage it further.
        with closing(open_read_only(path)) as connection:
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("it is damaged, and was left as it is; put back a backup")
    keep_private(path)
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # stored in the file


def open_read_only(file: Path) -> sqlite3.Connection:
    """Open a connection that cannot write.

    :raises sqlite3.OperationalError: when there is no such file.
    """
    return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)


def read_only_engine(file: Path) -> sa.Engine:
    """Return an engine that opens a connection with `open_read_only` for each use."""
    creator = partial(open_read_only, file)
    return sa.create_engine("sqlite://", creator=creator, poolclass=sa.NullPool, hide_parameters=True)


def copy(source: Path, target: Path, progress: Progress = lambda done, total: None) -> None:
    """Copy what is committed in a database into an empty file. Writers are not blocked."""
    with closing(open_read_only(source)) as origin, closing(sqlite3.connect(target)) as copied:
        copied.execute("PRAGMA synchronous = OFF")  # the caller syncs the finished file
        # One snapshot for all steps: otherwise every write of a server would restart the copy.
        origin.isolation_level = None
        origin.execute("BEGIN")
        origin.execute("SELECT count(*) FROM sqlite_master").fetchone()
        origin.backup(copied, pages=PAGES, progress=lambda status, left, total: progress(total - left, total))
        copied.execute("PRAGMA journal_mode = DELETE")  # a single file, without a -wal


def begin_writing(connection: sa.Connection, *, durable: bool, patient: bool, exclusive: bool) -> None:
    """BEGIN IMMEDIATE; see `database.writing`. Every write transaction is exclusive on SQLite."""
    level = "FULL" if durable else "NORMAL"
    # SQLite lets `synchronous` change only outside a transaction.
    if connection.info["synchronous"] != level:
        connection.exec_driver_sql(f"PRAGMA synchronous = {level}")
        connection.info["synchronous"] = level
    _take_write_lock(connection, BUSY_TIMEOUT if patient else SHORT_TIMEOUT)


def _take_write_lock(connection: sa.Connection, seconds: float) -> None:
    """Poll for the lock, one request of the process at a time: early ones would starve, as it has no queue.

    SQLite's own busy timeout would block every other request of the process, and sleeps for a millisecond
    and more, in which another process could have written five times.

    :raises sa.exc.OperationalError: when it is not free within so many seconds.
    """
    driver: Any = connection.connection.dbapi_connection
    started = time.monotonic()
    has_turn = _turn.acquire(timeout=seconds)
    yielded = time.monotonic()
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while (moment := time.monotonic()) - started < seconds:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
            # Another process mostly has the lock for less than a millisecond: yielding at once would miss it.
            if moment - yielded < NATIVE_SLEEP:
                _native_sleep(min(max(SHORTEST_SLEEP, (moment - started) / 4), LONGEST_SLEEP))
            else:
                time.sleep(SHORTEST_SLEEP)  # under gevent the other requests of this process go on
                yielded = time.monotonic()
        # The last attempt's error, as SQLAlchemy raises it.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        if has_turn:
            _turn.release()
        driver.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")


def is_transient(error: Any) -> bool:
    """Whether the driver's error ends by itself or when the operator acts."""
    # Extended codes, as SQLITE_IOERR_READ, begin with the primary one's name.
    return isinstance(error, sqlite3.OperationalError) and bool(_TRANSIENT.match(error.sqlite_errorname))


def reserve_size(settings: Settings) -> int | None:
    """Return the size of the reserve, less than RESERVE after a part was freed; None if there is none."""
    file = Path(f"{settings.database_file}.reserve")
    return file.stat().st_size if file.exists() else None


def make_reserve(settings: Settings) -> None:
    """Allocate the reserve, a file whose blocks are freed on a full disk.

    :raises OSError: when less than twice its size is free: others need room too.
    """
    check_room(settings, 2 * RESERVE)
    with whole_file(Path(f"{settings.database_file}.reserve")) as draft, draft.open("r+b") as file:
        copy_owner(settings.database_file, draft)
        os.posix_fallocate(file.fileno(), 0, RESERVE)


def claim_room(settings: Settings, share: float | None) -> None:
    """On a full disk free a share of the reserve; see `database.writing`. The caller has the write lock.

    :raises sa.exc.OperationalError: SQLITE_FULL, without a share while a part of the reserve is freed.
    """
    if share == 0:
        return
    size = reserve_size(settings)
    kept = RESERVE if share is None else int(RESERVE * (1 - share))
    if size is not None and size < kept:
        error = sqlite3.OperationalError("the disk was full, and what is left is kept for ending access")
        error.sqlite_errorname = "SQLITE_FULL"
        raise sa.exc.OperationalError("BEGIN", None, error)
    if share is None:
        return
    try:
        check_room(settings, RESERVE if share == 1 else ROOM)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return
        if size is not None and size > kept:
            os.truncate(f"{settings.database_file}.reserve", kept)
        # The next transaction overwrites the WAL instead of adding to it, if the database has room to grow.
        with suppress(sqlite3.Error, OSError), closing(sqlite3.connect(settings.database_file)) as other:
            (pages,) = other.execute("PRAGMA page_count").fetchone()
            check_room(settings, pages * PAGE_SIZE - settings.database_file.stat().st_size + ROOM)
            other.execute("PRAGMA wal_checkpoint(PASSIVE)")


def check_room(settings: Settings, size: int = ROOM) -> None:
    """Check that so many bytes are free, by adding them to a lock file for a moment: quotas count too.

    :raises OSError: when they are not.
    """
    with open(f"{settings.database_file}.lock", "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        finally:
            file.truncate(0)


def sizes(settings: Settings, connection: sa.Connection) -> dict[str, int]:
    """Return the sizes of the database's files in bytes."""
    files = {"main": str(settings.database_file), "wal": f"{settings.database_file}-wal"}
    return {name: os.path.getsize(path) if os.path.exists(path) else 0 for name, path in files.items()}


@contextmanager
def startup_lock(settings: Settings) -> Iterator[None]:
    """Hold a lock under which one process at a time opens the database and changes its schema."""
    make_folder(settings.database_file.parent)
    with open(_lock(settings, "lock", fcntl.LOCK_EX)):
        yield


def mark_serving(app: Flask, settings: Settings) -> Callable[[], object]:
    """Mark the database as used by a server, and return what ends the mark.

    Wait while `no_server` holds the lock. The workers, forked from this process, share the mark.
    """
    ended = weakref.finalize(app, os.close, _lock(settings, "serving", fcntl.LOCK_SH))
    ended.atexit = False  # the mark stays until the process has ended
    return ended


@contextmanager
def no_server(settings: Settings) -> Iterator[None]:
    """Keep servers from starting on the database.

    :raises BlockingIOError: when one runs.
    """
    with open(_lock(settings, "serving", fcntl.LOCK_EX | fcntl.LOCK_NB)):
        yield


def is_serving(settings: Settings) -> bool:
    """Whether a server uses the database; creates no file."""
    if not os.path.exists(f"{settings.database_file}.serving"):
        return False
    for _ in range(2):
        with suppress(BlockingIOError), no_server(settings):
            return False
        time.sleep(0.01)  # another process may hold the lock for the same check
    return True


class Lease:
    """The right to deliver webhooks: a file lock, which the kernel frees when the process ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file: int | None = None

    def take(self) -> bool:
        """Whether this process has the lease, after trying to take it.

        :raises OSError: when the file cannot be opened.
        """
        if self._file is None:
            with suppress(BlockingIOError):
                self._file = _lock(self._settings, "deliverer", fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._file is not None

    def close(self) -> None:
        """Give the lease up."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def files(settings: Settings) -> list[Path]:
    """Return the database file, SQLite's files beside it, and the lock files, whether they exist or not."""
    endings = ("", *COMPANIONS, ".lock", ".serving", ".deliverer", ".reserve")
    return [Path(f"{settings.database_file}{ending}") for ending in endings]


def _lock(settings: Settings, name: str, operation: int) -> int:
    """Lock a file beside the database, and return its descriptor, whose closing frees the lock."""
    path = Path(f"{settings.database_file}.{name}")
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        copy_owner(path.parent, path)
        fcntl.flock(lock, operation)
    except BaseException:
        os.close(lock)
        raise
    return lock
