"""Whether this code can use a database as it is, must change its schema first, or must refuse it."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from config import HERE, VERSION, SettingError, Settings
from database import error_text
from storage import postgresql

FOLDER = HERE / "migrations"

log = logging.getLogger("lanyard")


def bring_up_to_date(engine: sa.Engine, settings: Settings, *, may_change: bool) -> None:
    """Run the revisions that the database misses, all or none of them; usually there are none.

    Call it alone: while no other process does. A SQLite file with something in it is copied first,
    into `<database>.before-<revision>`.

    :param may_change: whether revisions may be run at all.
    :raises SettingError: when this code cannot use the database, which is then as it was.
    """
    newest = revisions()[-1]
    with engine.connect() as connection:
        stored = read_revision(connection, settings.database_name)
    if stored == newest:
        return
    if not may_change:
        name = settings.database_name
        raise SettingError(
            f"The database {name} has schema {stored} and this Lanyard needs {newest}:"
            " start the server once, which upgrades it."
            if stored
            else f"The database {name} has no tables yet: start the server once, or restore a backup."
        )
    _change(settings, stored, newest)


def revisions() -> list[str]:
    """Every schema that there was, oldest first; the last is this code's."""
    # Numbered, so that the newest is known without Alembic.
    return sorted(path.name.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*_*.py"))


def read_revision(connection: sa.Connection, database: str) -> str | None:
    """Return the revision of the database, or None when it has no tables.

    :param database: its name in messages.
    :raises SettingError: when it is not a revision that this code knows.
    """
    tables = sa.inspect(connection).get_table_names()
    if not tables:
        return None
    stored = None
    if "alembic_version" in tables:
        stored = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if not stored:
        raise SettingError(
            f"The database {database} has tables, but no schema version: it is of a Lanyard older than the"
            " first release, or no Lanyard's; move it away to start anew."
        )
    known = revisions()
    if stored not in known:
        raise SettingError(
            f"The database {database} has schema {stored}, which is newer than schema {known[-1]} of this"
            f" Lanyard {VERSION}: start the newer Lanyard, or put back a backup."
        )
    return str(stored)


def _change(settings: Settings, stored: str | None, newest: str) -> None:
    name = settings.database_name
    try:
        copy = run(settings, newest if stored else None)
    except Exception as error:
        raise SettingError(
            f"The database {name} could not be brought from schema {stored or 'none'} to {newest},"
            f" and is as it was: {error_text(error)}."
        ) from error
    if copy:
        log.warning("The database was upgraded from schema %s to %s; %s is it before.", stored, newest, copy)
    elif stored:
        log.warning("The database was upgraded from schema %s to %s.", stored, newest)


def run(settings: Settings, newest: str | None) -> Path | None:
    """Bring the database to the newest revision in one transaction.

    :param newest: what to call a copy of the database as it was after; none is made unless given, nor
        of PostgreSQL's, whose operator has other means.
    :returns: where that copy is.
    :raises Exception: whatever a revision raises; the database is then as it was.
    """
    if settings.uses_sqlite:
        return run_on_file(settings.database_file, newest)
    options = postgresql.engine_options(settings, serving=False)
    engine = sa.create_engine(settings.database_url, poolclass=sa.NullPool, hide_parameters=True, **options)
    with engine.begin() as connection:
        # An older server that still runs is in the way: better to say so than to wait for its end.
        connection.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
        run_revisions(connection)
    return None


def run_on_file(database: Path, newest: str | None = None) -> Path | None:
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
        run_revisions(connection)
        if connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")
    return copy


def run_revisions(connection: sa.Connection) -> None:
    """Run the missing revisions in the connection's transaction."""
    # A tenth of a second and 11 MB, which only a start with something to change pays.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
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
