"""Webhook delivery: one thread of one process sends what is in the outbox, and retries what fails."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

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
from webhooks.routes import WITHOUT_SECRETS, record_event
from webhooks.ssrf import Outcome

log = logging.getLogger("lanyard")

# Seconds to wait after each failed attempt; a webhook's `max_retries` limits how many of them are used.
RETRY_DELAYS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
RETRY_JITTER = 0.2  # at most this part more, so that deliveries that failed together are not retried together
FAILING_FOR = timedelta(days=5)  # without a success: the webhook is deactivated
GONE = 410
# Attempts at once. Beyond that, each webhook whose last attempt did not fail has a slot of its own: receivers
# that take long over their responses must not delay the others.
MAX_IN_FLIGHT = 32
MAX_IN_FLIGHT_EACH = 8  # of one webhook
MAX_THREADS = 1000  # greenlets in the server, made when needed
# A webhook whose last attempt failed gets one slot; all failing webhooks together get half, so that
# many unreachable hosts do not delay the others either.
MAX_IN_FLIGHT_FAILING = 16
POLL_INTERVAL = 0.2  # seconds between reads of the outbox
LEASE_INTERVAL = 1.0  # seconds between attempts to take over from a process that has ended, or to read
ERROR_PAUSE = 30.0  # seconds until a delivery is sent again whose outcome could not be recorded
# SQLite's lock has no queue: many attempts waiting for it at once would starve the requests.
_WRITE_LOCK = threading.Lock()

_START_LOCK = threading.Lock()
_deliverers: dict[int, Deliverer] = {}  # by process id: a fork inherits its parent's, but not the thread

_DUE = (
    sa.select(
        Delivery.pk,
        Delivery.webhook_pk,
        Delivery.next_attempt_at,
        Event.id.label("event_id"),
        Event.type,
        Event.created_at,
        Event.data,
        Webhook.url,
        Webhook.failing_since,
        # As stored: a secret that cannot be decrypted fails its own delivery, not the read of all.
        sa.type_coerce(Webhook.secret, sa.String).label("secret"),
        sa.type_coerce(Webhook.old_secret, sa.String).label("old_secret"),
        Webhook.old_secret_expires_at,
    )
    .select_from(Delivery)
    .join(Webhook)
    .join(Event)
    .order_by(Delivery.next_attempt_at, Delivery.pk)
)


def start(app: Flask) -> None:
    """Start this process's deliverer, unless it runs already."""
    if os.getpid() in _deliverers:
        return
    with _START_LOCK:
        if os.getpid() not in _deliverers:
            deliverer = Deliverer(app)
            deliverer.start()
            _deliverers[os.getpid()] = deliverer


def stop() -> None:
    """Stop this process's deliverer, if one runs; see `Deliverer.stop`."""
    if deliverer := _deliverers.get(os.getpid()):
        deliverer.stop()


