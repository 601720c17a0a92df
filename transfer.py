"""Export and import: an instance moves from one database to another, whatever kind each is of."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask

import backup
import clock
import complaints
import config
import crate
import database
import upgrade
import vault
from backup import Progress
from config import VERSION, SettingError, Settings
from crate import Crate, CrateError, Header, Row
from files import give_to_owner_of
from models import Base, SigningKey, db

BATCH = 500  # rows
BATCH_BYTES = 2**20  # of the file: what a batch may take, whatever is in it

_TABLES = Base.metadata.sorted_tables  # those that others refer to come first
_NUMBERED = [table for table in _TABLES if table.autoincrement_column is not None]
_SEALED = [(column.class_.__table__, column.key) for column in vault.SEALED]
_SEQUENCE = sa.table("sqlite_sequence", sa.column("name"), sa.column("seq"))


class _Regclass(sa.types.UserDefinedType[int]):
    """PostgreSQL's type for a table or sequence by its name."""

    cache_ok = True

    def get_col_spec(self, **kw: Any) -> str:
        """SQLAlchemy's hook."""
        return "REGCLASS"


def export(file: Path, *, overwrite: bool, progress: Progress) -> Header:
    """Write the app's database, as it is now, into `file`, which appears whole or not at all.

    :param progress: told of rows written so far, and of all there are.
    :raises BackupError: when there is a file already, or none can be written.
    :raises CrateError: when a row does not fit into it.
    """
    backup.refuse_own_files(config.settings(), file)
    backup.refuse_overwriting(file, overwrite)
    with backup.draft_beside(file) as draft:
        with _snapshot() as connection, crate.packing(draft, squeezed=file.name.endswith(".gz")) as packing:
            header = _header(connection)
            packing.head(header)
            _pack(connection, packing, progress, sum(header.rows.values()))
            packing.seal()
        backup.put_in_place(draft, file)
    return header


def bring_in(settings: Settings, file: Path, *, progress: Progress) -> Header:
    """Fill the instance's database, which is new, with what was exported into `file`: all or nothing.

    The file is read twice: as long as it was not looked at as a whole, nothing is touched.

    :param progress: told of rows read so far, and of all there are to read.
    :raises CrateError: when a server runs, the database is not new, or the file will not do.
    :raises SettingError: when the database cannot be used.
    """
    app = Flask(__name__)
    app.config["LANYARD"] = settings
    vault.init_app(app, settings)
    try:
        is_new = _refuse_unless_fresh(settings)
        with app.app_context():
            header = _look_through(file, progress)
        # A server that starts meanwhile waits, and finds everything.
        fill = partial(_fill, file, progress)
        database.init_database(app, settings, serving=False, may_change=is_new, fill=fill)
    except (sa.exc.DBAPIError, sqlite3.DatabaseError) as error:
        raise CrateError(f"The database cannot be used: {complaints.sentence(error)}.") from None
    finally:
        if settings.uses_sqlite:
            _give_to_owner(settings)
    return header


def _refuse_unless_fresh(settings: Settings) -> bool:
    """Refuse a database that is in use; returns whether there is none at all yet."""
    _refuse_if_serving(settings)
    if settings.uses_sqlite and not settings.database_file.exists():
        return True
    its = database.ways(settings)
    options = its.engine_options(settings, False) | {"poolclass": sa.NullPool, "hide_parameters": True}
    engine = sa.create_engine(its.url(settings), **options)
    with engine.connect() as connection:
        return not _refuse_occupied(connection)


def _refuse_if_serving(settings: Settings) -> None:
    if database.ways(settings).is_serving(settings):
        raise CrateError("A server runs on this instance: stop it first.")


def _refuse_occupied(connection: sa.Connection) -> list[str]:
    """Refuse a database in which anything has happened; returns the names of its tables."""
    there = sa.inspect(connection).get_table_names()
    # All that a first start makes is a signing key.
    counted = [table for table in _TABLES if table.name in there and table is not SigningKey.__table__]
    found = [f"{count} {table.name}" for table in counted if (count := _count(connection, table))]
    if found:
        raise CrateError(
            f"An import wants a new database, and in this one there are {', '.join(found)}:"
            " name another with LANYARD_INSTANCE or LANYARD_DATABASE_URL."
        )
    return there


def _give_to_owner(settings: Settings) -> None:
    live = settings.database_file
    if not live.parent.is_dir():
        return
    for file in live.parent.glob(f"{live.name}*"):
        give_to_owner_of(live.parent, file)


@contextmanager
def _snapshot() -> Iterator[sa.Connection]:
    """A connection that sees what is there at this moment, whatever is written meanwhile."""
    with db.engine.connect() as connection:
        if connection.dialect.name != "sqlite":  # every transaction is such a one there
            connection = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        yield connection


def _header(connection: sa.Connection) -> Header:
    rows = {table.name: _count(connection, table) for table in _TABLES}
    numbers = {table.name: _highest_number(connection, table) for table in _NUMBERED}
    schema = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return Header(VERSION, str(schema), clock.rfc3339(clock.now()), rows, numbers)


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def _pack(connection: sa.Connection, packing: crate.Packing, progress: Progress, total: int) -> None:
    done = 0
    for table in _TABLES:
        columns = [sa.type_coerce(column, crate.kept_type(column)) for column in table.columns]
        statement = sa.select(*columns).order_by(*table.primary_key)
        # A few rows at a time, also from a server that would send them all at once.
        for batch in connection.execute(statement, execution_options={"yield_per": BATCH}).partitions():
            packing.rows(table, batch)
            done += len(batch)
            progress(done, total)


