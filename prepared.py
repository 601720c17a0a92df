"""Statements made ready once and run on the driver itself: for what agents call all day.

They are SQLAlchemy Core's, over the same tables; only running them is the driver's, at a sixth of
the time (README, Performance). Management takes the session.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import make_dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from flask import Flask, current_app

import complaints
import database
from config import settings
from models import db

_EXTENSION = "lanyard.prepared"


class Link(NamedTuple):
    """A driver's connection, and the dialect it speaks."""

    driver: Any
    dialect: sa.Dialect


class Prepared:
    """A Core statement, compiled at its first use. Its parameters are its `bindparam`s, by name."""

    def __init__(self, statement: Any) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def first(self, **values: Any) -> Any:
        """The first row, its columns as attributes, or None: a read that is over when this returns."""
        with _borrowed() as kept:
            return self.run(kept.link, **values)

    def run(self, link: Link, **values: Any) -> Any:
        """The same in the caller's transaction."""
        compiled = self._compiled_for(link.dialect)
        with complaints.as_sqlalchemys(link.dialect):
            rows = link.driver.execute(compiled.sql, compiled.bound(values)).fetchall()
        return compiled.row(rows[0]) if rows else None

    def change(self, link: Link, **values: Any) -> int:
        """Run it in the caller's transaction; returns how many rows it changed."""
        compiled = self._compiled_for(link.dialect)
        with complaints.as_sqlalchemys(link.dialect):
            changed: int = link.driver.execute(compiled.sql, compiled.bound(values)).rowcount
        return changed

    def _compiled_for(self, dialect: sa.Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        return compiled


class _Compiled:
    """A statement in one dialect, and what turns its values into the driver's and back."""

    def __init__(self, statement: Any, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql = str(compiled)
        # The values that the statement itself holds.
        self._constants: dict[str, Any] = dict(compiled.params)
        # What turns a parameter into what the driver takes, where something must.
        found = [
            (name, _impl(bind, dialect).bind_processor(dialect)) for name, bind in compiled.binds.items()
        ]
        self._writers = [(name, write) for name, write in found if write and name in self._constants]
        self.row = _row_maker(list(statement.exported_columns), dialect)

    def bound(self, values: dict[str, Any]) -> dict[str, Any]:
        """The driver's parameters."""
        bound = self._constants | values
        for name, write in self._writers:
            bound[name] = write(bound[name])
        return bound


def _row_maker(columns: list[Any], dialect: sa.Dialect) -> Callable[[tuple[Any, ...]], Any]:
    """What turns the driver's row into an object."""
    make = make_dataclass("Row", [str(column.key) for column in columns], slots=True)
    found = [_impl(column, dialect).result_processor(dialect, None) for column in columns]
    readers = [(index, read) for index, read in enumerate(found) if read]

    def row(values: tuple[Any, ...]) -> Any:
        cells = list(values)
        for index, read in readers:
            cells[index] = read(cells[index])
        return make(*cells)

    return row


def _impl(expression: Any, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
    impl: sa.types.TypeEngine[Any] = expression.type.dialect_impl(dialect)
    return impl


class _Kept:
    """A connection that is kept, opened as the engine opens its own."""

    def __init__(self) -> None:
        self.process: int | None = None  # none as long as there is no connection to close
        dialect = db.engine.dialect
        its = database.ways(settings())
        self._is_good = its.is_good
        with complaints.as_sqlalchemys(dialect):
            connection = db.engine.raw_connection()
            connection.detach()
            self.link = Link(connection.dbapi_connection, dialect)
            self.info = connection.info
            self.process = os.getpid()
            its.make_ready(self.link.driver)

    def is_good(self) -> bool:
        """Whether it still leads somewhere, and was not inherited: a connection must not cross a fork."""
        return self.process == os.getpid() and bool(self._is_good(self.link.driver, self.info))

    def __del__(self) -> None:
        if self.process == os.getpid():
            self.link.driver.close()


def init_app(app: Flask) -> None:
    """Let the app keep connections: borrowing one of the engine's costs as much as the statement."""
    app.extensions[_EXTENSION] = []


@contextmanager
def writing(*, durable: bool) -> Iterator[Link]:
    """`database.writing` without the session, and beside others of its kind where the database can.

    So the statements inside must each be right whatever another does between them: they change rows
    only if those are still what was read (`WHERE`), and the first such row is locked till the end.

    :param durable: fsync at the commit; without, a power cut or a crash of PostgreSQL may undo it.
    """
    with _borrowed() as kept:
        link = kept.link
        try:
            # In here too: where the lock was not had, PostgreSQL's transaction has begun, and must end.
            database.begin_writing(
                link.dialect, link.driver, kept.info, durable=durable, patient=True, alone=False
            )
            yield link
            with complaints.as_sqlalchemys(link.dialect):
                link.driver.commit()
        except BaseException:
            with suppress(link.dialect.loaded_dbapi.Error):  # the first error is the one to tell
                link.driver.rollback()
            raise


@contextmanager
def _borrowed() -> Iterator[_Kept]:
    """A connection that nobody else uses meanwhile."""
    free: list[_Kept] = current_app.extensions[_EXTENSION]
    kept = free.pop() if free else None
    if kept is None or not kept.is_good():
        kept = _Kept()
    try:
        yield kept
    finally:
        free.append(kept)
