"""The PostgreSQL backend: several hosts share one database; its advisory locks coordinate them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask

from storage.files import make_folder

if TYPE_CHECKING:
    from config import Settings

LOCK_TIMEOUT = 5000  # milliseconds to wait for a lock
SHORT_TIMEOUT = 250  # milliseconds for a transaction that may fail and be repeated
CONNECT_TIMEOUT = 5  # seconds
ANSWER_TIMEOUT = 15.0  # seconds a server process waits for an answer
SHORT_ANSWER_TIMEOUT = 1.0  # seconds after an answer did not come, until one comes

# Advisory locks are pairs of numbers; this first one distinguishes Lanyard's.
_LANYARD = 0x4C616E79  # "Lany"
_WRITE, _STARTUP, _DELIVER = 1, 2, 3

_NO_ANSWER = "_WaitTimeout"
# A lock not free in time, a deadlock, a serialization failure, a database that is read-only for now (a
# standby, after a failover), a transaction that was idle too long.
_TRANSIENT = {"55P03", "40P01", "40001", "25006", "25P03"}

# Set for each session, whatever the database's defaults: `begin_writing` relies on the isolation level. The
# server ends a session whose client is unreachable, or idle in a transaction, and frees its locks.
_SESSION = {
    "default_transaction_isolation": "read\\ committed",
    "lock_timeout": LOCK_TIMEOUT,
    "idle_in_transaction_session_timeout": 10_000,
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

# Set when the server did not answer in time, until it answers: meanwhile requests fail soon.
_is_silent = threading.Event()
_reconnecting = threading.Lock()


def url(settings: Settings) -> sa.URL:
    """Return the database's URL for SQLAlchemy."""
    return sa.make_url(settings.database_url)


def engine_options(settings: Settings, serving: bool) -> dict[str, Any]:
    given = str(url(settings).query.get("options", ""))
    return {
        "connect_args": {
            "options": " ".join([given, *(f"-c {name}={value}" for name, value in _SESSION.items())]).strip(),
            "connect_timeout": CONNECT_TIMEOUT,
            "client_encoding": "utf8",
            # `hosts_serving` finds servers by it.
            "application_name": f"lanyard {'server' if serving else 'command'}, process {os.getpid()}",
            # An unreachable database server is noticed within 30 seconds.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,
        }
    }


def listen(engine: sa.Engine, serving: bool) -> None:
    """Bound the waits for a server that does not answer, and recover from its restarts."""
    if serving:
        sa.event.listen(engine, "connect", _bound_waits)
    sa.event.listen(engine, "checkout", _check_open)
    sa.event.listen(engine, "do_connect", _connect)
    # A server that goes away after the last statement must not turn the finished request into a crash when
    # the connection is returned to the pool.
    engine.dialect.do_rollback = partial(_roll_back, engine.dialect)  # type: ignore[method-assign]


def begin_writing(connection: sa.Connection, *, durable: bool, patient: bool, exclusive: bool) -> None:
    """Begin a transaction and take the write lock, exclusive or shared; see `database.writing`."""
    statements = ["BEGIN"]
    if not durable:
        statements.append("SET LOCAL synchronous_commit = off")
    if not patient or _is_silent.is_set():
        statements.append(f"SET LOCAL lock_timeout = {SHORT_TIMEOUT}")
    # A commit is visible before its lock is freed, and a statement sees all that was committed when it starts
    # (READ COMMITTED): the holder of the lock reads what all earlier holders wrote.
    lock = f"advisory_xact_lock{'' if exclusive else '_shared'}({_LANYARD}, {_WRITE})"
    statements.append(f"SELECT pg_{lock}")
    # One round trip: psycopg sends several statements at once only without parameters.
    connection.exec_driver_sql("; ".join(statements), execution_options={"no_parameters": True})


def is_transient(error: Any) -> bool:
    """Whether the driver's error ends by itself or when the operator acts."""
    state = getattr(error, "sqlstate", None)
    if state is None:
        # Not an answer of the server: it is down or unreachable.
        return type(error).__name__ in ("OperationalError", "ConnectionTimeout", _NO_ANSWER)
    # 08: connection; 53: no disk, memory or connection left; 57: shutting down or starting; 58: I/O error.
    return state in _TRANSIENT or state[:2] in ("08", "53", "57", "58")


def without_nul(text: str | None) -> str | None:
    """Replace NUL, which PostgreSQL's text cannot hold, in a text that its sender may choose freely."""
    return text and text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def sizes(settings: Settings, connection: sa.Connection) -> dict[str, int]:
    """Return the size of the database in bytes."""
    size = sa.select(sa.func.pg_database_size(sa.func.current_database()))
    return {"main": connection.execute(size).scalar_one()}


