"""Whether this code can use a database as it is, must change its schema first, or must refuse it."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from config import HERE, VERSION, SettingError

FOLDER = HERE / "migrations"

log = logging.getLogger("lanyard")


def bring_up_to_date(database: Path, *, may_change: bool) -> None:
    """Run the revisions that the database misses, all or none of them; usually there are none.

    Call it alone: while no other process does. A database with something in it is copied first,
    into `<database>.before-<revision>`.

    :param may_change: whether revisions may be run at all.
    :raises SettingError: when this code cannot use the database, which is then as it was.
    """
    revisions = _revisions()
    newest = revisions[-1]
    stored = _stored(database)
    if stored == newest:
        return
    _refuse_foreign(database, stored, revisions)
    if not may_change:
        raise SettingError(
            f"The database {database} has schema {stored or 'none'} and this Lanyard needs {newest}:"
            " start the server once, which upgrades it."
        )
    _change(database, stored, newest)


def _revisions() -> list[str]:
    # Numbered, so that the newest is known without Alembic.
    return sorted(path.name.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*_*.py"))


def _stored(database: Path) -> str | None:
    """The revision of the database, none for one with nothing in it."""
    with closing(sqlite3.connect(database)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if not tables:
            return None
        if ("alembic_version",) in tables:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            if found:
                return str(found[0])
    raise SettingError(
        f"The database {database} has tables, but no schema version: it is of a Lanyard older than the first"
        " release, or no Lanyard's; move it away to start anew."
    )


def _refuse_foreign(database: Path, stored: str | None, revisions: list[str]) -> None:
    if stored is not None and stored not in revisions:
        raise SettingError(
            f"The database {database} has schema {stored}, which is newer than schema {revisions[-1]} of this"
            f" Lanyard {VERSION}: start the newer Lanyard, or put back a backup."
        )


def _change(database: Path, stored: str | None, newest: str) -> None:
    # A tenth of a second and 11 MB, which only a start with something to change pays.
    import migrate

    copy = database.with_name(f"{database.name}.before-{newest}") if stored else None
    try:
        migrate.run(database, FOLDER, copy)
    except Exception as error:
        raise SettingError(
            f"The database {database} could not be brought from schema {stored or 'none'} to {newest},"
            f" and is as it was: {getattr(error, 'orig', None) or error!r}."
        ) from error
    if copy:
        log.warning("The database was upgraded from schema %s to %s; %s is it before.", stored, newest, copy)
