"""`GET /metrics`: what the database holds and what the workers count, for Prometheus."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import sqlalchemy as sa
from flask import Flask, Response, current_app
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

import bearer
import clock
import database
import keys
import processes
from api import OPERATOR, Blueprint
from config import VERSION, settings
from models import Agent, Delivery, Event, RefreshFamily, Webhook, db
from tally import BUCKETS, Timing, tally

_EXTENSION = "lanyard.metrics"
KEPT = 15.0  # seconds a worker keeps what it counted row by row: some 70 ms at a million refresh tokens

room = Blueprint("metrics", __name__, description="Metrics", security=OPERATOR)
room.before_request(bearer.require_operator)


@room.get("/metrics")
@room.alt_response(200, schema={"type": "string"}, content_type="text/plain")
def show_metrics() -> Response:
    """Get all metrics in Prometheus' text format."""
    registry: CollectorRegistry = current_app.extensions[_EXTENSION]
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def init_app(app: Flask) -> None:
    """Give the app a registry of its own: the library's is the process's, and counts the process only."""
    registry = app.extensions[_EXTENSION] = CollectorRegistry()
    for collector in (_Database(), _Shared(), _Service()):
        registry.register(collector)


class _Rows(NamedTuple):
    """How many rows there are of what cannot be counted without looking at each."""

    agents: dict[str, int]
    families: int
    deliveries: dict[str, int]


class _Database(Collector):
    """State, read at the scrape: the same in every worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: _Rows | None = None
        self._kept_until = 0.0

    def collect(self) -> Iterator[Metric]:
        """The library's hook."""
        rows = self._counted()
        yield _by(Gauge("lanyard_agents", "Registered agents.", labels=["state"]), rows.agents.items())
        yield Gauge("lanyard_refresh_token_families", "Grants whose refresh token works.", rows.families)
        text = "Webhook deliveries still to be made, those of webhooks that are switched off too."
        yield _by(
            Gauge("lanyard_webhook_deliveries_waiting", text, labels=["status"]), rows.deliveries.items()
        )
        text = "How long the webhook delivery that is due longest has been due; 0 when none is."
        yield Gauge("lanyard_webhook_delivery_overdue_seconds", text, _overdue())
        yield Gauge("lanyard_events", "Events in the audit log, near enough.", _events())
        yield from _signing_keys()
        sizes = database.ways(settings()).sizes(settings(), db.session)
        text = "Size of the database's files."
        yield _by(Gauge("lanyard_database_size_bytes", text, labels=["file"]), sizes.items())

    def _counted(self) -> _Rows:
        # Scrapes that come together wait for one count.
        with self._lock:
            if self._rows is None or time.monotonic() >= self._kept_until:
                self._rows = _Rows(_agents(), _families(), _deliveries())
                self._kept_until = time.monotonic() + KEPT
            return self._rows


class _Shared(Collector):
    """What the workers have counted since the server started."""

    def collect(self) -> Iterator[Metric]:
        """The library's hook."""
        counts = tally()
        totals = counts.board.totals()
        yield _requests(counts.timings(totals))
        text = "Requests whose authentication failed, by the first reason met."
        failures = Counter("lanyard_auth_failures", text, labels=["reason"])
        yield _by(failures, counts.counted(totals, "failure"))
        tokens = dict(counts.counted(totals, "token"))
        yield Counter("lanyard_tokens_issued", "Grants made for client credentials.", tokens["issued"])
        yield Counter("lanyard_tokens_refreshed", "Refresh tokens traded in.", tokens["refreshed"])
        yield Counter("lanyard_tokens_revoked", "Tokens ended by revocation.", tokens["revoked"])
        text = "Refresh tokens that were used twice, which ended all of their grant's."
        yield Counter("lanyard_refresh_token_reuses", text, tokens["reused"])
        text = "Attempts at webhook deliveries, by the status they left the delivery in."
        attempts = Counter("lanyard_webhook_attempts", text, labels=["status"])
        yield _by(attempts, counts.counted(totals, "attempt"))


