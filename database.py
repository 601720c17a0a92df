"""SQLite's ways: pragmas, transactions, pages, the first start."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import InstrumentedAttribute

import upgrade
import waiting
from config import Settings
from models import db

# Locked by another process, read-only, failing, full, or not to be opened.
_PASSING = {
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
PROMPT = 0.005  # seconds after which a thread that waits for the lock lets another one answer
SHORTEST_SLEEP = 0.0001  # seconds

# Set when a transaction has waited in vain, until one gets the lock: meanwhile none of this process
# waits long, or every thread would, and nobody's reads or health checks were answered.
_is_stuck = threading.Event()


def newest_page(
    statement: sa.Select[Any], pk: InstrumentedAttribute[int], query: dict[str, Any]
) -> tuple[Sequence[Any], str | None]:
    """A page of rows, newest first, and the `after` of the page that follows, if there is one.

    :param pk: what the pages are keyed by.
    :param query: `limit`, and `after`, which may be None.
    """
    limit = query["limit"]
    if query["after"] is not None:
        statement = statement.where(pk < query["after"])
    found = db.session.scalars(statement.order_by(pk.desc()).limit(limit + 1)).all()
    page = found[:limit]
    return page, str(page[-1].pk) if len(found) > limit else None


@contextmanager
def writing(*, durable: bool = True, patient: bool = True) -> Iterator[sa.Connection]:
    """One write transaction on the session: BEGIN IMMEDIATE, then COMMIT, or ROLLBACK on any error.

    Whatever was read before is read again under the lock, so no transaction ever upgrades from
    reading to writing, which is where SQLite's "database is locked" comes from.

    :param durable: fsync at the commit; without it a power cut, not a crash, may undo the commit.
    :param patient: wait for the lock for BUSY_TIMEOUT; else give up soon.
    """
    db.session.rollback()
    try:
        options = {"durable": durable, "patient": patient}
        yield db.session.connection(execution_options={"writing": options})
        db.session.commit()
    except BaseException:
        db.session.rollback()
        raise


def init_database(app: Flask, settings: Settings, *, serving: bool, fill: Callable[[], None]) -> None:
    """Bind the app to its database file, made on the first start with mode 0600.

    :param serving: whether the schema may be changed: a server starts.
    :param fill: called once the tables are there, inside a write transaction.
    :raises SettingError: when the schema is not this code's and cannot be made so.
    """
    # mode=rw: a file that vanished is an error to report, not a reason for a new and empty one.
    file = f"file:{quote(str(settings.database_file))}"
    app.config["SQLALCHEMY_DATABASE_URI"] = sa.URL.create(
        "sqlite", database=file, query={"mode": "rw", "uri": "true"}
    )
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "connect_args": {"timeout": BUSY_TIMEOUT},
        # One connection for each thread, never more: gunicorn's threads are what bounds them.
        "pool_size": settings.threads,
        "max_overflow": -1,
        # Parameters hold hashes and tokens' hashes; errors that reach the log must not.
        "hide_parameters": True,
    }
    db.init_app(app)
    with app.app_context():
        sa.event.listen(db.engine, "connect", _on_connect)
        sa.event.listen(db.engine, "begin", _on_begin)
        with _alone(settings.database_file):
            _refuse_damaged(settings.database_file)
            _use_wal(settings.database_file)
            upgrade.bring_up_to_date(settings.database_file, may_change=serving)
            with writing():
                fill()
        # gunicorn forks after this: no connection may cross the fork.
        db.engine.dispose()


def begin_writing(
    execute: Callable[[str], Any], info: dict[Any, Any], *, durable: bool, patient: bool = True
) -> None:
    """BEGIN IMMEDIATE; see `writing`.

    :param execute: the driver's, of a connection of the engine's.
    :param info: the engine's notes on that connection.
    """
    level = "FULL" if durable else "NORMAL"
    # SQLite lets `synchronous` change only outside a transaction.
    if info["synchronous"] != level:
        execute(f"PRAGMA synchronous = {level}")
        info["synchronous"] = level
    patient = patient and not _is_stuck.is_set()
    try:
        _take_write_lock(execute, BUSY_TIMEOUT if patient else SHORT_TIMEOUT)
    except sqlite3.OperationalError:
        if patient:
            _is_stuck.set()
        raise
    _is_stuck.clear()


def _take_write_lock(execute: Callable[[str], Any], seconds: float) -> None:
    """BEGIN IMMEDIATE as soon as the lock is free.

    SQLite's own waiting sleeps for a millisecond and more, in which another could have written five times.
    """
    started = time.monotonic()
    execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                waited = time.monotonic() - started
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited > seconds:
                    raise
            if waited > PROMPT:
                waiting.step_aside()
            time.sleep(max(SHORTEST_SLEEP, waited / 4))
    finally:
        execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")


def may_pass(error: Exception) -> bool:
    """Whether an error is the database's, of the kind that ends by itself or by the operator's hand."""
    cause = getattr(error, "orig", error)
    # The low byte of the extended codes.
    return isinstance(cause, sqlite3.OperationalError) and cause.sqlite_errorcode & 0xFF in _PASSING


def mark_serving(app: Flask, path: Path) -> None:
    """Tell other processes that a server uses the database, until the last process of this server ends.

    Waits while one that must have the file alone has it. The kernel frees the lock, whatever happens.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.serving", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # The workers, which are forked from this process, share it. An app that is gone needs it no more,
    # but a process that ends holds it to its very end.
    weakref.finalize(app, os.close, lock).atexit = False


@contextmanager
def nobody_serving(path: Path) -> Iterator[None]:
    """Keep servers from starting on the database.

    :raises BlockingIOError: when one runs.
    """
    name = Path(f"{path}.serving")
    with open(os.open(name, os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        give_to_owner_of(path.parent, name)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_serving(path: Path) -> bool:
    """Whether a server uses the database; leaves no file behind."""
    try:
        lock = os.open(f"{path}.serving", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def open_read_only(file: Path) -> sqlite3.Connection:
    """A connection that changes nothing.

    :raises sqlite3.OperationalError: when there is no such file.
    """
    return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)


def give_to_owner_of(model: Path, file: Path) -> None:
    """What root writes for the server must stay the server's: give it the owner of `model`."""
    if os.geteuid() == 0:
        found = model.stat()
        os.chown(file, found.st_uid, found.st_gid)


def sync_folder(folder: Path) -> None:
    """Make names that were given, changed or taken in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file beside the database, so that processes starting together take turns."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_damaged(path: Path) -> None:
    """Look at every page before the first write, which might make a damaged file worse.

    :raises sqlite3.DatabaseError: when it is no database, or not whole.
    """
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


def _on_connect(connection: sqlite3.Connection, record: Any) -> None:
    # SQLAlchemy's own BEGIN below, not the driver's.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")
    record.info["synchronous"] = "FULL"


def _on_begin(connection: sa.Connection) -> None:
    # The driver begins nothing by itself: every transaction of the engine's begins here.
    options = connection.get_execution_options().get("writing")
    if options is None:
        connection.exec_driver_sql("BEGIN")
    else:
        driver: Any = connection.connection.dbapi_connection
        begin_writing(driver.execute, connection.info, **options)
