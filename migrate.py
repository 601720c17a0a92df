"""Runs the revisions that a database misses, with Alembic; only a start that has some imports this."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def run(database: Path, folder: Path, copy: Path | None) -> None:
    """Bring the database to the newest revision in the folder, in one transaction.

    :param copy: where to keep the database as it was.
    :raises Exception: whatever a revision raises; the database is then as it was.
    """
    engine = sa.create_engine(
        "sqlite://",
        creator=lambda: _connect(database),
        poolclass=sa.NullPool,
        hide_parameters=True,
    )
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    with engine.begin() as connection:
        if copy:
            _back_up(database, copy)  # nobody writes between this and the change
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        if connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")


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
