"""The operator's commands that look after the instance: admin token, backup, purge, doctor."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from flask import has_app_context
from flask.cli import with_appcontext

import auth
import config
from commands import backup, doctor, output, transfer
from commands.output import Room, as_json
from config import Settings
from ops import cleanup

admin_token = Room("admin-token", help="The operator's token.")

file_argument = click.argument("file", type=click.Path(path_type=Path))


@admin_token.command("show")
def show_admin_token() -> None:
    """Print the admin token."""
    settings = config.settings()
    click.echo(settings.admin_token or auth.read_admin_token(_admin_token_file(settings)))


@admin_token.command("rotate")
def rotate_admin_token() -> None:
    """Make a new admin token; a running server takes it at once, and the old one no more."""
    settings = config.settings()
    if settings.admin_token:
        raise click.ClickException(
            "The admin token is what LANYARD_ADMIN_TOKEN says: change it there, and restart the server."
        )
    file = _admin_token_file(settings)
    auth.rotate_admin_token(file)
    output.note(f"The new admin token is in {file}. The old one is dead.")


@click.command("backup")
@file_argument
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@as_json
def back_up(file: Path, force: bool, as_json: bool) -> None:
    """Copy the database to FILE, a SQLite database, also while the server runs.

    FILE can be restored into SQLite and PostgreSQL. To move an instance, stop its server first. FILE has
    neither the admin token nor LANYARD_SECRET_KEY: keep them elsewhere.
    """
    settings = _settings()
    with _faults(), _bar("Copying") as progress:
        _module(settings).back_up(settings, file, overwrite=force, progress=progress)
    size = file.stat().st_size
    if as_json:
        output.show_json({"file": str(file.absolute()), "bytes": size})
    else:
        output.note(f"The database is in {file}: {size} bytes, checked.")


@click.command("restore")
@file_argument
@as_json
def restore(file: Path, as_json: bool) -> None:
    """Restore FILE, a backup of SQLite or PostgreSQL; stop the server first.

    A SQLite database that is there is kept beside the restored one; a PostgreSQL database must be new.
    """
    settings = _settings()
    with _faults(), _bar("Copying") as progress:
        kept = _module(settings).restore(settings, file, progress=progress)
    if as_json:
        output.show_json({"replaced": str(kept) if kept else None})
        return
    output.note(f"{settings.database_name} is restored from {file}.")
    if kept:
        output.note(f"The database that was there is kept as {kept}.")
    output.note(
        "Not in a backup, and to be set as on the old instance: the admin token"
        f" ({auth.admin_token_file(settings)} or LANYARD_ADMIN_TOKEN), LANYARD_SECRET_KEY if it had one,"
        f" LANYARD_ISSUER (here {settings.issuer}) and LANYARD_AUDIENCE."
    )


@click.command("purge")
@click.option("--vacuum", is_flag=True, help="Shrink the file too: for its time, writers wait.")
@as_json
@with_appcontext
def purge(vacuum: bool, as_json: bool) -> None:
    """Delete all that has expired, now; the server does so by and by."""
    if vacuum and not config.settings().uses_sqlite:
        raise click.ClickException("PostgreSQL looks after its files by itself: leave --vacuum out.")
    deleted: Counter[str] = Counter()
    with output.progress("Deleting", cleanup.count_expired()) as bar:
        for batch in cleanup.purge():
            deleted.update(batch)
            bar.update(sum(batch.values()))
    if vacuum:
        with _faults():
            _vacuum(config.settings())
    if as_json:
        output.show_json({"deleted": deleted, "total": deleted.total()})
        return
    rows = [{"table": name, "rows": count} for name, count in sorted(deleted.items()) if count]
    if rows:
        output.show_table({"TABLE": lambda row: row["table"], "DELETED": lambda row: row["rows"]}, rows)
    output.note(f"Deleted {deleted.total()} rows.")


@click.command("doctor")
@as_json
def examine(as_json: bool) -> None:
    """Look whether all is well, and say what to do if not; exit code 1 if anything fails."""
    findings = doctor.examine(config.settings() if has_app_context() else None)
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            click.echo(f"{finding.level:<6}{finding.subject:<14}{finding.text}")
    if as_json:
        output.show_json([finding._asdict() for finding in found])
    if any(finding.level == doctor.FAIL for finding in found):
        raise click.exceptions.Exit(1)


COMMANDS: Sequence[click.Command] = (admin_token, back_up, restore, purge, examine)


def _module(settings: Settings) -> ModuleType:
    return backup if settings.uses_sqlite else transfer


def _admin_token_file(settings: Settings) -> Path:
    file = auth.admin_token_file(settings)
    if not file.exists():
        raise click.ClickException(f"There is no {file}: LANYARD_INSTANCE must be a server's, started once.")
    return file


def _settings() -> Settings:
    """The app's; a command that must work without a sound database has no app."""
    return config.settings() if has_app_context() else Settings.from_env()


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except backup.BackupError as error:
        raise click.ClickException(str(error)) from None
    except (OSError, sqlite3.OperationalError) as error:
        raise click.ClickException(f"{error}.") from None


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with output.progress(label) as bar:

        def tell(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield tell


def _vacuum(settings: Settings) -> None:
    connection: Any
    with closing(sqlite3.connect(settings.database_file, timeout=30, isolation_level=None)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
