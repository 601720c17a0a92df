"""Webhooks: the operator's routes, and what becomes of a delivery, attempt by attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator, ask_token, bearer
from support.clock import Clock
from support.hooks import URL, call, create, deliveries, parcels, settle

from models import EVENT_GROUPS, EVENT_TYPES, Delivery, Webhook, db
from ops import cleanup


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app that lets webhooks go to this machine."""
    return make_app(WEBHOOK_ALLOW_PRIVATE="1")


def test_creating_answers_the_webhook_and_its_secret_once(client: FlaskClient) -> None:
    created = create(client, events=["agent.*", "token.issued"], max_retries=3)
    assert set(created) == {"webhook", "secret"}
    assert created["secret"].startswith("whsec_")
    assert created["secret"][6:].isalnum()
    shown = call(client, "GET", f"/{created['webhook']['id']}").json
    assert shown == {"webhook": created["webhook"]}
    assert created["webhook"]["events"] == ["agent.*", "token.issued"]
    assert (created["webhook"]["max_retries"], created["webhook"]["is_active"]) == (3, True)
    assert created["secret"] not in call(client, "GET").text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "name"),
        ({"url": None}, "url"),
        ({"url": "ftp://localhost/"}, "url"),
        ({"url": "http://user:pw@localhost/"}, "url"),
        ({"events": []}, "events"),
        ({"events": "*"}, "events"),
        ({"events": ["agent.created", "agent.created"]}, "events"),
        ({"events": ["agent.exploded"]}, "events.0"),
        ({"max_retries": 10}, "max_retries"),
        ({"max_retries": -1}, "max_retries"),
        ({"secret": "mine"}, "secret"),
    ],
    ids=repr,
)
def test_a_bad_field_is_named(client: FlaskClient, fields: dict[str, Any], named: str) -> None:
    response = call(client, "POST", json={"name": "x", "url": URL, "events": ["*"], **fields})
    assert (response.status_code, list(response.json["fields"])) == (400, [named])


def test_event_types_and_groups_are_listed(client: FlaskClient) -> None:
    listed = client.get("/api/webhook-events", headers=OPERATOR).json
    assert listed == {"events": list(EVENT_TYPES), "groups": list(EVENT_GROUPS)}


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_patch_changes_what_it_names(client: FlaskClient, method: str) -> None:
    hook = create(client)
    response = call(client, method, f"/{hook['webhook']['id']}", json={"name": "new", "is_active": False})
    changed = {"name": "new", "is_active": False, "updated_at": response.json["webhook"]["updated_at"]}
    assert response.json["webhook"] == {**hook["webhook"], **changed}


def test_a_deleted_webhook_is_gone_with_its_deliveries(app: Flask, client: FlaskClient) -> None:
    hook = create(client)
    Operator(app).create()
    assert call(client, "DELETE", f"/{hook['webhook']['id']}").status_code == 204
    assert call(client, "GET").json == {"webhooks": []}
    assert parcels(app) == []
    told = client.get("/api/events?type=webhook.*", headers=OPERATOR).json["events"]
    assert [event["type"] for event in told] == ["webhook.deleted", "webhook.created"]
    assert told[0]["data"]["webhook_id"] == hook["webhook"]["id"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/x"),
        ("PATCH", "/x"),
        ("DELETE", "/x"),
        ("POST", "/x/test"),
        ("POST", "/x/rotate"),
        ("GET", "/x/deliveries"),
        ("GET", "/x/deliveries/1"),
        ("POST", "/x/deliveries/1/redeliver"),
    ],
)
def test_an_unknown_webhook_is_404_for_the_operator_only(
    client: FlaskClient, token: dict[str, Any], method: str, path: str
) -> None:
    assert call(client, method, path, json=None if method == "GET" else {}).status_code == 404
    assert client.open(f"/api/webhooks{path}", method=method).status_code == 401
    assert client.open(f"/api/webhooks{path}", method=method, headers=bearer(token)).status_code == 403


