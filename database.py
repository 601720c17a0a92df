"""Transactions on SQLite or PostgreSQL: read, write, page through rows, and name a database error."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from flask import Flask, g
from sqlalchemy.orm import InstrumentedAttribute

from config import Settings, settings, state
from models import Base, EncryptedText, db, decrypt, is_encrypted
from storage import postgresql, sqlite

StoredSecret = tuple[sa.Column[str], int, str]  # column, the row's `pk`, the value as stored

# What to do about some errors, by SQLSTATE (PostgreSQL manual, appendix A).
_REMEDIES = {
    "3D000": "make it with createdb",
    "42501": "the role must own the database: ALTER DATABASE … OWNER TO …",
}

# Set when a transaction has timed out waiting for the lock, until one gets it: meanwhile transactions of this
# process wait briefly, or they would take all pooled connections from the readers.
_lock_timed_out = threading.Event()
_LOCKED = "55P03"  # PostgreSQL's lock_not_available

POOL_SIZE = 10  # connections of one process; a request holds one for milliseconds
POOL_TIMEOUT = 5  # seconds a request waits for a connection


def backend(settings: Settings) -> ModuleType:
    """Return the module for the kind of database in use: `sqlite` or `postgresql`."""
    return sqlite if settings.uses_sqlite else postgresql


@contextmanager
def reading() -> Iterator[sa.Connection]:
    """Yield a pooled connection on which every statement sees what is committed when it starts.

    Inside `writing` it is that transaction's: requests that wait for the write lock may hold all others.
    """
    if "writing" in g:
        yield g.writing
        return
    with db.engine.connect() as connection:
        yield connection


@contextmanager
def writing(
    *, durable: bool = True, patient: bool = True, exclusive: bool = True, reserve: float | None = None
) -> Iterator[sa.Connection]:
    """Run one write transaction: COMMIT at the end of the block, ROLLBACK on any exception.

    On SQLite no two overlap. On PostgreSQL those that are not exclusive run concurrently: each of their
    statements must be right whatever another transaction commits before it (compare-and-set in `WHERE`).

    :param durable: wait for the disk at the commit; without, a power cut may undo it.
    :param patient: wait five seconds for the write lock, instead of a quarter of a second.
    :param exclusive: exclude every other write transaction.
    :param reserve: the share of the disk's reserve that may be used on a full disk (SQLite): 1 to end access,
        0.5 to end what an agent may have many of, 0 to write nothing. While any is used, others are refused.
    :raises DBAPIError: when the lock is not free in time.
    :raises RuntimeError: inside another `writing`, whose lock it would wait for in vain.
    """
    if "writing" in g:
        raise RuntimeError("writing() inside writing(): pass the outer transaction's connection on")
    patient = patient and not _lock_timed_out.is_set()
    with db.engine.connect() as connection, connection.begin():
        try:
            backend(settings()).begin_writing(
                connection, durable=durable, patient=patient, exclusive=exclusive
            )
        except sa.exc.DBAPIError as error:
            if patient and getattr(error.orig, "sqlstate", _LOCKED) == _LOCKED:
                _lock_timed_out.set()
            raise
        _lock_timed_out.clear()
        if settings().uses_sqlite:
            sqlite.claim_room(settings(), reserve)
        g.writing = connection
        try:
            yield connection
        finally:
            del g.writing


def keep_reserve() -> bool:
    """Make the reserve of a SQLite database unless it is whole; return whether it is now."""
    if not settings().uses_sqlite or sqlite.reserve_size(settings()) == sqlite.RESERVE:
        return True
    # Under the lock: an attempt takes the room of all others for a moment.
    with writing(durable=False, reserve=0), suppress(OSError):
        sqlite.make_reserve(settings())
        return True
    return False


def newest_page(
    connection: sa.Connection,
    statement: sa.Select[*tuple[Any, ...]],
    pk: InstrumentedAttribute[int],
    query: dict[str, Any],
) -> tuple[Sequence[Any], str | None]:
    """Read a page of rows, newest first, and the `after` of the next page, if any.

    :param statement: selects `pk` among others.
    :param query: `limit`, and `after`, which may be None.
    """
    limit = query["limit"]
    if query["after"] is not None:
        statement = statement.where(pk < query["after"])
    rows = connection.execute(statement.order_by(pk.desc()).limit(limit + 1)).all()
    page = rows[:limit]
    return page, str(page[-1].pk) if len(rows) > limit else None


def init_database(app: Flask, settings: Settings, *, serving: bool, prepare: Callable[[bool], None]) -> None:
    """Bind the app to its database.

    :param serving: a server starts.
    :param prepare: creates or upgrades the schema and its first rows, while no other process starts; called
        with whether this is a server and no other one runs.
    """
    storage = backend(settings)
    app.config["SQLALCHEMY_DATABASE_URI"] = storage.url(settings)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "pool_reset_on_return": None,  # `writing` ends its transactions itself, too
        "isolation_level": "AUTOCOMMIT",  # `writing` begins its transactions itself
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        # Parameters hold hashes of secrets; errors that reach the log must not.
        "hide_parameters": True,
        **storage.engine_options(settings, serving),
    }
    db.init_app(app)
    with app.app_context():
        storage.listen(db.engine, serving)
        with storage.startup_lock(settings):
            is_first = serving and not storage.is_serving(settings)
            if serving:
                state(app).stop_serving = storage.mark_serving(app, settings)
            if settings.uses_sqlite:
                sqlite.open_database(settings)
            prepare(is_first)
            if serving and not keep_reserve():
                logging.getLogger("lanyard").warning(
                    "There is no reserve for a full disk: see ./lanyard doctor."
                )
        # gunicorn forks after this: no connection may be shared with a child process.
        db.engine.dispose()


def is_transient(error: Exception) -> bool:
    """Whether a database error ends by itself or when the operator acts: locked, full, restarting."""
    if isinstance(error, sa.exc.TimeoutError):
        return True  # every connection of the pool is in use
    cause = getattr(error, "orig", error)
    return sqlite.is_transient(cause) if isinstance(cause, sqlite3.Error) else postgresql.is_transient(cause)


def error_text(error: Any) -> str:
    """Return the error's first line (others may hold values) without a full stop, and what to do if known."""
    cause = getattr(error, "orig", None) or error
    text = (str(cause).strip() or repr(cause)).splitlines()[0].rstrip(". ")
    # An error of connecting has no code.
    is_missing = "database" in text and text.endswith("does not exist")
    code = "3D000" if is_missing else getattr(cause, "sqlstate", None)
    return f"{text}; {_REMEDIES[code]}" if code in _REMEDIES else text


