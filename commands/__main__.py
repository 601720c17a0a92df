"""`./lanyard`: the operator's commands, some of which work without a database or with a damaged one."""

from __future__ import annotations

import io
import os
import pkgutil
import shlex
import sys
from typing import IO, Any

import click

# Where each command is, and its line in the help, which is shown without importing the server's modules.
COMMANDS = {
    "admin-token": ("commands.instance:admin_token_group", "Show or replace the operator's token."),
    "agents": ("commands.resources:agents_group", "Manage agents."),
    "backup": ("commands.instance:back_up", "Copy the database to a file, also while the server runs."),
    "doctor": ("commands.instance:examine", "Check the instance, and say how to repair it."),
    "events": ("commands.resources:events_group", "Print the audit log."),
    "keys": ("commands.resources:keys_group", "List and rotate signing keys."),
    "purge": ("commands.instance:purge", "Delete all expired rows now."),
    "restore": ("commands.instance:restore", "Restore a backup; stop the server first."),
    "webhooks": ("commands.resources:webhooks_group", "List webhooks and their deliveries."),
}


class LazyGroup(click.Group):
    """Import a command's module only when the command is run, and report errors as click does."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return pkgutil.resolve_name(COMMANDS[name][0]) if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        from commands.output import reported_errors

        with reported_errors():
            return super().invoke(ctx)


def _print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from config import VERSION

        click.echo(f"Lanyard, version {VERSION}")
        ctx.exit()


def _read_env_file(ctx: click.Context, option: click.Parameter, file: IO[str] | None) -> None:
    """Take over the LANYARD_* variables of a file in the form of systemd's EnvironmentFile."""
    for line in file or ():
        name, is_set, value = line.strip().removeprefix("export ").partition("=")
        if is_set and name.startswith("LANYARD_"):
            try:
                os.environ[name] = " ".join(shlex.split(value))
            except ValueError:
                raise click.BadParameter(f"{name} has a quote that is not closed.") from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version)
@click.option(
    "--env-file",
    type=click.File(),
    is_eager=True,
    expose_value=False,
    callback=_read_env_file,
    help="Read the server's LANYARD_* settings from this file.",
)
@click.pass_context
def lanyard(ctx: click.Context) -> None:
    """Manage Lanyard. The commands read the same LANYARD_* settings as the server."""
    from flask.cli import ScriptInfo

    # The app is made by the first command that needs it: backup, restore and doctor work without.
    ctx.obj = ctx.obj or ScriptInfo(
        create_app=lambda: pkgutil.resolve_name("app:create_app")(), set_debug_flag=False
    )


def _replace_what_cannot_be_shown() -> None:
    """Print a question mark for each character that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None when it is closed
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    _replace_what_cannot_be_shown()
    lanyard(prog_name="lanyard")
