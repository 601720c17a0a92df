"""Backup and restore of a PostgreSQL database, to and from a SQLite file like that of a SQLite instance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from commands import backup
from commands.backup import BackupError
from config import Settings
from database import error_text
from migrations import upgrade
from models import Base, SigningKey
from storage import postgresql
from storage.sqlite import Progress, read_only_engine

BATCH = 1000  # rows

_TABLES = Base.metadata.sorted_tables  # a table comes after those that it refers to
_SEQUENCE = sa.table("sqlite_sequence", sa.column("name"), sa.column("seq"))
_FROM_RECEIVERS = ("response_body", "error")  # columns of deliveries, chosen by receivers of webhooks


def back_up(settings: Settings, file: Path, *, overwrite: bool, progress: Progress) -> None:
    """Write all rows as they are now into the SQLite database `file`, which appears whole and checked.

    Writers are not blocked. Encrypted secrets stay encrypted. Progress is in rows.

    :raises BackupError: if `file` exists, or cannot be written.
    :raises SettingError: if the database has another schema than this code.
    """
    backup.check_name(settings, file, overwrite=overwrite)
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with backup.written(file) as draft:
        with _transaction(settings, **options) as source:
            upgrade.bring_up_to_date(source.engine, settings, may_change=False)
            backup.run_revisions(draft, "The copy")
            url = sa.URL.create("sqlite", database=str(draft))
            with sa.create_engine(url, poolclass=sa.NullPool, hide_parameters=True).begin() as target:
                _copy_rows(source, target, progress)
        backup.check(draft, "The copy")


def restore(settings: Settings, file: Path, *, progress: Progress) -> None:
    """Fill the instance's database, which must be new, from a backup: completely or not at all.

    :raises BackupError: if a server runs, the database is in use, or `file` cannot be restored.
    :raises SettingError: if the database cannot be used.
    """
    with backup.usable_backup(settings, file) as current, postgresql.startup_lock(settings):
        # Servers that start from here on wait for the lock that `alone` holds.
        if postgresql.is_serving(settings):
            raise BackupError("A server runs on this instance: stop it first.")
        with (
            read_only_engine(current).connect() as source,
            _transaction(settings, isolation_level="READ COMMITTED") as target,
        ):
            _prepare(target, settings)
            _copy_rows(source, target, progress)


@contextmanager
def _transaction(settings: Settings, **options: Any) -> Iterator[sa.Connection]:
    with postgresql.session(settings) as connection:
        connection.rollback()  # the isolation level cannot change inside a transaction
        with connection.execution_options(**options).begin():
            yield connection


def _prepare(target: sa.Connection, settings: Settings) -> None:
    """Make or upgrade the tables, and lock them; in the caller's transaction.

    :raises BackupError: if rows other than signing keys exist; a first start makes one signing key.
    """
    upgrade.read_revision(target, settings.database_name)
    target.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
    upgrade.run_revisions(target)
    target.exec_driver_sql(f"LOCK TABLE {', '.join(table.name for table in _TABLES)}")
    counts = {table.name: _count(target, table) for table in _TABLES if table is not SigningKey.__table__}
    if found := [f"{count} {name}" for name, count in counts.items() if count]:
        raise BackupError(
            f"A restore needs a new database, and this one has {', '.join(found)}:"
            " name another one with LANYARD_DATABASE_URL."
        )
    target.execute(sa.delete(SigningKey))


def _copy_rows(source: sa.Connection, target: sa.Connection, progress: Progress) -> None:
    total = sum(_count(source, table) for table in _TABLES)
    done = 0
    for table in _TABLES:
        plain = _without_conversions(table)
        rows = sa.select(plain).order_by(*(plain.c[column.name] for column in table.primary_key))
        try:
            # yield_per: a server-side cursor, so that memory stays flat.
            found = source.execute(rows, execution_options={"yield_per": BATCH})
            for batch in found.mappings().partitions():
                target.execute(sa.insert(plain), [_without_nul(row) for row in batch])
                done += len(batch)
                progress(done, total)
            if table.autoincrement_column is not None:
                _set_last_number(target, table, _last_number(source, table))
        except (sa.exc.StatementError, ValueError) as error:
            reason = error_text(error)
            raise BackupError(f"The rows of {table.name} cannot be copied: {reason}.") from error


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def _without_conversions(table: sa.Table) -> sa.TableClause:
    """Return the table with plain column types, so that an encrypted secret is copied as it is stored."""
    columns = [sa.column(one.name, getattr(one.type, "impl_instance", one.type)) for one in table.columns]
    return sa.table(table.name, *columns)


def _without_nul(row: sa.RowMapping) -> dict[str, Any]:
    return {**row, **{name: postgresql.without_nul(row[name]) for name in _FROM_RECEIVERS if name in row}}


def _last_number(connection: sa.Connection, table: sa.Table) -> int:
    """Return the highest number that a row of the table has or had."""
    (pk,) = table.primary_key
    highest = connection.scalar(sa.select(sa.func.max(pk))) or 0
    if connection.dialect.name == "sqlite":
        given = connection.scalar(sa.select(_SEQUENCE.c.seq).where(_SEQUENCE.c.name == table.name))
    else:
        last = sa.text("SELECT pg_sequence_last_value(CAST(pg_get_serial_sequence(:name, 'pk') AS regclass))")
        given = connection.scalar(last, {"name": table.name})
    return max(highest, int(given or 0))


def _set_last_number(connection: sa.Connection, table: sa.Table, number: int) -> None:
    """Make the next row's number `number` + 1."""
    if connection.dialect.name != "sqlite":
        setval = sa.text("SELECT setval(pg_get_serial_sequence(:name, 'pk'), :number, :is_given)")
        connection.execute(setval, {"name": table.name, "number": max(number, 1), "is_given": number > 0})
    elif number and table.dialect_options["sqlite"]["autoincrement"]:
        connection.execute(sa.delete(_SEQUENCE).where(_SEQUENCE.c.name == table.name))
        connection.execute(sa.insert(_SEQUENCE).values(name=table.name, seq=number))
