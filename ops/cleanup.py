"""Delete expired rows in small batches after responses have been sent, or all at once for a command."""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import timedelta

import sqlalchemy as sa
from flask import Flask, Response
from sqlalchemy.exc import SQLAlchemyError

import events
from config import settings
from database import is_transient, keep_reserve, writing
from models import Base, Event, Webhook, now

log = logging.getLogger("lanyard")

BATCH = 200  # rows of one table in one transaction: some milliseconds of the write lock
INTERVAL = 10  # seconds between batches in one process, once nothing is left to delete

# Each table's column that holds the end of a row, and how long the row is needed after it.
_EXPIRING = {
    "refresh_families": ("expires_at", timedelta(0)),
    # Longer, for a clock that was ahead for a while: what was used or revoked must not become valid again.
    "spent_assertions": ("expires_at", timedelta(days=1)),
    "failed_sign_ins": ("clear_at", timedelta(0)),
    "revoked_tokens": ("expires_at", timedelta(days=31)),
    "client_secrets": ("expires_at", timedelta(0)),
    "signing_keys": ("gone_at", timedelta(0)),
    "usage_days": ("day", timedelta(days=31)),
}


def init_app(app: Flask) -> None:
    """Delete a batch after a response, every INTERVAL seconds; at every response while there is more."""
    next_run = time.monotonic() + INTERVAL

    def run() -> None:
        nonlocal next_run
        more = False
        try:
            with app.app_context():
                keep_reserve()
                more = delete_batch()
        except SQLAlchemyError as error:
            if not is_transient(error):
                log.exception("Expired rows cannot be deleted.")
        finally:
            next_run = time.monotonic() + (0 if more else INTERVAL)

    def after_request(response: Response) -> Response:
        nonlocal next_run
        # After a refusal soon: the reserve may be missing though there is room again.
        if time.monotonic() >= next_run - (INTERVAL - 1 if response.status_code == 503 else 0):
            # Not for ever: a server may drop a response without closing it.
            next_run = time.monotonic() + 6 * INTERVAL
            response.call_on_close(run)
        return response

    app.after_request(after_request)


def delete_batch() -> bool:
    """Delete one batch of expired rows of each table; return whether there may be more."""
    events.report_failures()
    return max(_delete_batch(patient=False).values()) == BATCH


def purge() -> Counter[str]:
    """Delete all expired rows; return how many of each table."""
    deleted: Counter[str] = Counter()
    while True:
        batch = _delete_batch(patient=True)
        deleted.update(batch)
        if max(batch.values()) < BATCH:
            return deleted


def _delete_batch(*, patient: bool) -> dict[str, int]:
    deleted: dict[str, int] = {}
    for name in _EXPIRING:
        table = Base.metadata.tables[name]
        key = tuple(table.primary_key)
        expired = sa.select(*key).where(_has_expired(name)).limit(BATCH)
        deleted[name] = _change(sa.delete(table).where(sa.tuple_(*key).in_(expired)), patient)
    # By row number, which grows with time: an index on created_at would slow down every token.
    oldest = sa.select(Event.pk).order_by(Event.pk).limit(BATCH)
    deleted["events"] = _change(sa.delete(Event).where(Event.pk.in_(oldest), _is_old()), patient)
    rotated = sa.update(Webhook).where(Webhook.old_secret_expires_at <= now())
    _change(rotated.values(old_secret=None, old_secret_expires_at=None), patient)
    return deleted


def _has_expired(table: str) -> sa.ColumnElement[bool]:
    column, needed = _EXPIRING[table]
    return Base.metadata.tables[table].c[column] <= now() - needed


def _is_old() -> sa.ColumnElement[bool]:
    return Event.created_at <= now() - timedelta(days=settings().event_retention_days)


def _change(statement: sa.UpdateBase, patient: bool) -> int:
    with writing(durable=False, patient=patient) as connection:
        return connection.execute(statement).rowcount
