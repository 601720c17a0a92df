"""The counters that `/metrics` shows, over all processes of the server (`ops/metrics_files.py`)."""

from __future__ import annotations

from flask import g, has_request_context
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

disable_created_metrics()  # multiprocess mode has none

REGISTRY = CollectorRegistry()  # the library's own has metrics of one process in it

DURATION = Histogram(
    "lanyard_http_request_duration_seconds",
    "Requests, by how long they took to answer.",
    ["route", "method", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
FAILURES = Counter(
    "lanyard_auth_failures",
    "Requests whose authentication failed, by the first reason met.",
    ["reason"],
    registry=REGISTRY,
)
TOKENS = {
    "issued": Counter("lanyard_tokens_issued", "Grants made for client credentials.", registry=REGISTRY),
    "refreshed": Counter("lanyard_tokens_refreshed", "Refresh tokens exchanged.", registry=REGISTRY),
    "revoked": Counter("lanyard_tokens_revoked", "Tokens ended by revocation.", registry=REGISTRY),
    "reused": Counter(
        "lanyard_refresh_token_reuses", "Refresh tokens used twice, ending their grant.", registry=REGISTRY
    ),
}
ATTEMPTS = Counter(
    "lanyard_webhook_attempts",
    "Attempts at webhook deliveries, by the status they left the delivery in.",
    ["status"],
    registry=REGISTRY,
)

# A series that appears with its first event has no rate for that event: start each at 0.
for reason in (
    "wrong_secret",
    "unknown_client",
    "malformed",
    "assertion",
    "inactive_agent",
    "admin_token",
    "access_token",
    "throttled",
):
    FAILURES.labels(reason)
for status in ("delivered", "retrying", "dead"):
    ATTEMPTS.labels(status)


def count_failure(reason: str) -> None:
    """Count a failed authentication; of one request only the first."""
    if has_request_context() and not g.get("has_failed"):
        g.has_failed = True
        FAILURES.labels(reason).inc()


def count_token(what: str) -> None:
    """Count what happened to a token or to a family of refresh tokens, one of TOKENS."""
    TOKENS[what].inc()


def count_attempt(status: str) -> None:
    """Count an attempt at a webhook delivery by the status it left the delivery in."""
    ATTEMPTS.labels(status).inc()