class Deliverer:
    """Delivers while it holds the lease: one process of all, on all hosts, has it."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        with app.app_context():
            self._lease: sqlite.Lease | postgresql.Lease = backend(settings()).Lease(settings())
        self._stopping = threading.Event()
        self._attempt_ended = threading.Event()
        self._in_flight: dict[int, Any] = {}  # rows of _DUE by delivery
        self._thread = threading.Thread(target=self._run, name="deliverer", daemon=True)

    def start(self) -> None:
        """Start the thread; it delivers once no other process does."""
        self._thread.start()

    def stop(self) -> None:
        """Start no more attempts, and wait for those in flight."""
        self._stopping.set()
        self._attempt_ended.set()
        self._thread.join(ssrf.TIMEOUT)

    def _run(self) -> None:
        with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="delivery") as pool:
            while not self._stopping.is_set():
                try:
                    with self._app.app_context():
                        due = self._due() if self._lease.take() else None
                except Exception as error:
                    _log_failure("The outbox cannot be read", error)
                    due = None
                if due is None:
                    self._stopping.wait(LEASE_INTERVAL)
                    continue
                for delivery in due:
                    self._in_flight[delivery.pk] = delivery
                    try:
                        pool.submit(self._attempt, delivery)
                    except RuntimeError:  # the process ends without `stop`
                        return
                self._attempt_ended.wait(POLL_INTERVAL)
                self._attempt_ended.clear()
        self._lease.close()

    def _due(self) -> list[Any]:
        """Return the deliveries to attempt now, oldest first, within the limits of what is in flight."""
        in_flight = list(self._in_flight.values())
        per_webhook = Counter(delivery.webhook_pk for delivery in in_flight)
        due: list[Any] = []
        with reading() as connection:
            for webhook_pk, failing_since in _webhooks_due(connection):
                used, free = per_webhook[webhook_pk], MAX_IN_FLIGHT - len(in_flight) - len(due)
                if failing_since is None:
                    slots = max(1 - used, min(free, MAX_IN_FLIGHT_EACH - used))
                else:
                    failing = sum(delivery.failing_since is not None for delivery in [*in_flight, *due])
                    slots = min(free, MAX_IN_FLIGHT_FAILING - failing, 1 - used)
                if slots > 0:
                    excluded = Delivery.pk.not_in([delivery.pk for delivery in in_flight])
                    of_webhook = _DUE.where(
                        Delivery.webhook_pk == webhook_pk, Delivery.next_attempt_at <= now(), excluded
                    )
                    due += connection.execute(of_webhook.limit(slots))
        return due

    def _attempt(self, delivery: Any) -> None:
        try:
            with self._app.app_context():
                _record_or_fail(delivery, _send(delivery))
        except Exception as error:
            # The delivery stays due: without a pause, a full disk would have it sent over and over.
            _log_failure("The outcome of a webhook delivery cannot be recorded", error)
            self._stopping.wait(ERROR_PAUSE)
        finally:
            self._in_flight.pop(delivery.pk, None)
            self._attempt_ended.set()


def _log_failure(what: str, error: Exception) -> None:
    # A traceback says nothing more about a database that is locked or full, or too many open files.
    is_told = is_transient(error) or isinstance(error, OSError)
    log.error(f"{what}: %s", error_text(error), exc_info=None if is_told else error)


def _webhooks_due(connection: sa.Connection) -> list[Any]:
    due = sa.exists().where(Delivery.webhook_pk == Webhook.pk, Delivery.next_attempt_at <= now())
    statement = sa.select(Webhook.pk, Webhook.failing_since).where(Webhook.is_active, due)
    webhooks = list(connection.execute(statement))
    random.shuffle(webhooks)  # with more webhooks than slots, none is always last
    webhooks.sort(key=lambda webhook: webhook.failing_since is not None)
    return webhooks


def _send(delivery: Any) -> Outcome:
    """Make one attempt. Whatever goes wrong is the outcome of this delivery alone."""
    allow_private, until = settings().webhook_allow_private, ssrf.deadline()
    try:
        target = ssrf.parse(delivery.url, allow_private=allow_private)
        # A name may resolve to other addresses by now: check again, and connect to what was checked.
        addresses = ssrf.resolve(target, until, allow_private=allow_private)
        body = _body(delivery)
        return ssrf.post(target, addresses, body.encode(), _headers(delivery, body), until)
    except ssrf.Refused as refusal:
        return Outcome(error=f"Refused: {refusal}")
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}"[:200])


def _body(delivery: Any) -> str:
    """Return the body, the same in every attempt."""
    timestamp = rfc3339(delivery.created_at)
    body = {"id": delivery.event_id, "type": delivery.type, "timestamp": timestamp, "data": delivery.data}
    return json.dumps(body, separators=(",", ":"))


def _headers(delivery: Any, body: str) -> dict[str, str]:
    """Sign the body as Standard Webhooks says, during a rotation's grace period with both secrets."""
    moment = now()
    signatures = [Signer(secret).sign(delivery.event_id, moment, body) for secret in _secrets(delivery)]
    return {
        "Content-Type": "application/json",
        "User-Agent": f"Lanyard/{VERSION}",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _secrets(delivery: Any) -> list[str]:
    stored = [delivery.secret]
    if delivery.old_secret and delivery.old_secret_expires_at > now():
        stored.append(delivery.old_secret)
    return [decrypt(secret, settings().secret_keys) for secret in stored]


def _record_or_fail(attempted: Any, outcome: Outcome) -> None:
    """Record an attempt's outcome; one that cannot be recorded, whatever the response, counts as a failure.

    :raises DBAPIError: when the database does not answer.
    """
    try:
        _record_outcome(attempted, outcome)
    except Exception as error:
        if is_transient(error):
            raise
        _log_failure("The response to a webhook delivery cannot be recorded", error)
        text = f"The response cannot be recorded: {type(error).__name__}."
        _record_outcome(attempted, Outcome(error=text))


def _record_outcome(attempted: Any, outcome: Outcome) -> None:
    """Record an attempt's outcome, and when to retry."""
    with _WRITE_LOCK, writing(durable=not outcome.is_success) as connection:
        delivery = connection.execute(sa.select(Delivery).where(Delivery.pk == attempted.pk)).first()
        of_webhook = sa.select(*WITHOUT_SECRETS).where(Webhook.pk == attempted.webhook_pk)
        webhook = connection.execute(of_webhook).first()
        if delivery is None or webhook is None:
            return  # deleted during the attempt
        changes: dict[str, Any] = {
            "last_attempt_at": now(),
            "response_status": outcome.status,
            "response_body": postgresql.without_nul(outcome.body),
            "error": postgresql.without_nul(outcome.error),
        }
        # Else an operator has asked for a redelivery during the attempt, which is still to come.
        if delivery.next_attempt_at == attempted.next_attempt_at:
            changes |= _retry_or_end(delivery.attempts + 1, webhook.max_retries, outcome)
            events.ATTEMPTS.labels(changes["status"]).inc()
        connection.execute(sa.update(Delivery).where(Delivery.pk == delivery.pk).values(changes))
        # Else the webhook was given another URL during the attempt, which has not failed.
        if webhook.url == attempted.url:
            _update_failing(connection, webhook, outcome)


def _update_failing(connection: sa.Connection, webhook: Any, outcome: Outcome) -> None:
    """Record since when the webhook fails; deactivate it after FAILING_FOR or 410 Gone."""
    failing_since = None if outcome.is_success else webhook.failing_since or now()
    changes: dict[str, Any] = {"failing_since": failing_since}
    reason = None
    if outcome.status == GONE:
        reason = "The receiver answered 410 Gone."
    elif failing_since and now() - failing_since >= FAILING_FOR:
        reason = "Every attempt of the last five days failed."
    if reason and webhook.is_active:
        changes |= {"is_active": False, "disabled_reason": reason}
        data: dict[str, Any] = {"changed": ["is_active"], "disabled_reason": reason}
        record_event(connection, "webhook.updated", webhook.id, webhook.name, **data)
    connection.execute(sa.update(Webhook).where(Webhook.pk == webhook.pk).values(changes))


def _retry_or_end(attempts: int, max_retries: int, outcome: Outcome) -> dict[str, Any]:
    """Return a delivery's columns after so many attempts: its status, and when to retry."""
    if outcome.is_success:
        return {"status": "delivered", "attempts": attempts, "next_attempt_at": None}
    if outcome.status == GONE or attempts > max_retries:
        return {"status": "dead", "attempts": attempts, "next_attempt_at": None}
    next_attempt_at = now() + _retry_delay(attempts, outcome.retry_after)
    return {"status": "retrying", "attempts": attempts, "next_attempt_at": next_attempt_at}


def _retry_delay(attempts: int, retry_after: str | None) -> timedelta:
    requested = _parse_retry_after(retry_after) if retry_after else None
    if requested is not None:
        return timedelta(seconds=min(max(requested, RETRY_DELAYS[0]), DAY))
    delay = RETRY_DELAYS[min(attempts, len(RETRY_DELAYS)) - 1]
    return timedelta(seconds=delay * (1 + RETRY_JITTER * random.random()))  # noqa: S311 - not a secret


def _parse_retry_after(text: str) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110 §10.2.3), or None if it is malformed."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return (parsedate_to_datetime(text) - now()).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
