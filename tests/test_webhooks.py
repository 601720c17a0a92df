"""Webhooks: the operator's routes, and what becomes of a delivery, attempt by attempt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient
from standardwebhooks import Webhook as Verifier
from support.callers import OPERATOR, Operator, ask_token, bearer
from support.clock import Clock
from support.instances import close, contents, engine_of, settings_for
from werkzeug.test import TestResponse

import events
from app import create_app
from config import SettingError
from models import Delivery, Webhook, db, decrypt
from ops import cleanup
from webhooks import delivery
from webhooks.delivery import Outcome

URL = "http://localhost:9/hook"


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app that lets webhooks go to this machine."""
    return make_app(WEBHOOK_ALLOW_PRIVATE="1")


def call(client: FlaskClient, method: str, path: str = "", **kwargs: Any) -> TestResponse:
    return client.open(f"/api/webhooks{path}", method=method, headers=OPERATOR, **kwargs)


def create(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    response = call(client, "POST", json={"name": "hook", "url": URL, "events": ["*"], **fields})
    assert response.status_code == 201, response.text
    return dict(response.json)


def deliveries(client: FlaskClient, hook: dict[str, Any], query: str = "") -> list[dict[str, Any]]:
    return list(call(client, "GET", f"/{hook['webhook']['id']}/deliveries{query}").json["deliveries"])


def parcels(app: Flask) -> list[delivery.Parcel]:
    """What the deliverer would send now."""
    with app.app_context():
        return delivery.Deliverer(app)._due()


def settle(app: Flask, status: int | None, **answer: Any) -> int:
    """Let every attempt that is due end so; returns how many there were."""
    due = parcels(app)
    outcome = Outcome(status, answer.get("body"), answer.get("error"), answer.get("retry_after"))
    with app.app_context():
        for parcel in due:
            delivery._settle(parcel, outcome)
    return len(due)


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


def test_what_may_be_subscribed_to_is_listed(client: FlaskClient) -> None:
    listed = client.get("/api/webhook-events", headers=OPERATOR).json
    assert listed == {"events": list(events.TYPES), "groups": list(events.GROUPS)}


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
def test_an_unknown_webhook_is_not_found_and_only_for_the_operator(
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
def test_a_webhook_is_told_what_it_subscribed_to(
    app: Flask, client: FlaskClient, subscribed: list[str], told: list[str]
) -> None:
    hook = create(client, events=subscribed)
    operator = Operator(app)
    agent = operator.create()
    ask_token(client, agent)
    operator.act(agent, "deactivate")
    assert [delivery["type"] for delivery in deliveries(client, hook)[::-1]] == told


def test_a_webhook_that_is_off_is_told_nothing(app: Flask, client: FlaskClient) -> None:
    hook = create(client)
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"is_active": False})
    Operator(app).create()
    assert deliveries(client, hook) == []


