"""SQLite's ways: one file, its pragmas, its one write lock, and the lock files beside it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import sqlalchemy as sa
from flask import Flask
from gevent import monkey

from storage.files import give_to_owner_of

if TYPE_CHECKING:
    from config import Settings

# Locked by another process, read-only, failing, full, or not to be opened.
_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
BUSY_TIMEOUT = 5.0  # seconds a transaction waits for another's write lock
SHORT_TIMEOUT = 0.25  # the same for one that can as well come later; under load none comes at once

CHECKPOINT = 4000  # pages the WAL grows to, 16 MB, before they are copied into the database with two fsyncs
PROMPT = 0.005  # seconds a request that waits for the lock keeps the process to itself
SHORTEST_SLEEP = 0.0001  # seconds
LONGEST_SLEEP = 0.001  # seconds; unbounded, long waiters would poll less often than newcomers, and starve

_native_sleep = monkey.get_original("time", "sleep")

# Set when a transaction has timed out waiting for the lock, until one gets it: meanwhile transactions of this
# process wait briefly, or all of its requests would queue up behind the lock.
_is_stuck = threading.Event()
_turn = threading.Lock()


def url(settings: Settings) -> sa.URL:
    """The database's address, as SQLAlchemy takes it."""
    # mode=rw: a file that vanished is an error to report, not a reason for a new and empty one.
    file = f"file:{quote(str(settings.database_file))}"
    return sa.URL.create("sqlite", database=file, query={"mode": "rw", "uri": "true"})


def engine_options(settings: Settings, serving: bool) -> dict[str, Any]:
    """The same for the engine's options."""
    return {"connect_args": {"timeout": BUSY_TIMEOUT}, "paramstyle": "named"}


def listen(engine: sa.Engine, serving: bool) -> None:
    """Have the engine open connections, and begin transactions, our way."""
    sa.event.listen(engine, "connect", _on_connect)


def open_database(settings: Settings) -> None:
    """See that there is a sound file, mode 0600, in WAL mode.

    :raises sqlite3.DatabaseError: when it is no database, or not whole.
    """
    _refuse_damaged(settings.database_file)
    _use_wal(settings.database_file)


def begin_writing(connection: sa.Connection, *, durable: bool, patient: bool, exclusive: bool) -> None:
    """BEGIN IMMEDIATE; see `database.writing`. Every write transaction is exclusive on SQLite."""
    level = "FULL" if durable else "NORMAL"
    # SQLite lets `synchronous` change only outside a transaction.
    if connection.info["synchronous"] != level:
        connection.exec_driver_sql(f"PRAGMA synchronous = {level}")
        connection.info["synchronous"] = level
    patient = patient and not _is_stuck.is_set()
    try:
        _take_write_lock(connection, BUSY_TIMEOUT if patient else SHORT_TIMEOUT)
    except sa.exc.OperationalError:
        if patient:
            _is_stuck.set()
        raise
    _is_stuck.clear()


def _take_write_lock(connection: sa.Connection, seconds: float) -> None:
    """BEGIN IMMEDIATE as soon as the lock is free.

    SQLite's own busy timeout would block every other request of this process, and sleeps for a millisecond
    and more, in which another process could have written five times. Its lock has no queue: within a
    process the requests take turns, or early ones would starve.

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
            if moment - yielded < PROMPT:
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
    """Whether the driver's error is of the kind that ends by itself or by the operator's hand."""
    # The low byte of the extended codes.
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _TRANSIENT


def sizes(settings: Settings, connection: sa.Connection) -> dict[str, int]:
    """Return the sizes of the database's files in bytes."""
    files = {"main": str(settings.database_file), "wal": f"{settings.database_file}-wal"}
    return {name: os.path.getsize(path) if os.path.exists(path) else 0 for name, path in files.items()}


def mark_serving(app: Flask, settings: Settings) -> Callable[[], object]:
    """Mark the database as used by a server, until the last process of this server ends.

    Waits while a process that must have the file alone has it. The kernel frees the lock, whatever happens.

    :returns: what ends the mark before that.
    """
    path = settings.database_file
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.serving", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # The workers, forked from this process, share it. It ends with the app, but not while the process exits.
    ended = weakref.finalize(app, os.close, lock)
    ended.atexit = False
    return ended


@contextmanager
def nobody_serving(settings: Settings) -> Iterator[None]:
    """Keep servers from starting on the database.

    :raises BlockingIOError: when one runs.
    """
    path = settings.database_file
    name = Path(f"{path}.serving")
    with open(os.open(name, os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        give_to_owner_of(path.parent, name)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_serving(settings: Settings) -> bool:
    """Whether a server uses the database; leaves no file behind."""
    try:
        lock = os.open(f"{settings.database_file}.serving", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not (_can_have(lock) or _can_have(lock))
    finally:
        os.close(lock)


def _can_have(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.01)  # another may look at this moment, too
        return False
    return True


class Lease:
    """The right to deliver webhooks: a lock on a file, which the kernel frees when its process dies."""

    def __init__(self, settings: Settings) -> None:
        self._path = f"{settings.database_file}.deliverer"
        self._file: int | None = None
        self._is_mine = False

    def take(self) -> bool:
        """Whether it is this process's, now.

        :raises OSError: when the file cannot be opened.
        """
        if self._is_mine:
            return True
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._is_mine = True
        return True

    def close(self) -> None:
        """Let another process have it."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._is_mine = None, False


def open_read_only(file: Path) -> sqlite3.Connection:
    """A connection that changes nothing.

    :raises sqlite3.OperationalError: when there is no such file.
    """
    return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Hold a lock file beside the database, so that processes starting together take turns."""
    path = settings.database_file
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_damaged(path: Path) -> None:
    """Look at every page before the first write, which might make a damaged file worse."""
    if not path.exists():
        return
    with closing(open_read_only(path)) as connection:
        sound = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    if not sound:
        raise sqlite3.DatabaseError("it is damaged, and was left as it is; put back a backup")


def _use_wal(path: Path) -> None:
    # The -wal and -shm files take the database file's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(path, 0o600)
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # remembered in the file


def _on_connect(driver: sqlite3.Connection, record: Any) -> None:
    driver.execute("PRAGMA foreign_keys = ON")
    driver.execute("PRAGMA synchronous = FULL")
    driver.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")
    record.info["synchronous"] = "FULL"