@pytest.mark.parametrize(
    ("subscribed", "told"),
    [
        (["*"], ["agent.created", "token.issued", "agent.deactivated"]),
        (["agent.*"], ["agent.created", "agent.deactivated"]),
        (["token.issued"], ["token.issued"]),
        (["agent.deactivated", "token.*"], ["token.issued", "agent.deactivated"]),
        (["key.rotated"], []),
    ],
)
def test_a_webhook_gets_the_events_it_subscribed_to(
    app: Flask, client: FlaskClient, subscribed: list[str], told: list[str]
) -> None:
    hook = create(client, events=subscribed)
    operator = Operator(app)
    agent = operator.create()
    ask_token(client, agent)
    operator.act(agent, "deactivate")
    assert [delivery["type"] for delivery in deliveries(client, hook)[::-1]] == told


def test_a_webhook_that_is_off_gets_no_events(app: Flask, client: FlaskClient) -> None:
    hook = create(client)
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"is_active": False})
    Operator(app).create()
    assert deliveries(client, hook) == []


@pytest.mark.parametrize("path", ["/test", "/deliveries/1/redeliver"])
def test_a_webhook_that_is_off_refuses_test_and_redelivery(
    app: Flask, client: FlaskClient, path: str
) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"is_active": False})
    response = call(client, "POST", f"/{hook['webhook']['id']}{path}")
    assert (response.status_code, response.json["error"]) == (409, "conflict")


def test_an_old_secret_is_forgotten_when_its_time_is_over(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    kept, dropped = create(client), create(client)
    call(client, "POST", f"/{kept['webhook']['id']}/rotate", json={"grace_period": 60})
    call(client, "POST", f"/{dropped['webhook']['id']}/rotate", json={"grace_period": 0})
    with app.app_context():
        for advance, old in ((0, [kept["secret"], None]), (60, [None, None])):
            time_machine.advance(seconds=advance)
            cleanup.sweep()
            assert list(db.session.scalars(sa.select(Webhook.old_secret).order_by(Webhook.pk))) == old


def test_a_test_event_goes_to_this_webhook_alone(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["key.rotated"])
    other = create(client, events=["agent.*"])
    response = call(client, "POST", f"/{hook['webhook']['id']}/test")
    assert (response.status_code, response.json["delivery"]["type"]) == (202, "webhook.test")
    assert [delivery["type"] for delivery in deliveries(client, hook)] == ["webhook.test"]
    assert deliveries(client, other) == []


def test_a_delivery_is_sent_again_under_the_same_id(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    (first,) = parcels(app)
    settle(app, 200)
    (delivery,) = deliveries(client, hook)
    path = f"/{hook['webhook']['id']}/deliveries/{delivery['id']}"
    assert call(client, "POST", f"{path}/redeliver").status_code == 202
    (second,) = parcels(app)
    assert (second.event_id, second.body) == (first.event_id, first.body)
    assert call(client, "GET", path).json["delivery"]["status"] == "pending"


def test_deliveries_are_listed_page_by_page(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    for _ in range(3):
        Operator(app).create()
    path = f"/{hook['webhook']['id']}/deliveries"
    page = call(client, "GET", f"{path}?limit=2").json
    rest = call(client, "GET", f"{path}?limit=2&after={page['next']}").json
    assert [len(page["deliveries"]), len(rest["deliveries"]), rest["next"]] == [2, 1, None]


def test_an_event_is_stored_with_its_deliveries_or_not_at_all(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client)
    before = client.get("/api/events", headers=OPERATOR).json

    def fail(*args: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("agents._add_secret", fail)
    assert client.post("/api/agents", json={"name": "x"}, headers=OPERATOR).status_code == 500
    assert client.get("/api/events", headers=OPERATOR).json == before


def test_the_outbox_is_cleaned_with_the_events(app: Flask, client: FlaskClient) -> None:
    create(client)
    Operator(app).create()
    with app.app_context():
        db.session.execute(sa.text("DELETE FROM events"))
        db.session.commit()
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Delivery)) == 0
