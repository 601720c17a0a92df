"""The operator's commands for agents, webhooks, signing keys and events."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import IO, Any

import click
import sqlalchemy as sa
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError

import agents
import credentials
import keys
import schemas
from api import Problem, parse_json
from commands import output
from commands.output import as_json
from database import error_text, is_transient, reading
from models import Agent, Event
from webhooks import routes as webhooks

FOLLOW_EVERY = 1.0  # seconds between queries for new events
BEHIND = 1000  # numbers: on PostgreSQL, an event may be committed after others with higher numbers

agents_group = AppGroup("agents", help="List, show, create, rotate, deactivate and delete agents.")
webhooks_group = AppGroup("webhooks", help="List webhooks and their deliveries; send a delivery again.")
keys_group = AppGroup("keys", help="List and rotate signing keys.")
events_group = AppGroup("events", help="Print the audit log.")

NAME_COLUMN: output.Columns = {"NAME": lambda row: output.shortened(row["name"])}
STATE_COLUMN: output.Columns = {"STATE": lambda row: "active" if row["is_active"] else "off"}
AGENT_COLUMNS: output.Columns = {
    **NAME_COLUMN,
    "CLIENT ID": "client_id",
    **STATE_COLUMN,
    "LAST ACTIVE": "last_activity_at",
    "SCOPES": "scopes",
}
WEBHOOK_COLUMNS: output.Columns = {
    "ID": "id",
    **NAME_COLUMN,
    **STATE_COLUMN,
    "EVENTS": "events",
    "URL": "url",
}
DELIVERY_COLUMNS: output.Columns = {
    "ID": "id",
    "TYPE": "type",
    "STATUS": "status",
    "TRIES": "attempts",
    "CREATED": "created_at",
    "ANSWER": lambda delivery: delivery["response_status"] or delivery["error"],
}
KEY_COLUMNS: output.Columns = {
    "KID": "kid",
    "STATE": "state",
    "ALG": "alg",
    "PUBLISHED": "created_at",
    "SIGNS FROM": "signs_from",
    "GONE AT": "gone_at",
}

agent_argument = click.argument("agent", metavar="AGENT")
webhook_argument = click.argument("webhook", metavar="WEBHOOK")


@agents_group.command("list")
@click.option("--active", "is_active", flag_value="true", help="Only agents that may get tokens.")
@click.option("--inactive", "is_active", flag_value="false", help="Only deactivated or expired agents.")
@click.option("--scope", help="Only agents with this scope.")
@click.option("--owner", help="Only agents of this owner.")
@click.option("--stale-days", metavar="N", help="Only agents not used for N days.")
@click.option("--query", "-q", "q", help="Only agents with this in name, description, owner or client id.")
@output.paged
def list_agents(**options: Any) -> None:
    """List agents, newest first."""
    output.show_pages(agents.page, schemas.AgentQuery(), schemas.AgentPage(), AGENT_COLUMNS, **options)


@agents_group.command("show")
@agent_argument
@as_json
def show_agent(agent: str, as_json: bool) -> None:
    """Show an agent, named by its id or its client id."""
    with reading() as connection:
        document = schemas.AgentResponse().dump({"agent": agents.find(connection, _id_of(agent))})
    output.show(document, as_json)


def _split_scopes(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> tuple[str, ...]:
    return tuple(scope.strip() for text in given for scope in text.split(","))


def _parse_metadata(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    pairs = dict(text.split("=", 1) for text in given if "=" in text)
    if len(pairs) < len(given):
        raise click.BadParameter("Give name=value, each name once.")
    return pairs


def _parse_jwks(ctx: click.Context, option: click.Parameter, file: IO[bytes] | None) -> Any:
    if file is None:
        return None
    try:
        with file:
            return parse_json(file.read())
    except ValueError as error:
        raise click.BadParameter(str(error).replace("The body", "The file")) from None


@agents_group.command("create")
@click.option("--name", help="Name of the agent.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    callback=_split_scopes,
    help="Scopes that it may have, separated by commas; may repeat.",
)
@click.option("--expires-in", type=int, metavar="SECONDS", help="Until it expires.  [default: never]")
@click.option("--owner", help="Who is responsible for it.")
@click.option("--description", help="What it is for.")
@click.option("--audience", "audiences", multiple=True, help="Resource that it may name; may repeat.")
@click.option("--token-ttl", type=int, metavar="SECONDS", help="Lifetime of its access tokens.")
@click.option("--rate-limit", type=int, metavar="N", help="Tokens and rotations in any 60 seconds.")
@click.option(
    "--require-client-auth-for-refresh",
    is_flag=True,
    default=None,
    help="A refresh token needs client credentials.",
)
@click.option("--metadata", multiple=True, callback=_parse_metadata, metavar="NAME=VALUE", help="May repeat.")
@click.option("--jwks", type=click.File("rb"), callback=_parse_jwks, help="File of its public JWK set.")
@click.option(
    "--auth-method",
    "token_endpoint_auth_method",
    help="Client authentication method.  [default: private_key_jwt with --jwks, else client_secret_basic]",
)
@as_json
def create_agent(as_json: bool, **given: Any) -> None:
    """Register an agent, and print its client secret, which is shown only once."""
    if given["jwks"] is not None and given["token_endpoint_auth_method"] is None:
        given["token_endpoint_auth_method"] = "private_key_jwt"
    created = schemas.AgentCreated().dump(agents.create(output.load(schemas.AgentCreate(), given)))
    if as_json:
        output.show_json(created)
        return
    output.show_fields({"id": created["agent"]["id"], **{k: v for k, v in created.items() if k != "agent"}})
    if "client_secret" in created:
        output.note("The secret is shown this once: only its hash is stored.")


@agents_group.command("rotate")
@agent_argument
@click.option(
    "--grace-period", type=int, metavar="SECONDS", help="How long the old secret stays valid, up to a day."
)
@click.option("--revoke-tokens", is_flag=True, help="Revoke all tokens of the agent, after a leak.")
@as_json
def rotate_agent(agent: str, as_json: bool, **given: Any) -> None:
    """Give an agent a new client secret, and print it."""
    fields = output.load(schemas.Rotate(), given)
    rotated = schemas.Rotated().dump(agents.rotate(_id_of(agent), **fields))
    if as_json:
        output.show_json(rotated)
    else:
        click.echo(rotated["client_secret"])


@agents_group.command("deactivate")
@agent_argument
@as_json
def deactivate_agent(agent: str, as_json: bool) -> None:
    """Deactivate an agent, and end all its tokens."""
    output.show(schemas.AgentResponse().dump(agents.deactivate(_id_of(agent))), as_json)


@agents_group.command("reactivate")
@agent_argument
@as_json
def reactivate_agent(agent: str, as_json: bool) -> None:
    """Reactivate an agent; its old tokens stay invalid."""
    output.show(schemas.AgentResponse().dump(agents.reactivate(_id_of(agent))), as_json)


@agents_group.command("delete")
@agent_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_agent(agent: str, yes: bool) -> None:
    """Delete an agent and all its tokens."""
    with reading() as connection:
        found = agents.find(connection, _id_of(agent))
    if not yes:
        question = f"Delete {output.printable(found.name)} ({found.client_id}) and all its tokens?"
        click.confirm(question, abort=True, err=True)
    agents.delete(found.id)
    output.note(f"Deleted {found.client_id}.")


@webhooks_group.command("list")
@as_json
def list_webhooks(as_json: bool) -> None:
    """List all webhooks, newest first."""
    document = schemas.WebhookList().dump(webhooks.list_all())
    output.show(document, as_json, WEBHOOK_COLUMNS)


@webhooks_group.command("deliveries")
@webhook_argument
@click.option("--status", help="Only deliveries that are pending, retrying, delivered or dead.")
@output.paged
def list_deliveries(webhook: str, **options: Any) -> None:
    """List the deliveries to a webhook, newest first."""
    page = partial(webhooks.page, webhook)
    output.show_pages(page, schemas.DeliveryQuery(), schemas.DeliveryPage(), DELIVERY_COLUMNS, **options)


@webhooks_group.command("redeliver")
@webhook_argument
@click.argument("delivery", metavar="DELIVERY")
@as_json
def redeliver(webhook: str, delivery: str, as_json: bool) -> None:
    """Send a delivery again, with the same id and all its retries."""
    output.show(schemas.DeliveryResponse().dump(webhooks.make_due(webhook, delivery)), as_json)


@keys_group.command("list")
@as_json
def list_keys(as_json: bool) -> None:
    """List all signing keys and their states, newest first."""
    with reading() as connection:
        document = schemas.KeyList().dump({"keys": keys.list_keys(connection)})
    output.show(document, as_json, KEY_COLUMNS)


@keys_group.command("rotate")
@click.option("--now", is_flag=True, help="Sign with the new key at once, and end all access tokens.")
@as_json
def rotate_key(now: bool, as_json: bool) -> None:
    """Publish a new key, which signs once every verifier has it; after a leak, use --now."""
    document = schemas.KeyResponse().dump(keys.publish_key(at_once=now))
    if as_json:
        output.show_json(document)
    else:
        click.echo("Key {kid} signs from {signs_from}.".format(**document["key"]))


@events_group.command("tail")
@click.option("--lines", "-n", type=click.IntRange(min=0), default=20, show_default=True, help="Past events.")
@click.option("--follow/--no-follow", default=True, help="Wait for new events.")
def tail_events(lines: int, follow: bool) -> None:
    """Print the last events, then new ones, as one JSON object a line, oldest first."""
    if follow:
        # Ctrl-C is the usual way to end it. As an exception it may be lost in a finalizer, which goes on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _tail(lines, follow)
    except BrokenPipeError:
        # Python flushes standard output once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tail(lines: int, follow: bool) -> None:
    schema = schemas.Event()
    with reading() as connection:
        newest = connection.execute(sa.select(Event).order_by(Event.pk.desc()).limit(lines)).all()
        last = connection.scalar(sa.select(sa.func.max(Event.pk))) or 0
        shown = set(connection.scalars(sa.select(Event.pk).where(Event.pk > last - BEHIND)))
    for event in reversed(newest):
        click.echo(json.dumps(schema.dump(event)))
        shown.add(event.pk)
    while follow and not _wait_for_closed_pipe(FOLLOW_EVERY):
        for event in _new_events(last - BEHIND, shown):
            click.echo(json.dumps(schema.dump(event)))
            shown.add(event.pk)
        last = max([last, *shown])
        shown = {pk for pk in shown if pk > last - BEHIND}


def _new_events(pk: int, shown: set[int]) -> Sequence[Any]:
    """Return events with numbers above `pk` that are not in `shown`; none while the database is down."""
    new = sa.select(Event).where(Event.pk > pk, Event.pk.not_in(shown)).order_by(Event.pk)
    try:
        with reading() as connection:
            return connection.execute(new).all()
    except DBAPIError as error:
        if not is_transient(error):
            raise
        output.note(f"The database does not answer: {error_text(error)}.")
        return []


def _wait_for_closed_pipe(seconds: float) -> bool:
    """Return True as soon as the reader of standard output has closed it, else False after the time."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors only; a closed pipe is one
    return bool(poll.poll(seconds * 1000))


def _id_of(agent: str) -> str:
    """Return the id of the agent with this client id, or the argument if it is not a client id."""
    if not credentials.is_client_id(agent):
        return agent
    with reading() as connection:
        found = connection.scalar(sa.select(Agent.id).where(Agent.client_id == agent))
    if found is None:
        raise Problem(404, "not_found", "No agent has this client id.")
    return found
