"""Statements made ready once and run on the driver itself: for what agents call all day.

They are SQLAlchemy Core's, over the same tables; only running them is the driver's, at a sixth of
the time (README, Speed). Management takes the session.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from flask import Flask, current_app
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect

import database
from models import db

_EXTENSION = "lanyard.prepared"
_DIALECT = sqlite_dialect(paramstyle="named")


class Prepared:
    """A Core statement, compiled at its first use. Its parameters are its `bindparam`s, by name."""

    def __init__(self, statement: Any) -> None:
        self._statement = statement

    def first(self, **values: Any) -> Any:
        """The first row, its columns as attributes, or None: a read that is over when this returns."""
        return self.run(_kept_connection().dbapi_connection, **values)

    def run(self, connection: sqlite3.Connection, **values: Any) -> Any:
        """The same in the caller's transaction."""
        rows = connection.execute(self._sql, self._bound(values)).fetchall()
        return self._row(rows[0]) if rows else None

    def change(self, connection: sqlite3.Connection, **values: Any) -> int:
        """Run it in the caller's transaction; returns how many rows it changed."""
        return connection.execute(self._sql, self._bound(values)).rowcount

    @cached_property
    def _compiled(self) -> Any:
        return self._statement.compile(dialect=_DIALECT)

    @cached_property
    def _sql(self) -> str:
        return str(self._compiled)

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """The values that the statement itself holds."""
        return dict(self._compiled.params)

    @cached_property
    def _writers(self) -> list[tuple[str, Callable[[Any], Any]]]:
        """What turns a parameter into what the driver takes, where something must."""
        found = [(name, _impl(bind).bind_processor(_DIALECT)) for name, bind in self._compiled.binds.items()]
        return [(name, write) for name, write in found if write and name in self._constants]

    def _bound(self, values: dict[str, Any]) -> dict[str, Any]:
        bound = self._constants | values
        for name, write in self._writers:
            bound[name] = write(bound[name])
        return bound

    @cached_property
    def _row(self) -> Callable[[tuple[Any, ...]], Any]:
        """What turns the driver's row into an object."""
        columns = list(self._statement.exported_columns)
        make = make_dataclass("Row", [str(column.key) for column in columns], slots=True)
        found = [_impl(column).result_processor(_DIALECT, None) for column in columns]
        readers = [(index, read) for index, read in enumerate(found) if read]

        def row(values: tuple[Any, ...]) -> Any:
            cells = list(values)
            for index, read in readers:
                cells[index] = read(cells[index])
            return make(*cells)

        return row


def init_app(app: Flask) -> None:
    """Let each thread of the app keep a connection: borrowing one costs as much as the statement."""
    app.extensions[_EXTENSION] = threading.local()


@contextmanager
def writing(*, durable: bool) -> Iterator[sqlite3.Connection]:
    """`database.writing` without the session: BEGIN IMMEDIATE, then COMMIT, or ROLLBACK on any error.

    :param durable: fsync at the commit; without it a power cut, not a crash, may undo the commit.
    """
    kept = _kept_connection()
    connection: sqlite3.Connection = kept.dbapi_connection
    database.begin_writing(connection.execute, kept.info, durable=durable)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _kept_connection() -> Any:
    """This thread's connection, as the engine opened it; the driver's own is its `dbapi_connection`."""
    mine = current_app.extensions[_EXTENSION]
    # A connection must not cross a fork.
    if getattr(mine, "process", None) != os.getpid():
        mine.connection = db.engine.raw_connection()
        mine.connection.detach()
        mine.process = os.getpid()
    return mine.connection


def _impl(expression: Any) -> sa.types.TypeEngine[Any]:
    impl: sa.types.TypeEngine[Any] = expression.type.dialect_impl(_DIALECT)
    return impl
