"""Transactions, pages, the first start: on SQLite or PostgreSQL, whose own ways have modules of their own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import InstrumentedAttribute

import complaints
import postgresql
import sqlite
import upgrade
from config import Settings
from models import db


def ways(settings: Settings) -> ModuleType:
    """The module that knows the ways of the database in use."""
    return sqlite if settings.uses_sqlite else postgresql


def _ways_of(dialect: sa.Dialect) -> ModuleType:
    return sqlite if dialect.name == "sqlite" else postgresql


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
    """One write transaction on the session, alone: then COMMIT, or ROLLBACK on any error.

    Whatever was read before is read again under the lock, so no transaction ever upgrades from
    reading to writing, which is where SQLite's "database is locked" comes from.

    :param durable: fsync at the commit; without, a power cut or a crash of PostgreSQL may undo it.
    :param patient: wait some seconds for the lock; else give up soon.
    """
    db.session.rollback()
    try:
        options = {"durable": durable, "patient": patient, "alone": True}
        yield db.session.connection(execution_options={"writing": options})
        db.session.commit()
    except BaseException:
        db.session.rollback()
        raise


def init_database(
    app: Flask,
    settings: Settings,
    *,
    serving: bool,
    fill: Callable[[bool], None],
) -> None:
    """Bind the app to its database, and make its tables on the first start.

    :param serving: a server starts; no command changes the schema.
    :param fill: called once the tables are there, inside a write transaction, with whether this is a
        server that starts while no other runs.
    :raises SettingError: when the schema is not this code's and cannot be made so.
    """
    its = ways(settings)
    app.config["SQLALCHEMY_DATABASE_URI"] = its.url(settings)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        # One of these for each thread, never more: gunicorn's threads are what bounds them.
        "pool_size": settings.threads,
        "max_overflow": -1,
        # Parameters hold hashes and tokens' hashes; errors that reach the log must not.
        "hide_parameters": True,
        **its.engine_options(settings, serving),
    }
    db.init_app(app)
    with app.app_context():
        its.listen(db.engine, serving)
        sa.event.listen(db.engine, "begin", _on_begin)
        with its.alone(settings):
            is_first = serving and not its.is_serving(settings)
            if serving:
                its.mark_serving(app, settings)
            its.open_database(settings)
            upgrade.bring_up_to_date(db.engine, settings, may_change=serving)
            with writing():
                fill(is_first)
        # gunicorn forks after this: no connection may cross the fork.
        db.engine.dispose()


def begin_writing(dialect: sa.Dialect, driver: Any, info: dict[Any, Any], **options: bool) -> None:
    """Begin a write transaction on a driver's connection; see `writing`.

    :param info: the engine's notes on that connection.
    """
    with complaints.as_sqlalchemys(dialect):
        _ways_of(dialect).begin_writing(driver, info, **options)


def may_pass(error: Exception) -> bool:
    """Whether an error is the database's, of the kind that ends by itself or by the operator's hand."""
    cause = getattr(error, "orig", error)
    return sqlite.may_pass(cause) if isinstance(cause, sqlite3.Error) else postgresql.may_pass(cause)


def _on_begin(connection: sa.Connection) -> None:
    # The drivers begin nothing by themselves, or nothing of note: the engine's transactions begin here.
    options = connection.get_execution_options().get("writing")
    if options is None:
        _ways_of(connection.dialect).begin_reading(connection)
    else:
        driver = connection.connection.dbapi_connection
        begin_writing(connection.dialect, driver, connection.info, **options)
