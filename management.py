"""The operator's routes beside agents: signing keys, and the log of events."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

import bearer
import keys
import schemas
from api import OPERATOR, Blueprint
from database import newest_page, writing
from models import Event

keys_room = Blueprint(
    "keys", __name__, url_prefix="/api/keys", description="Signing keys (management)", security=OPERATOR
)
keys_room.before_request(bearer.require_operator)


@keys_room.get("")
@keys_room.response(200, schemas.KeyList)
def list_keys() -> dict[str, Any]:
    """List the signing keys, newest first."""
    return {"keys": keys.list_keys()}


@keys_room.post("/rotate")
@keys_room.arguments(schemas.KeyRotation)
@keys_room.response(200, schemas.KeyAnswer)
def rotate_key(fields: dict[str, Any]) -> dict[str, Any]:
    """Make a new signing key.

    It is published first and signs when every verifier can know it. With `now` it signs at once.
    """
    with writing():
        keys.rotate(at_once=fields["now"])
        newest = keys.list_keys()[0]
    return {"key": newest}


event_log = Blueprint(
    "events", __name__, url_prefix="/api/events", description="Audit log (management)", security=OPERATOR
)
event_log.before_request(bearer.require_operator)


@event_log.get("")
@event_log.arguments(schemas.EventQuery, location="query")
@event_log.response(200, schemas.EventPage)
def list_events(query: dict[str, Any]) -> dict[str, Any]:
    """List events, newest first."""
    statement = sa.select(Event)
    if query["agent_id"] is not None:
        statement = statement.where(Event.agent_id == query["agent_id"])
    if query["type"] is not None:
        group = query["type"].removesuffix("*")
        exactly = group == query["type"]
        statement = statement.where(Event.type == group if exactly else Event.type.startswith(group))
    page, following = newest_page(statement, Event.pk, query)
    return {"events": page, "next": following}
