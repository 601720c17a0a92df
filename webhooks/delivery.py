"""The deliverer: one thread of one worker that sends what is in the outbox, several at a time."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from flask import Flask
from standardwebhooks.webhooks import Webhook as Signer

import events
from api import rfc3339
from config import DAY, VERSION, settings
from database import backend, error_text, is_transient, reading, writing
from models import Delivery, Event, Webhook, decrypt, now
from storage import postgresql, sqlite
from webhooks import ssrf

log = logging.getLogger("lanyard")

# Seconds to wait after each failure; a webhook's `max_retries` says how many of them are used.
SCHEDULE = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER = 0.2  # at most this part more, so that what failed together does not come back together
FAILING_FOR = timedelta(days=5)  # of nothing but failures switches a webhook off
IN_FLIGHT = 32
IN_FLIGHT_EACH = 8  # of one webhook: a slow receiver delays nobody else's
# Those that did not take the last have one place each, and half of all together: many dead hosts
# delay nobody either.
IN_FLIGHT_FAILING = 16
REST = 30.0  # seconds to leave be what cannot be read or written
GONE = 410
POLL = 0.2  # seconds between looks into the outbox
LEASE_POLL = 1.0  # seconds between tries to take over from a deliverer that died
# SQLite's lock knows no queue: many deliveries that wait for it all the time would starve a request.
_ONE_WRITES = threading.Lock()


_WEBHOOK = sa.select(
    Webhook.pk,
    Webhook.id,
    Webhook.name,
    Webhook.url,
    Webhook.is_active,
    Webhook.max_retries,
    Webhook.failing_since,
).where(Webhook.pk == sa.bindparam("webhook"))
_PARCEL = (
    Webhook.pk,
    Webhook.url,
    Webhook.failing_since,
    # As stored: a secret that cannot be decrypted is the failure of this delivery, not of all that are due.
    sa.type_coerce(Webhook.secret, sa.String).label("secret"),
    sa.type_coerce(Webhook.old_secret, sa.String).label("old_secret"),
    Webhook.old_secret_expires_at,
    Delivery.pk.label("delivery_pk"),
    Delivery.next_attempt_at,
    Event.id.label("event_id"),
    Event.type,
    Event.created_at,
    Event.data,
)


class Parcel(NamedTuple):
    """All that an attempt needs, read in one go."""

    delivery: int
    webhook: int
    url: str
    body: bytes
    event_id: str
    secrets: tuple[str, ...]  # as stored
    due_at: datetime | None
    is_failing: bool


class Outcome(NamedTuple):
    """How an attempt went; no status when there was no answer."""

    status: int | None
    body: str | None
    error: str | None
    retry_after: str | None

    @property
    def is_success(self) -> bool:
        """Whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