def outdated_secrets(connection: sa.Connection) -> list[StoredSecret]:
    """Return the stored secrets that are not encrypted with the first key of LANYARD_SECRET_KEY.

    :raises DecryptionError: when a secret cannot be decrypted at all.
    """
    keys = settings().secret_keys
    secrets = stored_secrets(connection)
    for _, _, stored in secrets:
        decrypt(stored, keys)
    return [row for row in secrets if keys and not is_encrypted(row[2], keys[:1])]


def reencrypt(connection: sa.Connection, outdated: list[StoredSecret]) -> bool:
    """Encrypt the given secrets with the first key; return whether any was unencrypted."""
    keys = settings().secret_keys
    for column, pk, stored in outdated:
        update = sa.update(column.table).where(column.table.c.pk == pk)
        connection.execute(update.values({column: decrypt(stored, keys)}))  # its type encrypts
    return not all(is_encrypted(stored) for _, _, stored in outdated)


def stored_secrets(connection: sa.Connection) -> list[StoredSecret]:
    """Return the values of all encrypted columns as they are stored."""
    columns = [column for table in Base.metadata.sorted_tables for column in table.c]
    return [
        (column, pk, stored)
        for column in columns
        if isinstance(column.type, EncryptedText)
        for pk, stored in connection.execute(sa.select(column.table.c.pk, sa.type_coerce(column, sa.String)))
        if stored is not None
    ]
