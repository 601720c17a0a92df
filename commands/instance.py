"""The operator's commands that look after the instance: admin token, backup, export, purge, doctor."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
from flask import has_app_context
from flask.cli import with_appcontext

import auth
import config
from commands import backup, doctor, output
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
    """Copy the database into FILE, also while the server runs.

    Neither the admin token nor LANYARD_SECRET_KEY is in it: keep them elsewhere.
    """
    with _faults(), _bar("Copying") as tell:
        backup.back_up(_settings(), file, overwrite=force, progress=tell)
    size = file.stat().st_size
    if as_json:
        output.show_json({"file": str(file.absolute()), "bytes": size})
    else:
        output.note(f"The database is in {file}: {size} bytes, checked.")


@click.command("restore")
@file_argument
@as_json
def restore(file: Path, as_json: bool) -> None:
    """Put the database in FILE, a backup, in the place of the instance's; stop the server first."""
    with _faults(), _bar("Copying") as tell:
        kept = backup.restore(_settings(), file, progress=tell)
    if as_json:
        output.show_json({"replaced": str(kept) if kept else None})
        return
    output.note(f"Restored {file}.")
    if kept:
        output.note(f"The database that was there is kept as {kept}.")


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
