"""What `./lanyard` runs: the operator's commands, also where there is no database yet, or a broken one."""

from __future__ import annotations

import click
from flask.cli import ScriptInfo

import cli
from app import create_app
from config import VERSION


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="Lanyard")
@click.pass_context
def lanyard(context: click.Context) -> None:
    """Look after Lanyard. The commands read the same LANYARD_* settings as the server."""
    # Made by the first command that needs it: some must work without.
    context.obj = ScriptInfo(create_app=create_app, set_debug_flag=False)


for command in cli.COMMANDS:
    lanyard.add_command(command)


if __name__ == "__main__":
    lanyard(prog_name="lanyard")
