"""The audit log and the webhook outbox, written in the transaction of the change; counters for `/metrics`."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from functools import partial
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response, g, has_request_context, request
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from sqlalchemy.exc import SQLAlchemyError

import schemas
from api import BY_OPERATOR, Blueprint
from database import is_transient, newest_page, reading, writing
from models import Delivery, Event, Number, Timestamp, Webhook, has_word, new_id, now

OPERATOR = "admin"
NOBODY = "anonymous"

# Request ids are logged and stored: a secret sent as one by mistake is replaced.
_REQUEST_ID = re.compile(r"(?!cs_|rt_|whsec_)[A-Za-z0-9._-]{1,64}")
_INSERT = sa.insert(Event).returning(Event.pk)
# One row for each webhook that subscribes to the event, in the same transaction.
_OUTBOX = sa.insert(Delivery).from_select(
    ["webhook_pk", "event_pk", "status", "attempts", "created_at", "next_attempt_at"],
    sa.select(
        Webhook.pk,
        sa.bindparam("event", type_=Number),
        sa.literal("pending"),
        sa.literal(0),
        sa.bindparam("now", type_=Timestamp),
        sa.bindparam("now", type_=Timestamp),
    ).where(
        Webhook.is_active,
        sa.or_(
            has_word(Webhook.events, "*"),
            has_word(Webhook.events, sa.bindparam("type")),
            has_word(Webhook.events, sa.bindparam("group")),
        ),
    ),
)

disable_created_metrics()  # multiprocess mode has none
REGISTRY = CollectorRegistry()  # the library's default holds metrics of one process
_counter = partial(Counter, registry=REGISTRY)
DURATION = Histogram(
    "lanyard_http_request_duration_seconds",
    "Requests, by how long they took to answer.",
    ["route", "method", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
_FAILED = "Requests whose authentication failed, by the first reason met."
_FAILURES = _counter("lanyard_auth_failures", _FAILED, ["reason"])
_ATTEMPTED = "Attempts at webhook deliveries, by the status they left the delivery in."
ATTEMPTS = _counter("lanyard_webhook_attempts", _ATTEMPTED, ["status"])
TOKENS_ISSUED = _counter("lanyard_tokens_issued", "Grants made for client credentials.")
TOKENS_REFRESHED = _counter("lanyard_tokens_refreshed", "Refresh tokens exchanged.")
TOKENS_REVOKED = _counter("lanyard_tokens_revoked", "Tokens ended by revocation.")
TOKENS_REUSED = _counter("lanyard_refresh_token_reuses", "Refresh tokens used twice, ending their grant.")
_REASONS = "wrong_secret unknown_client malformed assertion inactive_agent admin_token access_token throttled"
# A series that appears with its first event has no rate for that event: start each at 0.
for reason in _REASONS.split():
    _FAILURES.labels(reason)
for status in ("delivered", "retrying", "dead"):
    ATTEMPTS.labels(status)


class _Limiter:
    """Allow one event of a kind a minute, and one of any kind a second, in this process."""

    def __init__(self) -> None:
        self._last: OrderedDict[object, float] = OrderedDict()
        self._any = float("-inf")

    def allow(self, kind: object) -> bool:
        now = time.monotonic()
        if now < self._any + 1 or now < self._last.get(kind, float("-inf")) + 60:
            return False
        self._any = self._last[kind] = now
        self._last.move_to_end(kind)
        if len(self._last) > 1000:
            self._last.popitem(last=False)
        return True


_failures = _Limiter()


def init_app(app: Flask) -> None:
    """Give every request an id, the caller's own if it is valid, and return it in the response."""
    app.before_request(_assign_request_id)
    app.after_request(_return_request_id)


def record(
    connection: sa.Connection,
    type_: str,
    agent: Any = None,
    *,
    only_webhook: int | None = None,
    **data: Any,
) -> int:
    """Record an event in the caller's write transaction, and put it in the outbox; return its row number.

    :param agent: the agent concerned, an object with `id`, `name` and `client_id`.
    :param only_webhook: the row number of the one webhook to notify, whatever it subscribes to.
    :param data: further facts; never a secret, a hash or a token.
    """
    if agent is not None:
        data = {"agent_id": agent.id, "agent_name": agent.name, "client_id": agent.client_id, **data}
    moment = now()
    row = {
        "id": new_id("evt_"),
        "type": type_,
        "created_at": moment,
        "actor": OPERATOR,
        "agent_id": data.get("agent_id"),
        "address": None,
        "request_id": None,
        "data": data,
    }
    if has_request_context():
        row |= {"actor": g.get("actor", NOBODY), "address": request.remote_addr, "request_id": g.request_id}
    event_pk: int = connection.execute(_INSERT, row).scalar_one()
    if only_webhook is not None:
        delivery = {"webhook_pk": only_webhook, "event_pk": event_pk}
        connection.execute(sa.insert(Delivery), {**delivery, "created_at": moment, "next_attempt_at": moment})
    else:
        group = f"{type_.partition('.')[0]}.*"
        connection.execute(_OUTBOX, {"event": event_pk, "now": moment, "type": type_, "group": group})
    return event_pk


def count_failure(reason: str | None, *, is_recorded: bool = False, client_id: str | None = None) -> None:
    """Count a failed authentication, of each request only the first; record some as `auth.failed`.

    :param reason: a label of the counter; None for a failure that is only recorded.
    :param is_recorded: record it, unless many fail: they must not fill the log.
    """
    if reason and not g.get("has_failed"):
        g.has_failed = True
        _FAILURES.labels(reason).inc()
    if is_recorded and _failures.allow((client_id, request.remote_addr)):
        data: dict[str, Any] = {"client_id": client_id} if client_id else {}
        try:
            with writing(durable=False, exclusive=False) as connection:
                record(connection, "auth.failed", **data)
        except SQLAlchemyError as error:
            # A locked database must not turn a refusal into another response.
            if not is_transient(error):
                raise


def set_caller(actor: str, client_id: str | None = None) -> None:
    """Set the caller of this request, for events and the access log: `admin`, or an agent's id."""
    g.actor, g.client_id = actor, client_id


def _assign_request_id() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req_")


def _return_request_id(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
    return response


bp = Blueprint(
    "events", __name__, url_prefix="/api/events", description="Audit log (management)", security=BY_OPERATOR
)


@bp.get("")
@bp.arguments(schemas.EventQuery, location="query")
@bp.response(200, schemas.EventPage)
def list_events(query: dict[str, Any]) -> dict[str, Any]:
    """List events, newest first."""
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
