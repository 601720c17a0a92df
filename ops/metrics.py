"""`GET /metrics`: gauges read from the database, and what the workers have counted, for Prometheus."""

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

import sqlalchemy as sa
from flask import Flask, Response, g, request
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

ROW_COUNT_AGE = 15.0  # seconds for which counts of rows are cached: one takes 70 ms with a million tokens
STARTED = time.time()  # in gunicorn's master, before it forks
# Whether several processes count together, as gunicorn's do.
_IS_SHARED = "PROMETHEUS_MULTIPROC_DIR" in os.environ

bp = Blueprint("metrics", __name__, description="Metrics", security=BY_OPERATOR)


@bp.get("/metrics")
@bp.alt_response(200, schema={"type": "string"}, content_type="text/plain")
def show_metrics() -> Response:
    """Get all metrics in Prometheus' text format."""
    return Response(generate_latest(state().metrics), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def init_app(app: Flask) -> None:
    """Time every request, and register what `/metrics` shows.

    Call it before other hooks are registered: the first one in runs first before a request and last after it.
    """
    app.before_request(_start)
    app.after_request(_observe)
    registry = state(app).metrics = CollectorRegistry()
    for collector in (_Database(), MultiProcessCollector(None) if _IS_SHARED else REGISTRY, _Service()):
        registry.register(collector)


def _start() -> None:
    g.started = perf_counter()


def _observe(response: Response) -> Response:
    # The rule, never the raw path: each invented path would be a new series.
    rule, method = (request.url_rule.rule, request.method) if request.url_rule else ("unmatched", "any")
    _observer(rule, method, f"{response.status_code // 100}xx")(perf_counter() - g.started)
    return response


@cache  # labels() takes as long as the rest of the timing
def _observer(rule: str, method: str, status: str) -> Callable[[float], None]:
    return DURATION.labels(route_name(rule), method, status).observe


class _Database(Collector):
    """Gauges read from the database, the same in every worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: list[Metric] = []
        self._cached_until = 0.0

    def collect(self) -> Iterator[Metric]:
        with reading() as connection:
            with self._lock:  # concurrent scrapes wait for one count
                if time.monotonic() >= self._cached_until:
                    self._cached = list(_row_counts(connection))
                    self._cached_until = time.monotonic() + ROW_COUNT_AGE
            yield from self._cached
            yield from _cheap_gauges(connection)


def _row_counts(connection: sa.Connection) -> Iterator[Metric]:
    yield _gauge("lanyard_agents", "Registered agents.", "state", _agents(connection))
    text = "Grants whose refresh token has not expired."
    yield GaugeMetricFamily("lanyard_refresh_token_families", text, _families(connection))
    text = "Webhook deliveries still to be made, those of disabled webhooks included."
    yield _gauge("lanyard_webhook_deliveries_waiting", text, "status", _deliveries(connection))


def _cheap_gauges(connection: sa.Connection) -> Iterator[Metric]:
    text = "How long the webhook delivery that is due longest has been due; 0 when none is."
    yield GaugeMetricFamily("lanyard_webhook_delivery_overdue_seconds", text, _overdue(connection))
    text = "Events in the audit log, approximately."
    yield GaugeMetricFamily("lanyard_events", text, _events(connection))
    yield from _signing_keys(connection)
    sizes = database.backend(settings()).sizes(settings(), connection)
    yield _gauge("lanyard_database_size_bytes", "Size of the database's files.", "file", sizes)


class _Service(Collector):
    """Metrics of the server as a whole, the same in every worker."""

    def collect(self) -> Iterator[Metric]:
        info = {"version": VERSION, "python_version": platform.python_version()}
        yield InfoMetricFamily("lanyard_build", "Versions of Lanyard and of Python.", info)
        text = "When the server started, in Unix time."
        yield GaugeMetricFamily("lanyard_start_time_seconds", text, STARTED)
        try:
            processes = _processes()
            cpu, memory = sum(map(_cpu_seconds, processes)), sum(map(_memory_bytes, processes))
        except OSError:
            return  # no /proc, or a process has just ended: a sum without it would look like a reset
        yield CounterMetricFamily("lanyard_cpu_seconds", "Processor time of all processes.", cpu)
        yield GaugeMetricFamily("lanyard_memory_bytes", "Memory of all processes, shared pages once.", memory)


def _processes() -> list[Path]:
    """Return gunicorn's master and its workers in /proc; without gunicorn, this process and its children."""
    first = os.getppid() if _IS_SHARED else os.getpid()
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return [Path("/proc", pid) for pid in (str(first), *children)]


def _cpu_seconds(process: Path) -> float:
    """Return the time of a process and of its ended children, which is why the sum survives a worker."""
    # proc(5); the second field, in brackets, may hold anything.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _memory_bytes(process: Path) -> int:
    """Return the proportional set size: a page that n processes share counts as an n-th in each."""
    size = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
    return int(size[1]) * 1024 if size else 0


def _agents(connection: sa.Connection) -> dict[str, int]:
    expired = sa.and_(Agent.is_active, Agent.expires_at <= now())
    counts = [sa.func.count(), sa.func.count().filter(~Agent.is_active), sa.func.count().filter(expired)]
    total, deactivated, ended = map(int, connection.execute(sa.select(*counts).select_from(Agent)).one())
    return {"active": total - deactivated - ended, "deactivated": deactivated, "expired": ended}


def _families(connection: sa.Connection) -> int:
    # Counting all reads one index; the few that have expired and await deletion are a short range of another.
    total = sa.select(sa.func.count()).select_from(RefreshFamily)
    expired = total.where(RefreshFamily.expires_at <= now())
    return int(connection.scalar(sa.select(total.scalar_subquery() - expired.scalar_subquery())) or 0)


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


def _signing_keys(connection: sa.Connection) -> Iterator[Metric]:
    listed = keys.list_keys(connection)
    signing = {key.alg: key.created_at.timestamp() for key in listed if key.state == "signing"}
    text = "When the current signing key was made, in Unix time."
    yield _gauge("lanyard_signing_key_created_timestamp_seconds", text, "alg", signing)
    following = {key.alg: key.signs_from.timestamp() for key in listed if key.state == "published"}
    text = "When the published next key starts to sign, in Unix time."
    yield _gauge("lanyard_signing_key_next_timestamp_seconds", text, "alg", following)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family
