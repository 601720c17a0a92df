"""The operator's commands for agents, webhooks, signing keys and events."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

import agents
import credentials
import keys
import schemas
from api import Problem, parse_json
from commands import instance, output
from commands.output import Room, as_json
from database import error_text, is_transient, reading, writing
from models import Agent, Event
from webhooks import routes as webhooks

FOLLOW_EVERY = 1.0  # seconds between looks for new events
BEHIND = 1000  # numbers: on PostgreSQL an event that took its own first may be committed after others

agent_room = Room("agents", help="Agents: list, show, create, rotate, switch off and on, delete.")
webhook_room = Room("webhooks", help="Webhooks, and what became of their deliveries.")
signing_keys = Room("keys", help="Signing keys: list them, rotate them.")
event_log = Room("events", help="What happened.")

COMMANDS: Sequence[click.Command] = (agent_room, webhook_room, signing_keys, event_log, *instance.COMMANDS)

AGENT_COLUMNS: output.Columns = {
    "NAME": lambda agent: output.shortened(agent["name"]),
    "CLIENT ID": lambda agent: agent["client_id"],
    "STATE": lambda agent: _on_or_off(agent),
    "LAST ACTIVE": lambda agent: agent["last_activity_at"],
    "SCOPES": lambda agent: agent["scopes"],
}
WEBHOOK_COLUMNS: output.Columns = {
    "ID": lambda webhook: webhook["id"],
    "NAME": lambda webhook: output.shortened(webhook["name"]),
    "STATE": lambda webhook: _on_or_off(webhook),
    "EVENTS": lambda webhook: webhook["events"],
    "URL": lambda webhook: webhook["url"],
}
DELIVERY_COLUMNS: output.Columns = {
    "ID": lambda delivery: delivery["id"],
    "TYPE": lambda delivery: delivery["type"],
    "STATUS": lambda delivery: delivery["status"],
    "TRIES": lambda delivery: delivery["attempts"],
    "CREATED": lambda delivery: delivery["created_at"],
    "ANSWER": lambda delivery: delivery["response_status"] or delivery["error"],
}
KEY_COLUMNS: output.Columns = {
    "KID": lambda key: key["kid"],
    "STATE": lambda key: key["state"],
    "ALG": lambda key: key["alg"],
    "PUBLISHED": lambda key: key["created_at"],
    "SIGNS FROM": lambda key: key["signs_from"],
    "GONE AT": lambda key: key["gone_at"],
}

named_agent = click.argument("agent", metavar="AGENT")


@agent_room.command("list")
@click.option("--active", "is_active", flag_value="true", help="Only those that may get tokens.")
@click.option("--inactive", "is_active", flag_value="false", help="Only those switched off or expired.")
@click.option("--scope", help="Only those that have this scope.")
@click.option("--owner", help="Only this owner's.")
@click.option("--stale-days", metavar="N", help="Only those idle for so many days.")
@click.option("--query", "-q", "q", help="Only those with this in name, description or owner, or client id.")
@output.paged
def list_agents(everything: bool, as_json: bool, **filters: str | None) -> None:
    """Agents, newest first."""
    query = output.load(schemas.AgentQuery(), filters)
    answer = schemas.AgentPage()
    output.show_pages(agents.page, query, answer, AGENT_COLUMNS, everything=everything, as_json=as_json)


@agent_room.command("show")
@named_agent
@as_json
def show_agent(agent: str, as_json: bool) -> None:
    """One agent, named by its id or its client id."""
    with reading() as connection:
        found = agents.find(connection, _id_of(agent))
    _show_agent({"agent": found}, as_json)


def _parse_metadata(
    ctx: click.Context, option: click.Parameter, given: Sequence[str]
) -> dict[str, str] | None:
    pairs = dict(text.split("=", 1) for text in given if "=" in text)
    if len(pairs) < len(given):
        raise click.BadParameter("Give name=value, each name once.")
    return pairs or None


def _parse_jwks(ctx: click.Context, option: click.Parameter, given: Path | None) -> Any:
    try:
        return parse_json(given.read_bytes()) if given else None
    except ValueError as error:
        raise click.BadParameter(str(error).replace("The body", "The file")) from None


def _none_if_empty(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> list[str] | None:
    return list(given) or None


@agent_room.command("create")
@click.option("--name", help="What it is called.")
@click.option("--scope", "scopes", multiple=True, callback=_none_if_empty, help="It may have; may repeat.")
@click.option("--expires-in", type=int, metavar="SECONDS", help="Until it expires.  [default: never]")
@click.option("--owner", help="Who answers for it.")
@click.option("--description", help="What it is for.")
@click.option(
    "--audience",
    "audiences",
    multiple=True,
    callback=_none_if_empty,
    help="A resource it may name; may repeat.",
)
@click.option("--token-ttl", type=int, metavar="SECONDS", help="How long its access tokens live.")
@click.option("--rate-limit", type=int, metavar="N", help="Tokens it may get in a minute.")
@click.option("--metadata", multiple=True, callback=_parse_metadata, metavar="NAME=VALUE", help="May repeat.")
@click.option(
    "--jwks",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_parse_jwks,
    help="File of its public keys, a JWK set.",
)
@click.option(
    "--auth-method",
    "token_endpoint_auth_method",
    help="How it signs in.  [default: private_key_jwt with --jwks, else client_secret_basic]",
)
@as_json
def create_agent(as_json: bool, **given: Any) -> None:
    """Register an agent; its client secret is shown this once."""
    if given["jwks"] is not None and given["token_endpoint_auth_method"] is None:
        given["token_endpoint_auth_method"] = "private_key_jwt"
    created = schemas.AgentCreated().dump(agents.create(output.load(schemas.AgentCreate(), given)))
    if as_json:
        output.show_json(created)
        return
    output.show_fields({"id": created["agent"]["id"], **{k: v for k, v in created.items() if k != "agent"}})
    if "client_secret" in created:
        output.note("The secret is shown this once: only its hash is kept.")


@agent_room.command("rotate")
@named_agent
@click.option(
    "--grace-period", type=int, metavar="SECONDS", help="How long the old secret works on, up to a day."
)
@click.option("--revoke-tokens", is_flag=True, help="End every token of the agent: for a leak.")
@as_json
def rotate_agent(agent: str, as_json: bool, **given: Any) -> None:
    """Give an agent a new client secret, and print it."""
    fields = output.load(schemas.Rotate(), given)
    rotated = schemas.Rotated().dump(agents.rotate(_id_of(agent), **fields))
    if as_json:
        output.show_json(rotated)
    else:
        click.echo(rotated["client_secret"])


@agent_room.command("deactivate")
@named_agent
@as_json
def deactivate_agent(agent: str, as_json: bool) -> None:
    """Switch an agent off, and end its tokens: the kill switch."""
    _show_agent(agents.deactivate(_id_of(agent)), as_json)


@agent_room.command("reactivate")
@named_agent
@as_json
def reactivate_agent(agent: str, as_json: bool) -> None:
    """Switch an agent on again, without its old tokens."""
    _show_agent(agents.reactivate(_id_of(agent)), as_json)


@agent_room.command("delete")
@named_agent
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


@webhook_room.command("list")
@as_json
def list_webhooks(as_json: bool) -> None:
    """All webhooks, newest first."""
    document = schemas.WebhookList().dump(webhooks.list_all())
    _show_list(document, WEBHOOK_COLUMNS, as_json)


@webhook_room.command("deliveries")
@click.argument("webhook", metavar="WEBHOOK")
@click.option("--status", help="Only those that are pending, retrying, delivered or dead.")
@output.paged
def list_deliveries(webhook: str, everything: bool, as_json: bool, **filters: str | None) -> None:
    """What became of each event for a webhook, newest first."""
    query = output.load(schemas.DeliveryQuery(), filters)
    page = partial(webhooks.page, webhook)
    answer = schemas.DeliveryPage()
    output.show_pages(page, query, answer, DELIVERY_COLUMNS, everything=everything, as_json=as_json)


@webhook_room.command("redeliver")
@click.argument("webhook", metavar="WEBHOOK")
@click.argument("delivery", metavar="DELIVERY")
@as_json
def redeliver(webhook: str, delivery: str, as_json: bool) -> None:
    """Send a delivery again from the start, under the same id."""
    document = schemas.DeliveryResponse().dump(webhooks.make_due(webhook, delivery))
    _show_one(document, "delivery", as_json)


@signing_keys.command("list")
@as_json
def list_keys(as_json: bool) -> None:
    """Every signing key, newest first, and where it is in its life."""
    with reading() as connection:
        document = schemas.KeyList().dump({"keys": keys.list_keys(connection)})
    _show_list(document, KEY_COLUMNS, as_json)


@signing_keys.command("rotate")
@click.option(
    "--now", is_flag=True, help="For a leaked key: sign with the new one at once, end all access tokens."
)
@as_json
def rotate_key(now: bool, as_json: bool) -> None:
    """Publish a new key; it signs once every verifier can know it."""
    with writing() as connection:
        keys.rotate(connection, at_once=now)
        document = schemas.KeyResponse().dump({"key": keys.list_keys(connection)[0]})
    if as_json:
        output.show_json(document)
    else:
        click.echo("Key {kid} signs from {signs_from}.".format(**document["key"]))


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
    try:
        _tail(lines, follow)
    except KeyboardInterrupt:
        pass  # how one stops looking on
    except BrokenPipeError:
        # Python flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tail(lines: int, follow: bool) -> None:
    schema = schemas.Event()
    with reading() as connection:
        newest = connection.execute(sa.select(Event).order_by(Event.pk.desc()).limit(lines)).all()
        seen = connection.scalar(sa.select(sa.func.max(Event.pk))) or 0
        shown = set(connection.scalars(sa.select(Event.pk).where(Event.pk > seen - BEHIND)))
    for event in reversed(newest):
        click.echo(json.dumps(schema.dump(event)))
        shown.add(event.pk)
    while follow and not _reader_leaves_within(FOLLOW_EVERY):
        for event in _new_events(seen - BEHIND, shown):
            click.echo(json.dumps(schema.dump(event)))
            shown.add(event.pk)
        seen = max([seen, *shown])
        shown = {pk for pk in shown if pk > seen - BEHIND}


def _new_events(pk: int, shown: set[int]) -> Sequence[Any]:
    """Events numbered above `pk` but for those, oldest first; none while the database does not answer."""
    new = sa.select(Event).where(Event.pk > pk, Event.pk.not_in(shown)).order_by(Event.pk)
    try:
        with reading() as connection:
            return connection.execute(new).all()
    except DBAPIError as error:
        if not is_transient(error):
            raise
        output.note(f"The database does not answer: {error_text(error)}.")
        return []


def _reader_leaves_within(seconds: float) -> bool:
    """Wait so long, or until standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone, which a closed pipe is one of
    return bool(poll.poll(seconds * 1000))


def _id_of(agent: str) -> str:
    """An agent's id, when it is named by its client id; else what was given."""
    if not credentials.is_client_id(agent):
        return agent
    with reading() as connection:
        found = connection.scalar(sa.select(Agent.id).where(Agent.client_id == agent))
    if found is None:
        raise Problem(404, "not_found", "No agent has this client id.")
    return found


def _on_or_off(row: dict[str, Any]) -> str:
    return "active" if row["is_active"] else "off"


def _show_agent(answer: dict[str, Any], as_json: bool) -> None:
    _show_one(schemas.AgentResponse().dump(answer), "agent", as_json)


def _show_one(document: Any, name: str, as_json: bool) -> None:
    if as_json:
        output.show_json(document)
    else:
        output.show_fields(document[name])


def _show_list(document: Any, columns: output.Columns, as_json: bool) -> None:
    if as_json:
        output.show_json(document)
        return
    (rows,) = document.values()
    output.show_table(columns, rows)
