"""`GET /metrics`: what the database holds and what the workers count, for Prometheus."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

import database
import keys
from api import BY_OPERATOR, Blueprint, route_name
from config import VERSION, settings, state
from database import reading
from events import DURATION, REGISTRY
from models import Agent, Delivery, Event, RefreshFamily, Webhook, now

KEPT = 15.0  # seconds between counts of rows: one takes 70 ms with a million refresh tokens
STARTED = time.time()  # in gunicorn's master, before it forks

bp = Blueprint("metrics", __name__, description="Metrics", security=BY_OPERATOR)


@bp.get("/metrics")
@bp.alt_response(200, schema={"type": "string"}, content_type="text/plain")
def show_metrics() -> Response:
    """Get all metrics in Prometheus' text format."""
    return Response(generate_latest(state().metrics), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def init_app(app: Flask) -> None:
    """Time every request of the app, and collect what its database and its processes have counted."""
    app.wsgi_app = _timed(app.wsgi_app)  # type: ignore[method-assign]
    registry = state(app).metrics = CollectorRegistry()
    for collector in (_Database(), MultiProcessCollector(None) if _is_shared() else REGISTRY, _Service()):
        registry.register(collector)


def _is_shared() -> bool:
    """Whether several processes count together, as gunicorn's do."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _timed(wsgi_app: Callable[..., Any]) -> Callable[..., Any]:
    """Time the app from the call to the last header: sending the body takes as long as the client likes."""

    def timed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        began = perf_counter()
        observe = _observer("unmatched", "any", "5xx")

        def start(status: str, *args: Any) -> Any:
            nonlocal observe
            # Flask drops its request soon after.
            request = environ.get("werkzeug.request")
            # The rule, never the raw path: each one that a stranger invents would be a new series.
            if request and request.url_rule:
                observe = _observer(request.url_rule.rule, request.method, f"{status[0]}xx")
            else:
                observe = _observer("unmatched", "any", f"{status[0]}xx")
            return start_response(status, *args)

        try:
            return wsgi_app(environ, start)
        finally:
            observe(perf_counter() - began)

    return timed


@cache  # labels() takes as long as the rest
def _observer(rule: str, method: str, status: str) -> Callable[[float], None]:
    return DURATION.labels(route_name(rule), method, status).observe


class _Database(Collector):
    """State, read at the scrape: the same in every worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[Metric] = []
        self._kept_until = 0.0

    def collect(self) -> Iterator[Metric]:
        with reading() as connection:
            yield from self._collect(connection)

    def _collect(self, connection: sa.Connection) -> Iterator[Metric]:
        with self._lock:  # concurrent scrapes wait for one count
            if time.monotonic() >= self._kept_until:
                self._kept = list(_row_counts(connection))
                self._kept_until = time.monotonic() + KEPT
            kept = self._kept
        yield from kept
        text = "How long the webhook delivery that is due longest has been due; 0 when none is."
        yield GaugeMetricFamily("lanyard_webhook_delivery_overdue_seconds", text, _overdue(connection))
        yield GaugeMetricFamily(
            "lanyard_events", "Events in the audit log, approximately.", _events(connection)
        )
        yield from _signing_keys(connection)
        sizes = database.backend(settings()).sizes(settings(), connection)
        yield _gauge("lanyard_database_size_bytes", "Size of the database's files.", "file", sizes)


def _row_counts(connection: sa.Connection) -> Iterator[Metric]:
    """Count what takes a look at each row."""
    yield _gauge("lanyard_agents", "Registered agents.", "state", _agents(connection))
    text = "Grants whose refresh token works."
    yield GaugeMetricFamily("lanyard_refresh_token_families", text, _families(connection))
    text = "Webhook deliveries still to be made, those of disabled webhooks included."
    yield _gauge("lanyard_webhook_deliveries_waiting", text, "status", _deliveries(connection))


class _Service(Collector):
    """The server as a whole, whichever of its processes answers."""

    def collect(self) -> Iterator[Metric]:
        info = {"version": VERSION, "python_version": platform.python_version()}
        yield InfoMetricFamily("lanyard_build", "Versions of Lanyard and of Python.", info)
        text = "When the server started, in Unix time."
        yield GaugeMetricFamily("lanyard_start_time_seconds", text, STARTED)
        try:
            processes = _processes()
            cpu, memory = sum(map(_cpu_seconds, processes)), sum(map(_memory_bytes, processes))
        except OSError:
            return  # no /proc, or a process has just ended: a gap, since a sum without it would be a reset
        yield CounterMetricFamily("lanyard_cpu_seconds", "Processor time of all processes.", cpu)
        yield GaugeMetricFamily("lanyard_memory_bytes", "Memory of all processes, shared pages once.", memory)


def _processes() -> list[Path]:
    """Return gunicorn's master and its workers in /proc; without gunicorn, this process and its children."""
    first = os.getppid() if _is_shared() else os.getpid()
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return [Path("/proc", pid) for pid in (str(first), *children)]


def _cpu_seconds(process: Path) -> float:
    """Return the time of a process and of its ended children, which is why the sum survives a worker."""
    # proc(5); the second field, in brackets, may hold anything.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _memory_bytes(process: Path) -> int:
    """Return the proportional set size: a page that n processes share counts as an n-th in each."""
    found = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _agents(connection: sa.Connection) -> dict[str, int]:
    expired = sa.and_(Agent.is_active, Agent.expires_at <= now())
    counts = [sa.func.count(), sa.func.count().filter(~Agent.is_active), sa.func.count().filter(expired)]
    counted = connection.execute(sa.select(*counts).select_from(Agent)).one()
    everyone, deactivated, expired_ones = map(int, counted)
    return {
        "active": everyone - deactivated - expired_ones,
        "deactivated": deactivated,
        "expired": expired_ones,
    }


def _families(connection: sa.Connection) -> int:
    # Counting all walks an index only; the few expired ones that await deletion are a short range of another.
    everyone = sa.select(sa.func.count()).select_from(RefreshFamily)
    expired = everyone.where(RefreshFamily.expires_at <= now())
    counted = connection.execute(sa.select(everyone.scalar_subquery(), expired.scalar_subquery())).one()
    return int(counted[0] - counted[1])


def _deliveries(connection: sa.Connection) -> dict[str, int]:
    # The index is by webhook and holds no finished deliveries, which are most of the table.
    waiting = (
        sa.select(Delivery.status, sa.func.count())
        .where(Delivery.webhook_pk.in_(sa.select(Webhook.pk)), Delivery.next_attempt_at.is_not(None))
        .group_by(Delivery.status)
    )
    return {"pending": 0, "retrying": 0} | {status: count for status, count in connection.execute(waiting)}


def _overdue(connection: sa.Connection) -> float:
    first = (
        sa.select(sa.func.min(Delivery.next_attempt_at))
        .where(Delivery.webhook_pk == Webhook.pk, Delivery.next_attempt_at.is_not(None))
        .scalar_subquery()
    )
    dues = connection.scalars(sa.select(first).where(Webhook.is_active))
    waits = [(now() - due).total_seconds() for due in dues if due is not None]
    return max([0.0, *waits])


def _events(connection: sa.Connection) -> int:
    # Keys are consecutive and the oldest are deleted first; a count would read a million index entries.
    ends = [sa.select(end(Event.pk)).scalar_subquery() for end in (sa.func.min, sa.func.max)]
    oldest, newest = connection.execute(sa.select(*ends)).one()
    return 0 if oldest is None else newest - oldest + 1


def _signing_keys(connection: sa.Connection) -> tuple[Metric, Metric]:
    text = "When the current signing key was made, in Unix time."
    made = GaugeMetricFamily("lanyard_signing_key_created_timestamp_seconds", text, labels=["alg"])
    text = "When the published next key starts to sign, in Unix time."
    following = GaugeMetricFamily("lanyard_signing_key_next_timestamp_seconds", text, labels=["alg"])
    for key in keys.list_keys(connection):
        if key.state == "signing":
            made.add_metric([key.alg], key.created_at.timestamp())
        elif key.state == "published":
            following.add_metric([key.alg], key.signs_from.timestamp())
    return made, following


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for of, value in values.items():
        family.add_metric([of], value)
    return family
