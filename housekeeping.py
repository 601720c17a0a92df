"""Rubbish goes by itself: what has expired is deleted in small batches, between requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import sqlalchemy as sa
from flask import Flask, Response
from sqlalchemy.exc import DBAPIError

import clock
from config import settings
from database import may_pass, writing
from models import Base, Event, Webhook, db

log = logging.getLogger("lanyard")

BATCH = 200  # rows of one table in one transaction: some milliseconds of the write lock
PAUSE = 10  # seconds a process leaves between sweeps that found nothing left to do

# Each table's column that tells a row's end, and for how long after it the row is still wanted.
_EXPIRING = {
    "refresh_families": ("expires_at", timedelta(0)),
    # A day more, for a clock that was ahead for a while: what is spent must not come back.
    "spent_assertions": ("expires_at", timedelta(days=1)),
    "failed_sign_ins": ("clear_at", timedelta(0)),
    "revoked_tokens": ("expires_at", timedelta(days=1)),
    "client_secrets": ("expires_at", timedelta(0)),
    "signing_keys": ("gone_at", timedelta(0)),
    "usage_days": ("day", timedelta(days=31)),
}


def init_app(app: Flask) -> None:
    """Sweep after an answer has been sent, when it is time again.

    There is no thread or timer to look after: rubbish only comes with requests, so it goes with them.
    """
    due = _Due()

    def after_request(response: Response) -> Response:
        if due.now():
            response.call_on_close(lambda: _sweep_in(app, due))
        return response

    app.after_request(after_request)


def sweep() -> bool:
    """Delete one batch of what has expired; returns whether there may be more."""
    return max(_sweep(patient=False).values()) == BATCH


def purge() -> Iterator[dict[str, int]]:
    """Delete all that has expired, batch by batch; yields how many rows of each table went with each."""
    while True:
        deleted = _sweep(patient=True)
        yield deleted
        if max(deleted.values()) < BATCH:
            return


def count_expired() -> int:
    """How many rows there are to delete."""
    counts = [_count(Base.metadata.tables[name], _has_expired(name)) for name in _EXPIRING]
    return sum(counts) + _count(Event.__table__, _is_old())


def _sweep(*, patient: bool) -> dict[str, int]:
    deleted: dict[str, int] = {}
    for name in _EXPIRING:
        table = Base.metadata.tables[name]
        key = tuple(table.primary_key)
        expired = sa.select(*key).where(_has_expired(name)).limit(BATCH)
        deleted[name] = _change(sa.delete(table).where(sa.tuple_(*key).in_(expired)), patient)
    # By their numbers, which grow with time: an index on it would cost every token.
    oldest = sa.select(Event.pk).order_by(Event.pk).limit(BATCH)
    deleted["events"] = _change(sa.delete(Event).where(Event.pk.in_(oldest), _is_old()), patient)
    over = Webhook.old_secret_expires_at <= clock.now()
    _change(sa.update(Webhook).where(over).values(old_secret=None, old_secret_expires_at=None), patient)
    return deleted


def _has_expired(table: str) -> sa.ColumnElement[bool]:
    column, kept = _EXPIRING[table]
    return Base.metadata.tables[table].c[column] <= clock.now() - kept


def _is_old() -> sa.ColumnElement[bool]:
    return Event.created_at <= clock.now() - timedelta(days=settings().event_retention_days)


def _count(table: sa.FromClause, expired: sa.ColumnElement[bool]) -> int:
    return db.session.scalar(sa.select(sa.func.count()).select_from(table).where(expired)) or 0


def _change(statement: sa.UpdateBase, patient: bool) -> int:
    with writing(durable=False, patient=patient) as connection:
        return connection.execute(statement).rowcount


class _Due:
    """When this process sweeps next; one request at a time is told that it is now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = time.monotonic() + PAUSE

    def now(self) -> bool:
        with self._lock:
            if time.monotonic() < self._next:
                return False
            # Not for ever: a server might lose an answer without closing it.
            self._next = time.monotonic() + 6 * PAUSE
            return True

    def again(self, *, at_once: bool) -> None:
        self._next = time.monotonic() + (0 if at_once else PAUSE)


def _sweep_in(app: Flask, due: _Due) -> None:
    more = False
    try:
        with app.app_context():
            more = sweep()
    except DBAPIError as error:
        # Locked or full just now: the next sweep finds it all again.
        if not may_pass(error):
            log.exception("What has expired cannot be deleted.")
    finally:
        due.again(at_once=more)