def test_a_parcel_is_signed_as_standard_webhooks_says(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    agent = Operator(app).create(name="night-reporter")
    (parcel,) = parcels(app)
    with app.app_context():
        headers = delivery._headers(parcel)
    body = Verifier(hook["secret"]).verify(parcel.body, headers)
    assert set(body) == {"id", "type", "timestamp", "data"}
    assert (body["id"], body["type"]) == (headers["webhook-id"], "agent.created")
    assert body["data"] == {
        "agent_id": agent["agent"]["id"],
        "agent_name": "night-reporter",
        "client_id": agent["client_id"],
    }


def test_after_a_rotation_both_secrets_sign_for_a_while(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    hook = create(client, events=["agent.created"])
    path = f"/{hook['webhook']['id']}/rotate"
    new = call(client, "POST", path, json={"grace_period": 60}).json["secret"]
    Operator(app).create()

    def signatures() -> list[str]:
        (parcel,) = parcels(app)
        assert len(parcel.secrets) == len(set(parcel.secrets))
        return list(parcel.secrets)

    assert signatures() == [new, hook["secret"]]
    time_machine.advance(seconds=60)
    assert signatures() == [new]


def test_a_2xx_is_success(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    (before,) = deliveries(client, hook)
    assert (before["status"], before["attempts"]) == ("pending", 0)
    assert settle(app, 204, body="") == 1
    (after,) = deliveries(client, hook)
    assert (after["status"], after["attempts"], after["response_status"]) == ("delivered", 1, 204)
    assert (after["next_attempt_at"], after["error"]) == (None, None)
    assert settle(app, 200) == 0


def test_whatever_a_receiver_says_is_written_down(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    assert settle(app, 500, body="a\0b", error="BadStatusLine: \0") == 1
    (delivery,) = deliveries(client, hook)
    assert (delivery["response_body"], delivery["error"]) == ("a\ufffdb", "BadStatusLine: \ufffd")


def test_failures_are_retried_on_the_schedule_and_then_given_up(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    for number, pause in enumerate(delivery.SCHEDULE, start=1):
        assert settle(app, 500, body="oh no") == 1
        (found,) = deliveries(client, hook)
        assert (found["status"], found["attempts"]) == ("retrying", number)
        assert (found["response_status"], found["response_body"]) == (500, "oh no")
        time_machine.advance(seconds=pause - 1)
        assert settle(app, 500) == 0, "not before its time"
        time_machine.advance(seconds=pause * delivery.JITTER + 2)
    assert settle(app, None, error="ConnectionRefusedError") == 1
    (found,) = deliveries(client, hook, "?status=dead")
    assert (found["attempts"], found["error"]) == (10, "ConnectionRefusedError")
    assert settle(app, 500) == 0


def test_a_webhook_says_how_often_to_retry(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"], max_retries=0)
    Operator(app).create()
    settle(app, 500)
    assert deliveries(client, hook)[0]["status"] == "dead"


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("120", 120),
        ("0", 5),
        ("99999999999", 86_400),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 5),
        ("Fri, 31 Dec 2999 00:00:00 GMT", 86_400),
    ],
)
def test_a_receiver_may_say_when_to_come_back(
    app: Flask, client: FlaskClient, time_machine: Clock, asked: str, seconds: int
) -> None:
    create(client, events=["agent.created"])
    Operator(app).create()
    settle(app, 503, retry_after=asked)
    time_machine.advance(seconds=seconds - 1)
    assert parcels(app) == []
    time_machine.advance(seconds=1)
    assert len(parcels(app)) == 1


def test_a_410_switches_the_webhook_off_and_tells(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    settle(app, 410)
    shown = call(client, "GET", f"/{hook['webhook']['id']}").json["webhook"]
    assert (shown["is_active"], shown["disabled_reason"]) == (False, "The receiver answered 410 Gone.")
    assert deliveries(client, hook)[0]["status"] == "dead"
    told = client.get("/api/events?type=webhook.updated", headers=OPERATOR).json["events"]
    assert told[0]["data"]["disabled_reason"] == "The receiver answered 410 Gone."


def test_a_410_from_an_address_it_has_left_switches_nothing_off(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    (parcel,) = parcels(app)
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"url": "http://localhost:9/new"})
    with app.app_context():
        delivery._settle(parcel, Outcome(410, "", None, None))
    assert call(client, "GET", f"/{hook['webhook']['id']}").json["webhook"]["is_active"] is True


def test_a_redelivery_asked_for_during_an_attempt_is_still_to_come(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    hook = create(client, events=["agent.created"], max_retries=0)
    Operator(app).create()
    (parcel,) = parcels(app)
    time_machine.advance(seconds=1)
    (delivery,) = deliveries(client, hook)
    path = f"/{hook['webhook']['id']}/deliveries/{delivery['id']}/redeliver"
    assert call(client, "POST", path).status_code == 202
    with app.app_context():
        delivery._settle(parcel, Outcome(500, "", None, None))
    assert len(parcels(app)) == 1


@pytest.mark.parametrize("path", ["/test", "/deliveries/1/redeliver"])
def test_a_webhook_that_is_off_sends_nothing_on_request(app: Flask, client: FlaskClient, path: str) -> None:
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


def test_many_dead_hosts_leave_room_for_a_healthy_one(app: Flask, client: FlaskClient) -> None:
    for _ in range(40):
        create(client, events=["agent.created"])
    Operator(app).create()
    while settle(app, 500, retry_after="0"):
        pass
    create(client, events=["agent.created"], url="http://localhost:9/healthy")
    for _ in range(20):
        Operator(app).create()
    busy = delivery.Deliverer(app)
    with app.app_context():
        due = busy._due()
        busy._flying = {parcel.delivery: parcel for parcel in due}
        assert busy._due() == [], "the other dead hosts wait for these"
    assert sum(parcel.url.endswith("/healthy") for parcel in due) == delivery.IN_FLIGHT_EACH
    assert len(due) == delivery.IN_FLIGHT_EACH + delivery.IN_FLIGHT_FAILING


def test_five_days_of_nothing_but_failures_switch_it_off(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    hook = create(client, events=["agent.created"], max_retries=0)
    operator = Operator(app)

    def fail_on(days: float, status: int = 500) -> bool:
        time_machine.advance(days=days)
        operator.create()
        settle(app, status)
        return bool(call(client, "GET", f"/{hook['webhook']['id']}").json["webhook"]["is_active"])

    assert fail_on(0)
    assert fail_on(4.9)
    assert fail_on(0.05, status=200), "one success begins the count anew"
    assert fail_on(0.05)
    assert fail_on(4.9)
    assert not fail_on(0.1)
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"is_active": True})
    assert fail_on(1), "switched on again, it has a clean slate"


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


def test_one_webhook_never_takes_all_the_places(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"], name="busy")
    for _ in range(20):
        Operator(app).create()
    create(client, events=["agent.created"], name="quiet", url="http://localhost:9/quiet")
    Operator(app).create()
    due = parcels(app)
    assert sum(parcel.url == URL for parcel in due) == delivery.IN_FLIGHT_EACH
    assert sum(parcel.url != URL for parcel in due) == 1


def test_a_webhook_that_fails_has_one_place_until_it_takes_something(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"])
    for _ in range(20):
        Operator(app).create()
    assert settle(app, 500) == delivery.IN_FLIGHT_EACH
    assert settle(app, 200) == 1
    assert settle(app, 200) == delivery.IN_FLIGHT_EACH


def test_an_event_and_its_deliveries_are_written_together_or_not_at_all(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client)
    before = client.get("/api/events", headers=OPERATOR).json

    def fail(*args: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("agents._add_secret", fail)
    assert client.post("/api/agents", json={"name": "x"}, headers=OPERATOR).status_code == 500
    assert client.get("/api/events", headers=OPERATOR).json == before


def test_the_address_is_checked_again_at_delivery(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    client = app.test_client()
    answer = ["1.1.1.1"]
    found: Any = lambda *args, **kwargs: [(2, 1, 6, "", (answer[0], 443))]  # noqa: E731
    monkeypatch.setattr("socket.getaddrinfo", found)
    create(client, url="https://hooks.example.com/", events=["agent.created"])
    Operator(app).create()
    answer[0] = "169.254.169.254"
    (parcel,) = parcels(app)
    with app.app_context():
        assert delivery._send(parcel) == Outcome(None, None, "Refused: The host has a private address.", None)


# Secrets at rest


def test_with_a_secret_key_nothing_that_signs_is_in_the_file_in_clear(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    key = Fernet.generate_key().decode()
    app = make_app(SECRET_KEY=key, WEBHOOK_ALLOW_PRIVATE="1", INSTANCE=str(tmp_path / "sealed"))
    secret = create(app.test_client())["secret"]
    assert ask_token(app.test_client(), Operator(app).create()).status_code == 200
    files = contents(tmp_path / "sealed")
    assert secret.encode() not in files
    assert b'"qi"' not in files
    with app.app_context():
        assert decrypt(parcels(app)[0].secrets[0], (key,)) == secret


def test_without_a_secret_key_they_are(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1", INSTANCE=str(tmp_path / "open"))
    secret = create(app.test_client())["secret"]
    files = contents(tmp_path / "open")
    assert secret.encode() in files
    assert b"qi" in files


def test_keys_are_changed_by_putting_a_new_one_first(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    place = {"WEBHOOK_ALLOW_PRIVATE": "1", "INSTANCE": str(tmp_path / "sealed")}
    app = make_app(**place)
    secret = create(app.test_client())["secret"]
    for keys in (old, f"{new},{old}", new):
        close(app)
        app = make_app(SECRET_KEY=keys, **place)
        Operator(app).create()
        with app.app_context():
            (sealed,) = {s for parcel in parcels(app) for s in parcel.secrets}
            assert (sealed != secret, decrypt(sealed, tuple(keys.split(",")))) == (True, secret)
        assert ask_token(app.test_client(), Operator(app).create()).status_code == 200
    for wrong in ("", old):
        with pytest.raises(SettingError, match="LANYARD_SECRET_KEY must hold the key"):
            make_app(SECRET_KEY=wrong, **place)


def stored_secrets(folder: Path) -> list[str]:
    with engine_of(folder).connect() as connection:
        found = "SELECT jwk FROM signing_keys UNION ALL SELECT secret FROM webhooks"
        return list(connection.scalars(sa.text(found)))


def test_a_command_seals_nothing(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    create(app.test_client())
    close(app)
    before = stored_secrets(tmp_path / "instance")
    create_app(settings_for(tmp_path / "instance", SECRET_KEY=Fernet.generate_key().decode()))
    assert stored_secrets(tmp_path / "instance") == before


def test_nothing_is_sealed_while_another_server_runs_which_may_lack_the_key(
    make_app: Callable[..., Flask], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    create(running.test_client())
    before, key = stored_secrets(tmp_path / "instance"), Fernet.generate_key().decode()
    second = make_app(SECRET_KEY=key)
    assert stored_secrets(tmp_path / "instance") == before
    for app in (running, second):
        close(app)
    make_app(SECRET_KEY=key)
    assert {text[:7] for text in stored_secrets(tmp_path / "instance")} == {"fernet:"}
    assert "nothing starts without it" in caplog.text


def test_a_server_that_lacks_the_key_of_the_signing_key_is_not_ready(
    make_app: Callable[..., Flask], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    agent = Operator(app).create()
    with engine_of(tmp_path / "instance").begin() as connection:
        connection.execute(sa.text("UPDATE signing_keys SET jwk = 'fernet:x'"))
    refused = [app.test_client().get("/health/ready"), ask_token(app.test_client(), agent)]
    assert [answer.status_code for answer in refused] == [503, 503]
    assert "LANYARD_SECRET_KEY must hold the key" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_secret_that_cannot_be_read_fails_its_own_delivery_only(app: Flask, client: FlaskClient) -> None:
    broken, fine = create(client, events=["agent.created"]), create(client, events=["agent.created"])
    with app.app_context():
        values = {"id": broken["webhook"]["id"]}
        db.session.execute(sa.text("UPDATE webhooks SET secret = 'fernet:x' WHERE id = :id"), values)
        db.session.commit()
    Operator(app).create()
    with app.app_context():
        for parcel in parcels(app):
            delivery._settle(parcel, delivery._send(parcel))
    assert "LANYARD_SECRET_KEY" in deliveries(client, broken)[0]["error"]
    assert "LANYARD_SECRET_KEY" not in str(deliveries(client, fine)[0]["error"])


@pytest.mark.parametrize("key", ["short", "x" * 44, "é" * 44])
def test_a_secret_key_that_is_none_stops_the_start(make_app: Callable[..., Flask], key: str) -> None:
    with pytest.raises(SettingError, match="LANYARD_SECRET_KEY must be") as caught:
        make_app(SECRET_KEY=key)
    assert key not in str(caught.value)


def test_the_outbox_is_cleaned_with_the_events(app: Flask, client: FlaskClient) -> None:
    create(client)
    Operator(app).create()
    with app.app_context():
        db.session.execute(sa.text("DELETE FROM events"))
        db.session.commit()
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Delivery)) == 0


def test_a_body_is_plain_json(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"])
    Operator(app).create(name="Ünïcode 🤖")
    (parcel,) = parcels(app)
    assert json.loads(parcel.body)["data"]["agent_name"] == "Ünïcode 🤖"