class _Service(Collector):
    """The server itself: all of its processes, not the one that happens to answer."""

    def collect(self) -> Iterator[Metric]:
        """The library's hook."""
        info = {"version": VERSION, "python_version": platform.python_version()}
        yield Info("lanyard_build", "What runs.", info)
        board = tally().board
        yield Gauge("lanyard_start_time_seconds", "When the server started, in Unix time.", tally().began_at)
        taken = processes.of_service(board.maker, board.processes() | {os.getpid()})
        if taken is None:
            return
        text = "The server's processes: gunicorn's first one, and its workers that were ever busy."
        yield Gauge("lanyard_processes", text, taken.processes)
        text = "Memory of all processes, what they share counted once."
        yield Gauge("lanyard_memory_bytes", text, taken.memory)
        text = "Processor time of all processes, those that have ended too."
        yield Counter("lanyard_cpu_seconds", text, taken.cpu)


def _agents() -> dict[str, int]:
    expired = sa.and_(Agent.is_active, Agent.expires_at <= clock.now())
    counts = [sa.func.count(), sa.func.count().filter(~Agent.is_active), sa.func.count().filter(expired)]
    counted = db.session.execute(sa.select(*counts).select_from(Agent)).one()
    everyone, deactivated, expired_ones = map(int, counted)
    return {
        "active": everyone - deactivated - expired_ones,
        "deactivated": deactivated,
        "expired": expired_ones,
    }


def _families() -> int:
    # Counting all is an index's length; the few that have expired and wait for the sweep are a range of one.
    everyone = sa.select(sa.func.count()).select_from(RefreshFamily)
    expired = everyone.where(RefreshFamily.expires_at <= clock.now())
    counted = db.session.execute(sa.select(everyone.scalar_subquery(), expired.scalar_subquery())).one()
    return int(counted[0] - counted[1])


def _deliveries() -> dict[str, int]:
    # By webhook, as the index is: what is over, most of the table, is not looked at.
    waiting = (
        sa.select(Delivery.status, sa.func.count())
        .where(Delivery.webhook_pk.in_(sa.select(Webhook.pk)), Delivery.next_attempt_at.is_not(None))
        .group_by(Delivery.status)
    )
    return {"pending": 0, "retrying": 0} | {status: count for status, count in db.session.execute(waiting)}


def _overdue() -> float:
    first = (
        sa.select(sa.func.min(Delivery.next_attempt_at))
        .where(Delivery.webhook_pk == Webhook.pk, Delivery.next_attempt_at.is_not(None))
        .scalar_subquery()
    )
    dues = db.session.scalars(sa.select(first).where(Webhook.is_active))
    waits = [(clock.now() - due).total_seconds() for due in dues if due is not None]
    return max([0.0, *waits])


def _events() -> int:
    # Their numbers are given one by one and go from the oldest on: a count would read a million entries.
    ends = [sa.select(end(Event.pk)).scalar_subquery() for end in (sa.func.min, sa.func.max)]
    oldest, newest = db.session.execute(sa.select(*ends)).one()
    return 0 if oldest is None else newest - oldest + 1


def _signing_keys() -> tuple[Metric, Metric]:
    text = "When the key that signs was made, in Unix time."
    made = Gauge("lanyard_signing_key_created_timestamp_seconds", text, labels=["alg"])
    text = "When the next key will sign, in Unix time, while one is published that does not."
    following = Gauge("lanyard_signing_key_next_timestamp_seconds", text, labels=["alg"])
    for key in keys.list_keys():
        if key.state == "signing":
            made.add_metric([key.alg], key.created_at.timestamp())
        elif key.state == "published":
            following.add_metric([key.alg], key.signs_from.timestamp())
    return made, following


def _requests(timings: Iterable[Timing]) -> Metric:
    family = Histogram(
        "lanyard_http_request_duration_seconds",
        "Requests, by how long they took to answer.",
        labels=["route", "method", "status"],
    )
    bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
    for timing in timings:
        buckets = list(zip(bounds, accumulate(timing.buckets), strict=True))
        family.add_metric([timing.route, timing.method, timing.status], buckets, timing.seconds)
    return family


def _by(family: Gauge | Counter, values: Iterable[tuple[str, float]]) -> Metric:
    """The family, with a value for each of its one label's."""
    for label, value in values:
        family.add_metric([label], value)
    return family
