"""What happened: recorded in the transaction of the change itself, kept as the audit log."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response, g, has_request_context, request
from sqlalchemy.exc import OperationalError

import clock
import credentials
from models import Event, db, writing

TYPES = (
    "agent.created",
    "agent.updated",
    "agent.deactivated",
    "agent.reactivated",
    "agent.deleted",
    "agent.credentials_rotated",
    "token.issued",
    "token.refreshed",
    "token.revoked",
    "token.reuse_detected",
    "auth.failed",
    "key.rotated",
)
GROUPS = ("*", "agent.*", "token.*", "auth.*", "key.*")
OPERATOR = "admin"
NOBODY = "anonymous"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_INSERT = sa.insert(Event)


class _Limiter:
    """Lets one of a kind through a minute, and one of any kind a second, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[object, float] = OrderedDict()
        self._any = float("-inf")

    def allow(self, kind: object) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._any + 1 or now < self._last.get(kind, float("-inf")) + 60:
                return False
            self._any = self._last[kind] = now
            self._last.move_to_end(kind)
            if len(self._last) > 1000:
                self._last.popitem(last=False)
            return True


_failures = _Limiter()


def init_app(app: Flask) -> None:
    """Give every request an id, its caller's own if that is harmless, and say it in the answer."""
    app.before_request(_name_request)
    app.after_request(_tell_request_id)


def record(type_: str, agent: Any = None, **data: Any) -> None:
    """Record an event in the caller's write transaction.

    :param agent: the agent it is about, an object with `id`, `name` and `client_id`.
    :param data: what else there is to tell; never a secret, a hash or a token.
    """
    if agent is not None:
        data = {"agent_id": agent.id, "agent_name": agent.name, "client_id": agent.client_id, **data}
    row = {
        "id": credentials.new_event_id(),
        "type": type_,
        "created_at": clock.now(),
        "actor": OPERATOR,
        "agent_id": data.get("agent_id"),
        "address": None,
        "request_id": None,
        "data": data,
    }
    if has_request_context():
        row |= {"actor": g.get("actor", NOBODY), "address": request.remote_addr, "request_id": g.request_id}
    db.session.connection().execute(_INSERT, row)


def record_failure(client_id: str | None) -> None:
    """Record a failed authentication in a transaction of its own; few of many, for guessers are busy."""
    if _failures.allow((client_id, request.remote_addr)):
        # A database that is locked must not turn a refusal into another answer.
        with suppress(OperationalError), writing(durable=False):
            record("auth.failed", **({"client_id": client_id} if client_id else {}))


def caller_is(actor: str) -> None:
    """Say who makes this request: `admin`, or an agent by its id."""
    g.actor = actor


def _name_request() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else credentials.new_event_id()


def _tell_request_id(response: Response) -> Response:
    if "request_id" in g:
        response.headers["X-Request-Id"] = g.request_id
    return response