class Deliverer:
    """Delivers while it holds the lease, of which there is one for all processes of all hosts."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        with app.app_context():
            self._lease: sqlite.Lease | postgresql.Lease = backend(settings()).Lease(settings())
        self._is_sure = True  # whose turn it is
        self._stopping = threading.Event()
        self._landed = threading.Event()
        self._flying: dict[int, Parcel] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="deliverer", daemon=True)

    def start(self) -> None:
        """Start the thread; it takes its turn when there is no deliverer."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in flight, and start nothing more."""
        self._stopping.set()
        self._landed.set()
        self._thread.join(ssrf.TIMEOUT)

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._has_lease():
                self._deliver()
            else:
                self._stopping.wait(LEASE_POLL)
        self._lease.close()

    def _has_lease(self) -> bool:
        try:
            has_it = self._lease.take()
        except Exception as error:
            if self._is_sure:  # told once, and tried again every second
                _complain("It cannot be told whose turn it is to deliver webhooks", error)
            self._is_sure = False
            return False
        self._is_sure = True
        return has_it

    def _deliver(self) -> None:
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="delivery") as pool:
            while not self._stopping.is_set() and self._has_lease():
                try:
                    with self._app.app_context():
                        for parcel in self._due():
                            with self._lock:
                                self._flying[parcel.delivery] = parcel
                            pool.submit(self._attempt, parcel)
                except Exception as error:
                    _complain("The outbox cannot be read", error)
                    self._stopping.wait(REST)
                # A delivery that is done makes room for the next at once.
                self._landed.wait(POLL)
                self._landed.clear()

    def _due(self) -> list[Parcel]:
        """What may be sent now: the oldest first, but never too many of one webhook."""
        with self._lock:
            flying = list(self._flying.values())
        taken = Counter(parcel.webhook for parcel in flying)
        parcels: list[Parcel] = []
        with reading() as connection:
            for webhook, failing_since in _webhooks_with_something_due(connection):
                free, most = IN_FLIGHT - len(flying) - len(parcels), IN_FLIGHT_EACH
                if failing_since is not None:
                    failing = sum(parcel.is_failing for parcel in [*flying, *parcels])
                    free, most = min(free, IN_FLIGHT_FAILING - failing), 1
                places = min(free, most - taken[webhook])
                if places > 0:
                    parcels += _parcels(connection, webhook, places, [parcel.delivery for parcel in flying])
        return parcels

    def _attempt(self, parcel: Parcel) -> None:
        try:
            with self._app.app_context():
                outcome = _send(parcel)
                _settle(parcel, outcome)
        except Exception as error:
            # It stays due, but a full disk must not make it go out again and again.
            _complain("How a delivery went cannot be written down", error)
            self._stopping.wait(REST)
        finally:
            with self._lock:
                self._flying.pop(parcel.delivery, None)
            self._landed.set()


def _complain(what: str, error: Exception) -> None:
    # Where the database failed is no news when it is locked or full: one line will do.
    log.error("%s: %s", what, error_text(error), exc_info=None if is_transient(error) else error)


def _webhooks_with_something_due(connection: sa.Connection) -> list[tuple[int, datetime | None]]:
    due = Delivery.next_attempt_at <= now()
    statement = sa.select(Webhook.pk, Webhook.failing_since).where(
        Webhook.is_active, sa.exists().where(Delivery.webhook_pk == Webhook.pk, due)
    )
    found = [(pk, failing_since) for pk, failing_since in connection.execute(statement)]
    random.shuffle(found)  # with more webhooks than places, each has its turn
    found.sort(key=lambda entry: entry[1] is not None)  # the healthy first
    return found


def _parcels(connection: sa.Connection, webhook_pk: int, places: int, flying: list[int]) -> list[Parcel]:
    statement = (
        sa.select(*_PARCEL)
        .join(Delivery, Webhook.pk == Delivery.webhook_pk)
        .join(Event, Event.pk == Delivery.event_pk)
        .where(
            Delivery.webhook_pk == webhook_pk,
            Delivery.next_attempt_at <= now(),
            Delivery.pk.not_in(flying),
        )
        .order_by(Delivery.next_attempt_at, Delivery.pk)
        .limit(places)
    )
    return [_parcel(row) for row in connection.execute(statement)]


def _parcel(row: Any) -> Parcel:
    secrets = [row.secret]
    if row.old_secret and row.old_secret_expires_at and row.old_secret_expires_at > now():
        secrets.append(row.old_secret)
    return Parcel(
        row.delivery_pk,
        row.pk,
        row.url,
        _body(row),
        row.event_id,
        tuple(secrets),
        row.next_attempt_at,
        row.failing_since is not None,
    )


def _body(row: Any) -> bytes:
    """The same bytes at every attempt."""
    timestamp = rfc3339(row.created_at)
    body = {"id": row.event_id, "type": row.type, "timestamp": timestamp, "data": row.data}
    return json.dumps(body, separators=(",", ":")).encode()


def _send(parcel: Parcel) -> Outcome:
    """One attempt. Whatever goes wrong with it is this delivery's failure and nobody else's."""
    allow_private = settings().webhook_allow_private
    try:
        target = ssrf.parse(parcel.url, allow_private=allow_private)
        # Checked again, and dialled as checked: a name's answer may have changed since the webhook was made.
        address = ssrf.resolve(target, allow_private=allow_private)
        answer = ssrf.post(target, address, parcel.body, _headers(parcel))
    except ssrf.Refused as refusal:
        return Outcome(None, None, f"Refused: {refusal}", None)
    except Exception as error:
        return Outcome(None, None, f"{type(error).__name__}: {error}"[:200], None)
    return Outcome(answer.status, answer.body, None, answer.retry_after)


