"""Whether this code can use a database as it is, must change its schema first, or must refuse it."""

from __future__ import annotations

import logging

import sqlalchemy as sa

from config import HERE, VERSION, SettingError, Settings
from database import error_text

FOLDER = HERE / "migrations"

log = logging.getLogger("lanyard")


def bring_up_to_date(engine: sa.Engine, settings: Settings, *, may_change: bool) -> None:
    """Run the revisions that the database misses, all or none of them; usually there are none.

    Call it alone: while no other process does. A SQLite file with something in it is copied first,
    into `<database>.before-<revision>`.

    :param may_change: whether revisions may be run at all.
    :raises SettingError: when this code cannot use the database, which is then as it was.
    """
    known = revisions()
    newest = known[-1]
    stored = _stored(engine, settings.database_name)
    if stored == newest:
        return
    _refuse_foreign(settings.database_name, stored, known)
    if not may_change:
        name = settings.database_name
        raise SettingError(
            f"The database {name} has schema {stored} and this Lanyard needs {newest}:"
            " start the server once, which upgrades it."
            if stored
            else f"The database {name} has no tables yet: start the server once, or import an instance."
        )
    _change(settings, stored, newest)


def revisions() -> list[str]:
    """Every schema that there was, oldest first; the last is this code's."""
    # Numbered, so that the newest is known without Alembic.
    return sorted(path.name.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*_*.py"))


def _stored(engine: sa.Engine, database: str) -> str | None:
    """The revision of the database, none for one with nothing in it."""
    with engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        if not tables:
            return None
        if "alembic_version" in tables:
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            if found:
                return str(found)
    raise SettingError(
        f"The database {database} has tables, but no schema version: it is of a Lanyard older than the first"
        " release, or no Lanyard's; move it away to start anew."
    )


def _refuse_foreign(database: str, stored: str | None, known: list[str]) -> None:
    if stored is not None and stored not in known:
        raise SettingError(
            f"The database {database} has schema {stored}, which is newer than schema {known[-1]} of this"
            f" Lanyard {VERSION}: start the newer Lanyard, or put back a backup."
        )


def _change(settings: Settings, stored: str | None, newest: str) -> None:
    # A tenth of a second and 11 MB, which only a start with something to change pays.
    import migrate

    name = settings.database_name
    try:
        copy = migrate.run(settings, FOLDER, newest if stored else None)
    except Exception as error:
        raise SettingError(
            f"The database {name} could not be brought from schema {stored or 'none'} to {newest},"
            f" and is as it was: {error_text(error)}."
        ) from error
    if copy:
        log.warning("The database was upgraded from schema %s to %s; %s is it before.", stored, newest, copy)
    elif stored:
        log.warning("The database was upgraded from schema %s to %s.", stored, newest)
