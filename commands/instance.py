"""The operator's commands for the instance: admin token, backup, restore, purge, doctor."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import click
from flask.cli import AppGroup, with_appcontext

import auth
import config
from commands import backup, doctor, output, transfer
from commands.output import as_json
from config import Settings
from models import db
from ops import cleanup

admin_token_group = AppGroup("admin-token", help="Show or replace the operator's token.")

file_argument = click.argument("file", type=click.Path(path_type=Path))


@admin_token_group.command("show")
def show_admin_token() -> None:
    """Print the admin token."""
    settings = config.settings()
    click.echo(settings.admin_token or auth.read_admin_token(_admin_token_file(settings)))


@admin_token_group.command("rotate")
def rotate_admin_token() -> None:
    """Make a new admin token; a running server uses it at once, and refuses the old one."""
    settings = config.settings()
    if settings.admin_token:
        raise click.ClickException(
            "The admin token is set by LANYARD_ADMIN_TOKEN: change it there, and restart the server."
        )
    file = _admin_token_file(settings)
    auth.write_admin_token(file)
    output.note(f"The new admin token is in {file}. The old one is no longer valid.")


def _admin_token_file(settings: Settings) -> Path:
    file = auth.admin_token_file(settings)
    if not file.exists():
        raise click.ClickException(f"There is no {file}: LANYARD_INSTANCE must be a server's, started once.")
    return file


@click.command("backup")
@file_argument
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@as_json
def back_up(file: Path, force: bool, as_json: bool) -> None:
    """Copy the database to FILE, a SQLite database, also while the server runs.

    FILE can be restored into SQLite and PostgreSQL. To move an instance, stop its server first. FILE has
    neither the admin token nor LANYARD_SECRET_KEY: store them elsewhere.
    """
    settings = Settings.from_env()
    settings.check_same_database()
    with output.progress("Copying") as progress:
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

    A SQLite database that exists is renamed, not deleted; a PostgreSQL database must be new.
    """
    settings = Settings.from_env()
    with output.progress("Copying") as progress:
        replaced = _module(settings).restore(settings, file, progress=progress)
    if as_json:
        output.show_json({"replaced": str(replaced) if replaced else None})
        return
    output.note(f"{settings.database_name} is restored from {file}.")
    if replaced:
        output.note(f"The replaced database is now {replaced}.")
    output.note(
        "Not in a backup, and to be set as on the old instance: the admin token"
        f" ({auth.admin_token_file(settings)} or LANYARD_ADMIN_TOKEN), LANYARD_SECRET_KEY if it had one,"
        f" LANYARD_ISSUER (here {settings.issuer}) and LANYARD_AUDIENCE."
    )


def _module(settings: Settings) -> ModuleType:
    return backup if settings.uses_sqlite else transfer


@click.command("purge")
@click.option("--vacuum", is_flag=True, help="Shrink the file too; writers wait meanwhile.")
@as_json
@with_appcontext
def purge(vacuum: bool, as_json: bool) -> None:
    """Delete all expired rows now, which the server does in small batches over time."""
    settings = config.settings()
    if vacuum and not settings.uses_sqlite:
        raise click.ClickException("PostgreSQL vacuums its files itself: omit --vacuum.")
    deleted = cleanup.purge()
    if vacuum:
        with db.engine.connect() as connection:
            for statement in ("PRAGMA busy_timeout = 30000", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                connection.exec_driver_sql(statement)
    if as_json:
        output.show_json({"deleted": deleted, "total": deleted.total()})
        return
    if rows := [{"table": name, "rows": count} for name, count in sorted(deleted.items()) if count]:
        output.show_table({"TABLE": "table", "DELETED": "rows"}, rows)
    output.note(f"Deleted {deleted.total()} rows.")


@click.command("doctor")
@as_json
def examine(as_json: bool) -> None:
    """Check the instance, and say how to repair it; exit code 1 if a check fails."""
    findings = []
    for finding in doctor.examine():
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.level:<6}{finding.subject:<14}{finding.text}")
    if as_json:
        output.show_json([finding._asdict() for finding in findings])
    if any(finding.level == doctor.FAIL for finding in findings):
        raise click.exceptions.Exit(1)