def mark_serving(app: Flask, settings: Settings) -> Callable[[], object]:
    """Make the instance's folder, mark the database as used by a server, and return what ends the mark.

    The mark is a connection whose name shows that a server runs; the workers open theirs later.
    """
    make_folder(settings.instance)
    return session(settings, serving=True).close


def is_serving(settings: Settings) -> bool:
    """Whether a server uses the database, by the names of its connections."""
    with session(settings) as connection:
        return bool(hosts_serving(connection))


def hosts_serving(connection: sa.Connection) -> list[str]:
    """Return the addresses that servers use the database from."""
    servers = sa.text(
        "SELECT DISTINCT coalesce(host(client_addr), 'its own machine') FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'lanyard server, %' ORDER BY 1"
    )
    return list(connection.scalars(servers))


@contextmanager
def startup_lock(settings: Settings) -> Iterator[None]:
    """Hold a lock under which one process at a time changes the schema.

    :raises DBAPIError: when the database is not in UTF8.
    """
    with session(settings) as connection:
        encoding = connection.exec_driver_sql(show := "SHOW server_encoding").scalar()
        if encoding != "UTF8":
            raise sa.exc.DBAPIError(show, None, ValueError(f"its encoding must be UTF8, not {encoding}"))
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({_LANYARD}, {_STARTUP})")
        yield


class Lease:
    """The right to deliver webhooks: a lock that the server frees when its connection ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: sa.Connection | None = None

    def take(self) -> bool:
        """Whether this process has the lease, after trying to take it.

        :raises sa.exc.DBAPIError: when the database cannot be asked.
        """
        # A session that holds the lock gets it again; the end of the session frees it as a whole.
        statement = f"SELECT pg_try_advisory_lock({_LANYARD}, {_DELIVER})"
        try:
            self._connection = self._connection or session(self._settings, serving=True)
            return bool(self._connection.exec_driver_sql(statement).scalar())
        except sa.exc.DBAPIError:
            self.close()
            raise

    def close(self) -> None:
        """Give the lease up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def session(settings: Settings, *, serving: bool = False) -> sa.Connection:
    """Open a connection outside the pool; its locks are freed when it is closed."""
    engine = unpooled_engine(settings, serving=serving)
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def unpooled_engine(settings: Settings, *, serving: bool = False) -> sa.Engine:
    """Return an engine that opens a connection for each use."""
    options = engine_options(settings, serving)
    engine = sa.create_engine(url(settings), poolclass=sa.NullPool, hide_parameters=True, **options)
    listen(engine, serving)
    return engine


def _connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """Open a connection; while the server is silent, one attempt at a time tests whether it answers again."""
    is_test = _is_silent.is_set()
    if is_test and not _reconnecting.acquire(blocking=False):
        raise dialect.loaded_dbapi.OperationalError("it did not answer, and a connection attempt is running")
    try:
        driver = dialect.connect(*arguments, **options)
        _is_silent.clear()
        return driver
    except dialect.loaded_dbapi.errors.ConnectionTimeout:
        _is_silent.set()
        raise
    finally:
        if is_test:
            _reconnecting.release()


def _check_open(driver: Any, record: Any, proxy: Any) -> None:
    """Refuse a pooled connection that the server has closed since its last use, as by a restart."""
    if not driver.closed:
        # No query is in flight, so a readable socket means the server closed the connection.
        poll = select.poll()
        poll.register(driver.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
    raise sa.exc.DisconnectionError  # the pool opens another


def _bound_waits(driver: Any, record: Any) -> None:
    driver.wait = partial(_wait, driver)


def _wait(driver: Any, steps: Any, **options: Any) -> Any:
    """Wait for the server's answer as the driver does, for a bounded time.

    :raises psycopg.errors._WaitTimeout: when none comes.
    """
    seconds = SHORT_ANSWER_TIMEOUT if _is_silent.is_set() else ANSWER_TIMEOUT
    try:
        answer = type(driver).wait(driver, steps, **options | {"timeout": seconds})
    except BaseException as error:
        is_silent = type(error).__name__ == _NO_ANSWER
        if is_silent:
            _is_silent.set()
        if is_silent or not hasattr(error, "sqlstate"):  # or the request's timeout
            driver.close()  # a late answer would be taken for that of the next query
        raise
    _is_silent.clear()
    return answer


def _roll_back(dialect: sa.Dialect, driver: Any) -> None:
    try:
        driver.rollback()
    except dialect.loaded_dbapi.Error:
        if not driver.closed:
            raise
        # The server has rolled back, and the pool opens another.