def _headers(parcel: Parcel) -> dict[str, str]:
    moment = now()
    body = parcel.body.decode()
    secrets = [decrypt(stored, settings().secret_keys) for stored in parcel.secrets]
    signatures = [Signer(secret).sign(parcel.event_id, moment, body) for secret in secrets]
    return {
        "Content-Type": "application/json",
        "User-Agent": f"Lanyard/{VERSION}",
        "webhook-id": parcel.event_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _settle(parcel: Parcel, outcome: Outcome) -> None:
    """Record how the attempt went, and when to try again."""
    with _ONE_WRITES, writing(durable=not outcome.is_success) as connection:
        delivery = connection.execute(sa.select(Delivery).where(Delivery.pk == parcel.delivery)).first()
        webhook = connection.execute(_WEBHOOK, {"webhook": parcel.webhook}).first()
        if delivery is None or webhook is None:
            return  # deleted meanwhile
        changes: dict[str, Any] = {
            "last_attempt_at": now(),
            "response_status": outcome.status,
            "response_body": _without_nul(outcome.body),
            "error": _without_nul(outcome.error),
        }
        # A redelivery that was asked for meanwhile is still to come.
        if delivery.next_attempt_at == parcel.due_at:
            changes |= _next_step(delivery.attempts + 1, webhook.max_retries, outcome)
            events.ATTEMPTS.labels(changes["status"]).inc()
        connection.execute(sa.update(Delivery).where(Delivery.pk == delivery.pk).values(changes))
        # A webhook that was given another address meanwhile has not failed there.
        if webhook.url == parcel.url:
            _judge(connection, webhook, outcome)


def _without_nul(text: str | None) -> str | None:
    """Text from a receiver as every database can keep it: PostgreSQL has no NUL in texts."""
    return text and text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _judge(connection: sa.Connection, webhook: Any, outcome: Outcome) -> None:
    """Note whether the webhook fails, and switch it off when it has failed for too long, or is gone."""
    failing_since = None if outcome.is_success else webhook.failing_since or now()
    reason = None
    if outcome.status == GONE:
        reason = "The receiver answered 410 Gone."
    elif failing_since and now() - failing_since >= FAILING_FOR:
        reason = "Five days of nothing but failures."
    changes: dict[str, Any] = {"failing_since": failing_since}
    if reason and webhook.is_active:
        changes |= {"is_active": False, "disabled_reason": reason}
        facts: dict[str, Any] = {"webhook_id": webhook.id, "webhook_name": webhook.name}
        facts |= {"changed": ["is_active"], "disabled_reason": reason}
        events.record(connection, "webhook.updated", **facts)
    connection.execute(sa.update(Webhook).where(Webhook.pk == webhook.pk).values(changes))


def _next_step(attempts: int, max_retries: int, outcome: Outcome) -> dict[str, Any]:
    """The delivery's status after so many attempts, and when to try next."""
    if outcome.is_success:
        return {"status": "delivered", "attempts": attempts, "next_attempt_at": None}
    if outcome.status == GONE or attempts > max_retries:
        return {"status": "dead", "attempts": attempts, "next_attempt_at": None}
    next_attempt_at = now() + _pause(attempts, outcome.retry_after)
    return {"status": "retrying", "attempts": attempts, "next_attempt_at": next_attempt_at}


def _pause(attempts: int, retry_after: str | None) -> timedelta:
    asked = _asked_pause(retry_after) if retry_after else None
    if asked is not None:
        return timedelta(seconds=min(max(asked, SCHEDULE[0]), DAY))
    pause = SCHEDULE[min(attempts, len(SCHEDULE)) - 1]
    return timedelta(seconds=pause * (1 + JITTER * random.random()))  # noqa: S311 - nobody gains by guessing it


def _asked_pause(retry_after: str) -> float | None:
    """RFC 9110 §10.2.3: seconds, or a date."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return (parsedate_to_datetime(text) - now()).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
