"""The operator's routes beside agents: signing keys, and the log of events."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

import bearer
import keys
import schemas
from database import newest_page, reading, writing
from models import Event
from wire import Blueprint

keys_room = Blueprint("keys", __name__, url_prefix="/api/keys", description="Signing keys (management)")
keys_room.before_request(bearer.require_operator)


@keys_room.get("")
@keys_room.response(200, schemas.KeyList)
def list_keys() -> dict[str, Any]:
    """The signing keys, newest first, and where each is in its life."""
    with reading() as connection:
        return {"keys": keys.list_keys(connection)}


@keys_room.post("/rotate")
@keys_room.arguments(schemas.KeyRotation)
@keys_room.response(200, schemas.KeyAnswer)
def rotate_key(fields: dict[str, Any]) -> dict[str, Any]:
    """Publish a new key, which signs once every verifier can know it; at once, for a leak, with `now`."""
    with writing() as connection:
        keys.rotate(connection, at_once=fields["now"])
        return {"key": keys.list_keys(connection)[0]}


event_log = Blueprint("events", __name__, url_prefix="/api/events", description="What happened (management)")
event_log.before_request(bearer.require_operator)


@event_log.get("")
@event_log.arguments(schemas.EventQuery, location="query")
@event_log.response(200, schemas.EventPage)
def list_events(query: dict[str, Any]) -> dict[str, Any]:
    """What happened, newest first; `next` is the `after` of the page that follows."""
    statement = sa.select(Event)
    if query["agent_id"] is not None:
        statement = statement.where(Event.agent_id == query["agent_id"])
    if query["type"] is not None:
        group = query["type"].removesuffix("*")
        exactly = group == query["type"]
        statement = statement.where(Event.type == group if exactly else Event.type.startswith(group))
    with reading() as connection:
        page, following = newest_page(connection, statement, Event.pk, query)
    return {"events": page, "next": following}
