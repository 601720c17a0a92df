"""The audit log and the webhook outbox, written in the transaction of the change; counters for `/metrics`."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import prometheus_client as prometheus
import sqlalchemy as sa
from flask import Flask, Response, after_this_request, current_app, g, has_request_context, request
from sqlalchemy.exc import SQLAlchemyError

import schemas
from api import BY_OPERATOR, Blueprint
from config import state
from database import is_transient, newest_page, reading, writing
from models import Agent, Delivery, Event, Number, Timestamp, Webhook, has_word, new_id, now

OPERATOR = "admin"
NOBODY = "anonymous"

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

prometheus.disable_created_metrics()  # multiprocess mode has none
REGISTRY = prometheus.CollectorRegistry()  # the library's default holds metrics of one process
_counter = partial(prometheus.Counter, registry=REGISTRY)
DURATION = prometheus.Histogram(
    "lanyard_http_request_duration_seconds",
    "Requests, by how long they took to answer.",
    ["route", "method", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
_FAILURES = _counter("lanyard_auth_failures", "Failed authentications, by the first reason met.", ["reason"])
ATTEMPTS = _counter(
    "lanyard_webhook_attempts", "Webhook attempts, by the delivery's status after.", ["status"]
)
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


REPORT_INTERVAL = timedelta(minutes=10)  # between entries about failed sign-ins at one agent
ADDRESSES = 1000  # that are counted apart in one entry
ADDRESSES_SHOWN = 10


class _Failures:
    """Failed sign-ins at one agent, or at none that exists, which are not in the audit log yet."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.reported_at: datetime | None = None
        self.attempts: Counter[str] = Counter()  # by address


def record(
    connection: sa.Connection,
    type_: str,
    agent: Any = None,
    *,
    caller: dict[str, Any] | None = None,
    only_webhook: int | None = None,
    **data: Any,
) -> int:
    """Record an event in the caller's write transaction, and put it in the outbox; return its row number.

    :param agent: the agent concerned, an object with `id`, `name` and `client_id`.
    :param caller: `actor` and `address`, unless they are the request's or the operator's.
    :param only_webhook: the row number of the one webhook to notify, whatever it subscribes to.
    :param data: further facts; never a secret, a hash or a token.
    """
    if agent is not None:
        data = {"agent_id": agent.id, "agent_name": agent.name, "client_id": agent.client_id, **data}
    moment = now()
    row = {"id": new_id("evt_"), "type": type_, "created_at": moment, "agent_id": data.get("agent_id")}
    row |= {"actor": OPERATOR, "address": None, "request_id": None, "data": data}
    if caller is not None:
        row |= caller
    elif has_request_context():
        row |= {"actor": g.get("actor", NOBODY), "address": request.remote_addr, "request_id": g.request_id}
    event_pk: int = connection.execute(_INSERT, row).scalar_one()
    if only_webhook is not None:
        times = {"created_at": moment, "next_attempt_at": moment}
        connection.execute(sa.insert(Delivery), {"webhook_pk": only_webhook, "event_pk": event_pk, **times})
    else:
        group = f"{type_.partition('.')[0]}.*"
        connection.execute(_OUTBOX, {"event": event_pk, "now": moment, "type": type_, "group": group})
    return event_pk


def count_failure(reason: str) -> None:
    """Count a failed authentication in the metrics, of each request only the first.

    :param reason: a label of the counter.
    """
    if not g.get("has_failed"):
        g.has_failed = True
        _FAILURES.labels(reason).inc()


def record_failure(credential: str, agent: Any = None) -> None:
    """Count a guess for the audit log: an entry at once, then one every REPORT_INTERVAL with the number.

    Each process counts by itself; what a killed one has not recorded is lost.

    :param credential: whose: `client` or `operator`.
    :param agent: the agent that was named, if it exists.
    """
    failures = state().failures.setdefault((credential, agent and agent.client_id), _Failures(agent))
    address = request.remote_addr or ""
    is_counted_apart = address in failures.attempts or len(failures.attempts) < ADDRESSES
    failures.attempts[address if is_counted_apart else "others"] += 1
    app = cast(Any, current_app)._get_current_object()

    @after_this_request
    def report_later(response: Response) -> Response:
        # Not before the response: the time that it takes must not show which agents exist.
        response.call_on_close(partial(_report, app))
        return response


def _report(app: Flask) -> None:
    with app.app_context():
        report_failures()


def report_failures(*, everything: bool = False) -> None:
    """Record the counted failures of each agent whose last entry is old enough, or of all."""
    moment = now()
    for key, failures in list(state().failures.items()):
        last = failures.reported_at
        if last is not None and last <= moment < last + REPORT_INTERVAL and not everything:
            continue
        failures.reported_at = moment
        attempts, failures.attempts = failures.attempts, Counter()
        if not attempts:
            state().failures.pop(key, None)
        elif not _record_failures(key[0], failures.agent, attempts):
            failures.reported_at = last
            failures.attempts.update(attempts)


def _record_failures(credential: str, agent: Any, attempts: Counter[str]) -> bool:
    """Record an entry; return False when the database does not answer."""
    addresses = [address for address, _ in attempts.most_common(ADDRESSES_SHOWN)]
    data: dict[str, Any] = {"credential": credential, "attempts": attempts.total()}
    data |= {"address_count": len(attempts), "addresses": addresses}
    caller = {"actor": NOBODY, "address": addresses[0] if len(addresses) == 1 else None}
    try:
        with writing(durable=False, exclusive=False) as connection:
            record(connection, "auth.failed", agent, caller=caller, **data)
    except SQLAlchemyError as error:
        if not is_transient(error):
            raise
        return False
    return True


def reserve_share() -> float:
    """Return the share of a full disk's reserve that the caller may use: all if it is the operator."""
    return 1 if g.get("actor") == OPERATOR else 0.5


def set_caller(actor: str, client_id: str | None = None) -> None:
    """Set the caller of this request, for events and the access log: `admin`, or an agent's id."""
    g.actor, g.client_id = actor, client_id


bp = Blueprint(
    "events", __name__, url_prefix="/api/events", description="Audit log (management)", security=BY_OPERATOR
)


@bp.get("")
@bp.arguments(schemas.EventQuery, location="query")
@bp.response(200, schemas.EventPage)
def list_events(query: dict[str, Any]) -> dict[str, Any]:
    """List events, newest first."""
    statement = sa.select(Event)
    if query["type"] is not None:
        group = query["type"].removesuffix("*")
        exactly = group == query["type"]
        statement = statement.where(Event.type == group if exactly else Event.type.startswith(group))
    with reading() as connection:
        if (agent_id := query["agent_id"]) is not None:
            by_client_id = sa.select(Agent.id).where(Agent.client_id == agent_id)
            statement = statement.where(Event.agent_id == (connection.scalar(by_client_id) or agent_id))
        page, following = newest_page(connection, statement, Event.pk, query)
    return {"events": page, "next": following}