def _highest_number(connection: sa.Connection, table: sa.Table) -> int:
    """The highest number that a row of the table has, or had."""
    (pk,) = table.primary_key
    there = connection.scalar(sa.select(sa.func.max(pk))) or 0
    if connection.dialect.name == "sqlite":
        given = connection.scalar(sa.select(_SEQUENCE.c.seq).where(_SEQUENCE.c.name == table.name))
    else:
        given = connection.scalar(sa.select(sa.func.pg_sequence_last_value(_sequence_of(pk))))
    return max(there, given or 0)


def _raise_numbers(connection: sa.Connection, table: sa.Table, highest: int) -> None:
    """Have the next row of the table numbered above `highest`, and above all that are there."""
    highest = max(highest, _highest_number(connection, table))
    (pk,) = table.primary_key
    if connection.dialect.name != "sqlite":
        connection.execute(sa.select(sa.func.setval(_sequence_of(pk), max(highest, 1), highest > 0)))
    elif table.dialect_options["sqlite"]["autoincrement"]:
        connection.execute(sa.delete(_SEQUENCE).where(_SEQUENCE.c.name == table.name))
        connection.execute(sa.insert(_SEQUENCE).values(name=table.name, seq=highest))


def _sequence_of(pk: sa.Column[Any]) -> sa.ColumnElement[Any]:
    return sa.cast(sa.func.pg_get_serial_sequence(pk.table.name, pk.name), _Regclass)


def _look_through(file: Path, progress: Progress) -> Header:
    """See that the whole file will do; in an app's context, whose keys must open what is sealed."""
    with _opened(config.settings(), file) as unpacked:
        total = 2 * sum(unpacked.header.rows.values())
        for done, row in enumerate(unpacked.rows(), 1):
            _check_sealed(row)
            if done % BATCH == 0:
                progress(done, total)
        return unpacked.header


def _fill(file: Path, progress: Progress, is_first: bool) -> None:
    """Put all rows of the file into the database; in a write transaction on the session."""
    connection = db.session.connection()
    _refuse_if_serving(config.settings())
    _refuse_occupied(connection)
    connection.execute(sa.delete(SigningKey))
    with _opened(config.settings(), file) as unpacked:
        done = total = sum(unpacked.header.rows.values())
        for batch in _batches(unpacked.rows()):
            _insert(connection, batch)
            done += len(batch)
            progress(done, 2 * total)
        for table in _NUMBERED:
            _raise_numbers(connection, table, unpacked.header.numbers[table.name])
    vault.check_all()
    vault.reseal_all()  # no server runs, with other keys


@contextmanager
def _opened(settings: Settings, file: Path) -> Iterator[Crate]:
    """The file to read; what is wrong with it is told with its name."""
    if file.exists() and not file.is_file():
        raise CrateError(f"{file} cannot be imported. It is no file, and must be read twice.")
    try:
        # PostgreSQL has no NUL in texts.
        with crate.unpacking(file, nul=settings.uses_sqlite) as unpacked:
            _check_header(unpacked.header)
            yield unpacked
    except CrateError as error:
        raise CrateError(f"{file} cannot be imported. {error}") from None
    except OSError as error:
        raise CrateError(f"{file} cannot be read: {error.strerror}.") from None


def _check_header(header: Header) -> None:
    known = upgrade.revisions()
    if header.schema != known[-1]:
        older = header.schema in known
        raise CrateError(
            f"It is of Lanyard {header.lanyard} with schema {header.schema}, and this Lanyard {VERSION} has"
            f" schema {known[-1]}: "
            + (
                "upgrade the instance that it is of, and export that anew."
                if older
                else "import it with that."
            )
        )
    for told, tables in ((header.rows, _TABLES), (header.numbers, _NUMBERED)):
        if odd := set(told) ^ {table.name for table in tables}:
            raise CrateError(f"It has a table too few or too many: {ascii(min(odd))[:64]}.")
    if not header.rows[SigningKey.__tablename__]:
        raise CrateError("It has no signing key, which every instance has.")


def _check_sealed(row: Row) -> None:
    for table, column in _SEALED:
        if row.table is table and row.values[column] is not None:
            try:
                vault.unseal(row.values[column])
            except SettingError:
                raise CrateError(
                    f"{table.name}.{column} in line {row.line} is encrypted: LANYARD_SECRET_KEY must hold"
                    " the key of the instance that it is of."
                ) from None


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows of one table at a time, as many as go well together."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        if batch and (row.table is not batch[0].table or len(batch) == BATCH or size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.size
    if batch:
        yield batch


def _insert(connection: sa.Connection, batch: list[Row]) -> None:
    first, last = batch[0], batch[-1]
    try:
        connection.execute(_insertion(first.table), [row.values for row in batch])
    except sa.exc.StatementError as error:
        where = f"lines {first.line} to {last.line}, of {first.table.name}"
        raise CrateError(f"The database refuses one of {where}: {complaints.sentence(error)}.") from None


@cache
def _insertion(table: sa.Table) -> sa.Insert:
    kept = {column.name: sa.bindparam(column.name, type_=crate.kept_type(column)) for column in table.columns}
    return sa.insert(table).values(kept)
