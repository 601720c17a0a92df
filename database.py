"""Transactions on SQLite or PostgreSQL: read, write, page through rows, and name a database error."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from flask import Flask, g
from sqlalchemy.orm import InstrumentedAttribute

from config import Settings, settings, state
from models import Base, EncryptedText, db, decrypt, encrypt, is_encrypted
from storage import postgresql, sqlite

# PostgreSQL's error codes (its manual, appendix A), and what to do about them.
_HELP = {
    "3D000": "make it with createdb",
    "42501": "the role must own the database: ALTER DATABASE … OWNER TO …",
}
ENCRYPTED = [
    column
    for table in Base.metadata.sorted_tables
    for column in table.c
    if isinstance(column.type, EncryptedText)
]

POOL_SIZE = 10  # connections of one process; a request holds one for milliseconds
POOL_TIMEOUT = 5  # seconds a request waits for one


def backend(settings: Settings) -> ModuleType:
    """Return the module for the kind of database in use: `sqlite` or `postgresql`."""
    return sqlite if settings.uses_sqlite else postgresql


@contextmanager
def reading() -> Iterator[sa.Connection]:
    """Lend a pooled connection on which every statement sees what is committed when it starts.

    Inside `writing` it is that transaction's connection: a second one might have to wait for those that
    wait for the write lock.
    """
    if "writing" in g:
        yield g.writing
        return
    with db.engine.connect() as connection:
        yield connection


@contextmanager
def writing(*, durable: bool = True, patient: bool = True, exclusive: bool = True) -> Iterator[sa.Connection]:
    """Run one write transaction: COMMIT at the end of the block, ROLLBACK on any exception.

    On SQLite every write transaction is alone, from BEGIN IMMEDIATE on. On PostgreSQL those that are not
    exclusive run side by side: each of their statements must be right whatever another transaction does
    between them, so they change a row only if it is still what was read (`WHERE`).

    :param durable: wait for the disk at the commit; without, a power cut may undo it.
    :param patient: wait five seconds for the write lock; else a quarter of one.
    :param exclusive: keep out every other write transaction.
    :raises DBAPIError: when the lock is not free in time.
    :raises RuntimeError: inside another `writing`, whose lock it would wait for in vain.
    """
    if "writing" in g:
        raise RuntimeError("writing() inside writing(): pass the outer transaction's connection on")
    its = sqlite if db.engine.dialect.name == "sqlite" else postgresql
    with db.engine.connect() as connection, connection.begin():
        its.begin_writing(connection, durable=durable, patient=patient, exclusive=exclusive)
        g.writing = connection
        try:
            yield connection
        finally:
            del g.writing


def newest_page(
    connection: sa.Connection,
    statement: sa.Select[*tuple[Any, ...]],
    pk: InstrumentedAttribute[int],
    query: dict[str, Any],
) -> tuple[Sequence[Any], str | None]:
    """Read a page of rows, newest first, and the `after` of the next page, if there is one.

    :param statement: selects `pk` among others.
    :param query: `limit`, and `after`, which may be None.
    """
    limit = query["limit"]
    if query["after"] is not None:
        statement = statement.where(pk < query["after"])
    found = connection.execute(statement.order_by(pk.desc()).limit(limit + 1)).all()
    page = found[:limit]
    return page, str(page[-1].pk) if len(found) > limit else None


def init_database(app: Flask, settings: Settings, *, serving: bool, prepare: Callable[[bool], None]) -> None:
    """Bind the app to its database.

    :param serving: a server starts.
    :param prepare: called with the lock held that keeps other processes from starting, and with whether
        this is a server that starts while no other runs: brings the schema up to date and fills it.
    """
    its = backend(settings)
    app.config["SQLALCHEMY_DATABASE_URI"] = its.url(settings)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "isolation_level": "AUTOCOMMIT",  # `writing` begins its transactions itself
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        # Parameters hold hashes of secrets; errors that reach the log must not.
        "hide_parameters": True,
        **its.engine_options(settings, serving),
    }
    db.init_app(app)
    with app.app_context():
        its.listen(db.engine, serving)
        with its.alone(settings):
            is_first = serving and not its.is_serving(settings)
            if serving:
                state(app).stop_serving = its.mark_serving(app, settings)
            its.open_database(settings)
            prepare(is_first)
        # gunicorn forks after this: no connection may cross the fork.
        db.engine.dispose()


def is_transient(error: Exception) -> bool:
    """Whether a database error ends by itself or by the operator's hand: locked, full, restarting."""
    cause = getattr(error, "orig", error)
    return sqlite.is_transient(cause) if isinstance(cause, sqlite3.Error) else postgresql.is_transient(cause)


def error_text(error: Any) -> str:
    """Say in one line what went wrong and, where it is known, what to do; without a full stop.

    PostgreSQL's further lines are left out: they may hold values.
    """
    cause = getattr(error, "orig", None) or error
    text = (str(cause).strip() or repr(cause)).splitlines()[0].rstrip(". ")
    # Before there is a session, the code is in the text alone.
    is_missing = "database" in text and text.endswith("does not exist")
    code = "3D000" if is_missing else getattr(cause, "sqlstate", None)
    return f"{text}; {_HELP[code]}" if code in _HELP else text


def check_encryption(connection: sa.Connection) -> int:
    """Return how many stored secrets are not encrypted with the first key of LANYARD_SECRET_KEY.

    :raises DecryptionError: when one cannot be decrypted at all.
    """
    return len(_outdated(connection))


def encrypt_again(connection: sa.Connection) -> bool:
    """Encrypt the stored secrets with the first key where they are not; returns whether any was in clear."""
    keys = settings().secret_keys
    outdated = _outdated(connection)
    for column, pk, stored in outdated:
        table = column.table
        new = sa.literal(encrypt(decrypt(stored, keys), keys), sa.String)
        connection.execute(sa.update(table).where(table.c.pk == pk).values({column: new}))
    return not all(is_encrypted(stored) for _, _, stored in outdated)


def stored_secrets(connection: sa.Connection) -> list[tuple[sa.Column[str], int, str]]:
    """Return every encrypted column's values as they are stored: column, row number, value."""
    return [
        (column, pk, stored)
        for column in ENCRYPTED
        for pk, stored in connection.execute(sa.select(column.table.c.pk, sa.type_coerce(column, sa.String)))
        if stored is not None
    ]


def _outdated(connection: sa.Connection) -> list[tuple[sa.Column[str], int, str]]:
    keys = settings().secret_keys
    found = stored_secrets(connection)
    for _, _, stored in found:
        decrypt(stored, keys)
    return [row for row in found if keys and not is_encrypted(row[2], keys[:1])]
