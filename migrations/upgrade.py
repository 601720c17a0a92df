"""Upgrade a database to the newest schema, or refuse a database that this code cannot use."""

from __future__ import annotations

import logging
import sqlite3
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from config import HERE, VERSION, SettingError, Settings
from database import error_text
from storage import postgresql, sqlite
from storage.files import whole_file

FOLDER = HERE / "migrations"

log = logging.getLogger("lanyard")


def bring_up_to_date(engine: sa.Engine, settings: Settings, *, may_change: bool) -> None:
    """Run the missing revisions, all or none, while no other process starts.

    A SQLite file that is not empty is first copied to `<database>.before-<revision>`.

    :param may_change: whether to run revisions at all.
    :raises SettingError: when this code cannot use the database, which is then unchanged.
    """
    name, newest = settings.database_name, revisions()[-1]
    with engine.connect() as connection:
        stored = read_revision(connection, name)
    if stored == newest:
        return
    if not may_change:
        raise SettingError(
            f"The database {name} has schema {stored} and this Lanyard needs {newest}:"
            " start the server once, which upgrades it."
            if stored
            else f"The database {name} has no tables yet: start the server once, or restore a backup."
        )
    try:
        copy = run(settings, newest if stored else None)
    except Exception as error:
        raise SettingError(
            f"The database {name} could not be upgraded from schema {stored or 'none'} to {newest},"
            f" and is unchanged: {error_text(error)}."
        ) from error
    if stored:
        former = f"; {copy} is a copy from before" if copy else ""
        log.warning("The database was upgraded from schema %s to %s%s.", stored, newest, former)


def revisions() -> list[str]:
    """Return all revisions, oldest first; the last is the schema of this code."""
    # From the file names: importing Alembic takes a tenth of a second.
    return sorted(path.name.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*_*.py"))


def read_revision(connection: sa.Connection, database: str) -> str | None:
    """Return the revision of the database, or None when it has no tables.

    :raises SettingError: when this code does not know the revision; `database` names the database in it.
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
            " first release, or of another program: use another file."
        )
    known = revisions()
    if stored not in known:
        raise SettingError(
            f"The database {database} has schema {stored}, which is newer than schema {known[-1]} of this"
            f" Lanyard {VERSION}: use the newer Lanyard, or another backup."
        )
    return str(stored)


def run(settings: Settings, newest: str | None) -> Path | None:
    """Upgrade the database to the newest revision in one transaction.

    :param newest: the name for a copy of a SQLite file; none is made if None, nor of PostgreSQL's.
    :returns: where the copy is.
    :raises Exception: whatever a revision raises; the database is then unchanged.
    """
    if settings.uses_sqlite:
        return run_on_file(settings.database_file, newest)
    with postgresql.unpooled_engine(settings).begin() as connection:
        # Fail rather than wait for an older server that still runs.
        connection.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
        run_revisions(connection)
    return None


def run_on_file(database: Path, newest: str | None = None) -> Path | None:
    """Upgrade a SQLite file, which may be empty, to the newest revision; see `run`."""
    copy = database.with_name(f"{database.name}.before-{newest}") if newest else None
    connect = partial(sqlite3.connect, database, isolation_level=None)  # SQLAlchemy begins, not the driver
    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool, hide_parameters=True)
    with engine.connect() as connection:
        # A rebuilt table is dropped, which would delete the rows that refer to it.
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        if copy:
            with whole_file(copy) as draft:
                sqlite.copy(database, draft)  # nobody writes between this and the change
        run_revisions(connection)
        if connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")
        connection.commit()
    return copy


def run_revisions(connection: sa.Connection) -> None:
    """Run the missing revisions in the connection's transaction."""
    # Costs a tenth of a second and 11 MB.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
