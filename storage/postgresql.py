"""PostgreSQL's ways: several hosts on one database, kept in step by its advisory locks."""

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

if TYPE_CHECKING:
    from config import Settings

LOCK_TIMEOUT = 5000  # milliseconds a transaction waits for another's lock
SHORT_TIMEOUT = 250  # the same for one that can as well come later
CONNECT_TIMEOUT = 5  # seconds
ANSWER_TIMEOUT = 15.0  # seconds a server waits for an answer
SHORT_ANSWER_TIMEOUT = 1.0  # the same from then on, until one comes

# Advisory locks are numbers that a database's clients agree on: these have the same first half.
_OURS = 0x4C616E79  # "Lany"
_WRITE, _ALONE, _DELIVER = 1, 2, 3

_LOCKED = "55P03"
_NO_ANSWER = "_WaitTimeout"
# What the server says when it is the moment that is wrong: a lock not had in time, a deadlock it ended,
# a database that only reads just now (a standby, after a failover), a client that was stopped meanwhile.
_TRANSIENT = {_LOCKED, "40P01", "40001", "25006", "25P03"}
_SERVER = "lanyard server, "

# Whatever the database's defaults are: `begin_writing` relies on the isolation level. The server gives up a
# client that is gone without a word, or stops in the middle of a transaction, and frees its locks.
_SESSION = {
    "default_transaction_isolation": "read\\ committed",
    "lock_timeout": LOCK_TIMEOUT,
    "idle_in_transaction_session_timeout": 10_000,
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

# Set when a transaction has waited in vain, until one gets the lock: meanwhile none of this process
# waits long, or every thread would, and nobody's reads or health checks were answered.
_is_stuck = threading.Event()
# The same for the server's answers: set when one did not come, until another does.
_is_silent = threading.Event()
_one_tries = threading.Lock()


class EncodingError(Exception):
    """The database's encoding cannot hold every text."""


def url(settings: Settings) -> sa.URL:
    """The database's address, as SQLAlchemy takes it."""
    return sa.make_url(settings.database_url)


def engine_options(settings: Settings, serving: bool) -> dict[str, Any]:
    """Return the engine's options."""
    given = str(url(settings).query.get("options", ""))
    return {
        "connect_args": {
            "options": " ".join([given, *(f"-c {name}={value}" for name, value in _SESSION.items())]).strip(),
            "connect_timeout": CONNECT_TIMEOUT,
            "client_encoding": "utf8",
            # How others see that a server runs: a command has another name.
            "application_name": f"lanyard {'server' if serving else 'command'}, process {os.getpid()}",
            # A server that is gone without a word is noticed within 30 seconds.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,
        }
    }


def listen(engine: sa.Engine, serving: bool) -> None:
    """Have the engine open connections, and begin transactions, our way."""
    sa.event.listen(engine, "connect", partial(_on_connect, serving))
    sa.event.listen(engine, "checkout", _on_checkout)
    sa.event.listen(engine, "do_connect", _on_do_connect)
    # A server that goes away must not turn a request that has its answer into a crash when the connection
    # is returned to the pool.
    engine.dialect.do_rollback = partial(_roll_back, engine.dialect)  # type: ignore[method-assign]


def open_database(settings: Settings) -> None:
    """Nothing: whoever runs the PostgreSQL has made it."""


def is_good(driver: Any, info: dict[Any, Any]) -> bool:
    """Whether the server has not closed the connection since it was used, as a restarted one has."""
    if driver.closed:
        return False
    # No query is in flight, so a readable socket means the server closed the connection.
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    return not poll.poll(0)


def begin_writing(connection: sa.Connection, *, durable: bool, patient: bool, exclusive: bool) -> None:
    """Begin a transaction and take the write lock, exclusive or shared; see `database.writing`."""
    patient = patient and not _is_stuck.is_set() and not _is_silent.is_set()
    statements = ["BEGIN"]
    if not durable:
        statements.append("SET LOCAL synchronous_commit = off")
    if not patient:
        statements.append(f"SET LOCAL lock_timeout = {SHORT_TIMEOUT}")
    # Locks are freed after what was committed can be seen, and statements see what is committed when
    # they start (READ COMMITTED): whoever has the lock reads what all before it wrote.
    lock = f"advisory_xact_lock{'' if exclusive else '_shared'}({_OURS}, {_WRITE})"
    try:
        # One round trip: psycopg sends several statements at once only without parameters.
        connection.exec_driver_sql(
            "; ".join([*statements, f"SELECT pg_{lock}"]), execution_options={"no_parameters": True}
        )
    except sa.exc.DBAPIError as error:
        if patient and getattr(error.orig, "sqlstate", None) == _LOCKED:
            _is_stuck.set()
        raise
    _is_stuck.clear()


def is_transient(error: Any) -> bool:
    """Whether the driver's error is of the kind that ends by itself or by the operator's hand."""
    state = getattr(error, "sqlstate", None)
    if state is None:
        # Without an answer of the server's there is no server: it is down, or was.
        return type(error).__name__ in ("OperationalError", "ConnectionTimeout", _NO_ANSWER)
    # 08: connection; 53: disk, memory or connections used up; 57: shutting down, or starting; 58: its disk.
    return state in _TRANSIENT or state[:2] in ("08", "53", "57", "58")


def sizes(settings: Settings, connection: sa.Connection) -> dict[str, int]:
    """Return the size of the database in bytes."""
    return {
        "main": connection.execute(
            sa.select(sa.func.pg_database_size(sa.func.current_database()))
        ).scalar_one()
    }


def mark_serving(app: Flask, settings: Settings) -> Callable[[], object]:
    """Make the instance's folder, and keep a connection whose name tells others that a server runs.

    Its workers have connections of their own soon, but not yet while they start.

    :returns: what ends the mark.
    """
    settings.instance.mkdir(mode=0o700, parents=True, exist_ok=True)
    return session(settings, serving=True).close


def is_serving(settings: Settings) -> bool:
    """Whether a server uses the database, by the names of its connections."""
    with session(settings) as connection:
        return bool(hosts_serving(connection))


def hosts_serving(connection: sa.Connection) -> list[str]:
    """The addresses that servers use the database from."""
    activity = sa.table("pg_stat_activity", *map(sa.column, ("datname", "application_name", "client_addr")))
    address = sa.func.coalesce(sa.cast(activity.c.client_addr, sa.Text), "its own machine")
    servers = sa.select(address).where(
        activity.c.datname == sa.func.current_database(), activity.c.application_name.startswith(_SERVER)
    )
    return sorted(set(connection.scalars(servers)))


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Hold a lock of the database's, so that servers starting together take turns.

    :raises EncodingError: when the database cannot keep every text.
    """
    with session(settings) as connection:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
        if encoding != "UTF8":
            raise EncodingError(f"LANYARD_DATABASE_URL must name a database in UTF8, not {encoding}.")
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({_OURS}, {_ALONE})")
        yield


class Lease:
    """The right to deliver webhooks: a lock that the server frees when the connection that took it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: sa.Connection | None = None
        self._is_mine = False

    def take(self) -> bool:
        """Whether it is this process's, now: of all processes of all hosts.

        :raises sa.exc.DBAPIError: when the database cannot be asked.
        """
        statement = "SELECT 1" if self._is_mine else f"SELECT pg_try_advisory_lock({_OURS}, {_DELIVER})"
        try:
            if self._connection is None:
                self._connection = session(self._settings, serving=True)
            self._is_mine = bool(self._connection.exec_driver_sql(statement).scalar())
        except sa.exc.DBAPIError:
            self.close()
            raise
        return self._is_mine

    def close(self) -> None:
        """Let another process have it."""
        connection, self._connection, self._is_mine = self._connection, None, False
        if connection is not None:
            connection.close()


def session(settings: Settings, *, serving: bool = False) -> sa.Connection:
    """A connection of its own, whose locks and other doings end when it is closed."""
    options = engine_options(settings, serving)
    engine = sa.create_engine(url(settings), poolclass=sa.NullPool, hide_parameters=True, **options)
    if serving:
        sa.event.listen(engine, "connect", _bound_its_waits)
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def _bound_its_waits(driver: Any, record: Any) -> None:
    driver.wait = partial(_wait, driver)


def _on_do_connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> Any:
    was_silent = _is_silent.is_set()
    # One is enough to see whether it answers again.
    if was_silent and not _one_tries.acquire(blocking=False):
        raise dialect.loaded_dbapi.OperationalError("it did not answer, and is asked whether it does again")
    try:
        return dialect.connect(*arguments, **options)
    except dialect.loaded_dbapi.errors.ConnectionTimeout:
        _is_silent.set()
        raise
    finally:
        if was_silent:
            _one_tries.release()


def _wait(driver: Any, steps: Any, **options: Any) -> Any:
    """Wait for the server's answer as the driver does, but not for ever.

    :raises psycopg.errors._WaitTimeout: when there is none in time.
    """
    seconds = SHORT_ANSWER_TIMEOUT if _is_silent.is_set() else ANSWER_TIMEOUT
    try:
        answer = type(driver).wait(driver, steps, **options | {"timeout": seconds})
    except Exception as error:
        if type(error).__name__ == _NO_ANSWER:
            _is_silent.set()
            driver.close()  # what comes late would be taken for the next answer
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


def _on_connect(serving: bool, driver: Any, record: Any) -> None:
    if serving:
        driver.wait = partial(_wait, driver)


def _on_checkout(driver: Any, record: Any, proxy: Any) -> None:
    if not is_good(driver, record.info):
        raise sa.exc.DisconnectionError  # the pool opens another
