"""Runs the revisions that a database misses, with Alembic; only a start that has some imports this."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import postgresql
from config import Settings


def run(settings: Settings, folder: Path, newest: str | None) -> Path | None:
    """Bring the database to the newest revision in the folder, in one transaction.

    :param newest: what to call a copy of the database as it was after; none is made unless given, nor
        of PostgreSQL's, whose operator has other means.
    :returns: where that copy is.
    :raises Exception: whatever a revision raises; the database is then as it was.
    """
    if settings.uses_sqlite:
        return run_on_file(settings.database_file, folder, newest)
    options = postgresql.engine_options(settings, serving=False)
    engine = sa.create_engine(settings.database_url, poolclass=sa.NullPool, hide_parameters=True, **options)
    with engine.begin() as connection:
        # An older server that still runs is in the way: better to say so than to wait for its end.
        connection.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
        run_revisions(connection, folder)
    return None


def run_on_file(database: Path, folder: Path, newest: str | None = None) -> Path | None:
    """Bring a SQLite file, which may be empty, to the newest revision; see `run`."""
    copy = database.with_name(f"{database.name}.before-{newest}") if newest else None
    engine = sa.create_engine(
        "sqlite://",
        creator=lambda: _connect(database),
        poolclass=sa.NullPool,
        hide_parameters=True,
    )
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.begin() as connection:
        if copy:
            _back_up(database, copy)  # nobody writes between this and the change
        run_revisions(connection, folder)
        if connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")
    return copy


def run_revisions(connection: sa.Connection, folder: Path) -> None:
    """Run the missing revisions in the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _connect(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None)  # SQLAlchemy's own BEGIN, not the driver's
    # A table that is rebuilt is dropped, and would take along the rows that refer to it.
    connection.execute("PRAGMA foreign_keys = OFF")
    return connection


def _back_up(database: Path, copy: Path) -> None:
    """Copy what is committed; a copy that is there is whole."""
    part = copy.with_name(f"{copy.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(part)) as target:
            source.backup(target)
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)  # half a copy of a full disk keeps it full
