"""Webhooks of an app in this process, and attempts to deliver that end as a test says."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR
from werkzeug.test import TestResponse

from webhooks import delivery
from webhooks.delivery import Outcome

URL = "http://localhost:9/hook"


def call(client: FlaskClient, method: str, path: str = "", **kwargs: Any) -> TestResponse:
    return client.open(f"/api/webhooks{path}", method=method, headers=OPERATOR, **kwargs)


def create(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    response = call(client, "POST", json={"name": "hook", "url": URL, "events": ["*"], **fields})
    assert response.status_code == 201, response.text
    return dict(response.json)


def deliveries(client: FlaskClient, hook: dict[str, Any], query: str = "") -> list[dict[str, Any]]:
    return list(call(client, "GET", f"/{hook['webhook']['id']}/deliveries{query}").json["deliveries"])


def due_deliveries(app: Flask) -> list[Any]:
    """What the deliverer would send now."""
    with app.app_context():
        return delivery.Deliverer(app)._due()


def settle(app: Flask, status: int | None, **answer: Any) -> int:
    """Let every attempt that is due end so; returns how many there were."""
    due = due_deliveries(app)
    outcome = Outcome(status, **answer)
    with app.app_context():
        for attempt in due:
            delivery._record_outcome(attempt, outcome)
    return len(due)
