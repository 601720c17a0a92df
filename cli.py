"""The operator's commands: `flask --app app …`."""

from __future__ import annotations

import json
import time

import click
import sqlalchemy as sa
from flask import Flask
from flask.cli import AppGroup

import keys
import schemas
from database import writing
from models import Event, db

signing_keys = AppGroup("keys", help="Signing keys: list them, rotate them.")


event_log = AppGroup("events", help="What happened.")


def init_app(app: Flask) -> None:
    """Add the commands to Flask's own."""
    app.cli.add_command(signing_keys)
    app.cli.add_command(event_log)


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
@click.option(
    "--now", is_flag=True, help="For a leaked key: sign with the new one at once, end all access tokens."
)
def rotate_key(now: bool) -> None:
    """Publish a new key; it signs once every verifier can know it."""
    with writing():
        keys.rotate(at_once=now)
    key = keys.list_keys()[0]
    click.echo(f"Key {key.kid} signs from {key.signs_from:%Y-%m-%dT%H:%M:%SZ}.")


@event_log.command("tail")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many of the past to begin with.",
)
@click.option("--follow/--no-follow", default=True, help="Wait for what happens next.")
def tail_events(lines: int, follow: bool) -> None:
    """Print events as they happen, one JSON object a line, oldest first."""
    schema = schemas.Event()
    newest = sa.select(Event).order_by(Event.pk.desc()).limit(lines)
    seen = db.session.scalar(sa.select(sa.func.max(Event.pk))) or 0
    for event in reversed(db.session.scalars(newest).all()):
        click.echo(json.dumps(schema.dump(event)))
    while follow:
        db.session.rollback()
        for event in db.session.scalars(sa.select(Event).where(Event.pk > seen).order_by(Event.pk)):
            click.echo(json.dumps(schema.dump(event)))
            seen = event.pk
        time.sleep(1)
