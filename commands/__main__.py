"""What `./lanyard` runs: the operator's commands, also where there is no database yet, or a broken one."""

from __future__ import annotations

from typing import Any

import click
from flask.cli import ScriptInfo
from sqlalchemy.exc import DBAPIError

from app import create_app
from commands import resources
from config import VERSION
from database import error_text


class Commands(click.Group):
    """The commands: what the database complains of is told in one sentence."""

    def invoke(self, context: click.Context) -> Any:
        """click's hook."""
        try:
            return super().invoke(context)
        except DBAPIError as error:
            raise click.ClickException(f"The database: {error_text(error)}.") from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="Lanyard")
@click.pass_context
def lanyard(context: click.Context) -> None:
    """Look after Lanyard. The commands read the same LANYARD_* settings as the server."""
    # The app is made by the first command that needs it: some must work without.
    context.obj = context.obj or ScriptInfo(create_app=create_app, set_debug_flag=False)


for command in resources.COMMANDS:
    lanyard.add_command(command)


if __name__ == "__main__":
    lanyard(prog_name="lanyard")
