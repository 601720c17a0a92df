"""Whether this code can use a database as it is, must change its schema first, or must refuse it."""

from __future__ import annotations

import logging

import sqlalchemy as sa

import complaints
from config import HERE, VERSION, SettingError, Settings

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
    # A tenth of a second and 11 MB, which only a start with something to change pays.
    import migrate

    name = settings.database_name
    try:
        copy = migrate.run(settings, FOLDER, newest if stored else None)
    except Exception as error:
        raise SettingError(
            f"The database {name} could not be brought from schema {stored or 'none'} to {newest},"
            f" and is as it was: {complaints.sentence(error)}."
        ) from error
    if copy:
        log.warning("The database was upgraded from schema %s to %s; %s is it before.", stored, newest, copy)
    elif stored:
        log.warning("The database was upgraded from schema %s to %s.", stored, newest)
