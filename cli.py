"""The operator's commands: `flask --app app …`."""

from __future__ import annotations

import click
from flask import Flask
from flask.cli import AppGroup

import keys
from models import writing

signing_keys = AppGroup("keys", help="Signing keys: list them, rotate them.")


def init_app(app: Flask) -> None:
    """Add the commands to Flask's own."""
    app.cli.add_command(signing_keys)


@signing_keys.command("list")
def list_keys() -> None:
    """Every signing key, newest first, and where it is in its life."""
    row = "{:<45}{:<11}{:<7}{:<22}{:<22}{}"
    click.echo(row.format("KID", "STATE", "ALG", "PUBLISHED", "SIGNS FROM", "GONE AT"))
    for key in keys.list_keys():
        moments = (key.created_at, key.signs_from, key.gone_at)
        shown = [f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment else "-" for moment in moments]
        click.echo(row.format(key.kid, key.state, key.alg, *shown))


@signing_keys.command("rotate")
@click.option("--now", is_flag=True, help="For a leaked key: sign with the new one at once, end all tokens.")
def rotate_key(now: bool) -> None:
    """Publish a new key; it signs once every verifier can know it."""
    with writing():
        key = keys.rotate(at_once=now)
    click.echo(f"Key {key.kid} signs from {key.signs_from:%Y-%m-%dT%H:%M:%SZ}.")
