"""Deliveries: each attempt in this process, then from real servers that are killed to a real receiver."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from standardwebhooks import Webhook as Verifier
from support import postgresql as on_postgresql
from support.callers import OPERATOR, Operator
from support.clock import Clock
from support.hooks import URL, call, create, deliveries, due_deliveries, settle
from support.hostile import TEN, listening
from support.instances import engine_of
from support.receiver import Receiver
from support.servers import Server, register, token_body

from database import writing
from models import db
from webhooks import delivery
from webhooks.delivery import Outcome

Serve = Callable[..., Server]


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app that lets webhooks go to this machine."""
    return make_app(WEBHOOK_ALLOW_PRIVATE="1")


def subscribe(server: Server, url: str, *events: str) -> str:
    body = {"name": "hook", "url": url, "events": events or ["*"]}
    response = requests.post(f"{server.url}/api/webhooks", json=body)
    assert response.status_code == 201, response.text
    return str(response.json()["secret"])


def test_a_delivery_arrives_and_its_signature_verifies(
    serve: Serve, receive: Callable[..., Receiver]
) -> None:
    server, receiver = serve(LOCAL="1").wait(), receive()
    secret = subscribe(server, receiver.url, "agent.created")
    agent = register(server, name="night-reporter")
    receiver.wait_for(lambda: len(receiver.taken) == 1)
    headers, raw = receiver.taken[0]
    body = Verifier(secret).verify(raw, headers)
    assert body["type"] == "agent.created"
    assert body["data"]["agent_id"] == agent["agent"]["id"]
    assert headers["webhook-id"] == body["id"]
    assert headers["Content-Type"] == "application/json"


def kill_everything(server: Server) -> None:
    """As a power cut would: the master and all its workers, without a word."""
    for pid in [server.process.pid, *server.workers()]:
        os.kill(pid, signal.SIGKILL)
    server.process.wait(10)


def test_acknowledged_events_arrive_though_the_server_is_killed(
    serve: Serve, receive: Callable[..., Receiver]
) -> None:
    chance = random.Random(7)
    seen: Counter[str] = Counter()

    def fail_at_random(event_id: str) -> int:
        # Only first attempts fail: the second retry is five minutes away.
        seen[event_id] += 1
        return 500 if seen[event_id] == 1 and chance.random() < 0.3 else 204

    receiver = receive(fail_at_random)
    first = serve(LOCAL="1").wait()
    secret = subscribe(first, receiver.url, "agent.created")
    acknowledged: list[str] = []

    def burst() -> None:
        with requests.Session() as session:
            for _ in range(200):
                try:
                    response = session.post(f"{first.url}/api/agents", json={"name": "x"}, timeout=10)
                except requests.RequestException:
                    return
                if response.status_code == 201:
                    acknowledged.append(response.json()["agent"]["id"])

    clients = [threading.Thread(target=burst) for _ in range(4)]
    for client in clients:
        client.start()
    while len(acknowledged) < 80:
        time.sleep(0.01)
    kill_everything(first)
    for client in clients:
        client.join()
    assert len(acknowledged) >= 80
    serve(LOCAL="1").wait()

    def told() -> set[str]:
        return {body["data"]["agent_id"] for body in receiver.bodies()}

    receiver.wait_for(lambda: set(acknowledged) <= told())
    for headers, raw in receiver.taken:
        Verifier(secret).verify(raw, headers)


HOLDER = """
    SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE locktype = 'advisory' AND objid = 3 AND granted AND datname = current_database()
"""


def holder_of_the_lease(server: Server) -> int:
    """The process that delivers, as the kernel or PostgreSQL knows it."""
    if on_postgresql.is_used():
        with engine_of(server.instance).connect() as connection:
            found = connection.exec_driver_sql(HOLDER).scalar_one()
            return int(found.rpartition(" ")[2])
    inode = (server.instance / "lanyard.db.deliverer").stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    (pid,) = {lock[4] for lock in locks if lock[1] == "FLOCK" and lock[5].endswith(f":{inode}")}
    return int(pid)


def test_another_worker_takes_over_when_the_deliverers_dies(
    serve: Serve, receive: Callable[..., Receiver]
) -> None:
    server, receiver = serve(LOCAL="1", WORKERS="3").wait(), receive()
    subscribe(server, receiver.url, "agent.created")
    for times in (1, 2, 3):
        register(server)
        receiver.wait_for(lambda times=times: len(receiver.ids()) == times)
        os.kill(holder_of_the_lease(server), signal.SIGKILL)
    register(server)
    receiver.wait_for(lambda: len(receiver.ids()) == 4)


def test_a_dead_host_does_not_delay_other_deliveries(serve: Serve, receive: Callable[..., Receiver]) -> None:
    server, receiver = serve(LOCAL="1").wait(), receive()
    with socket.create_server(("127.0.0.1", 0)) as never_answers:
        subscribe(server, f"http://localhost:{never_answers.getsockname()[1]}/", "token.issued")
        agent = register(server)
        with requests.Session() as session:
            for _ in range(300):
                assert session.post(f"{server.url}/oauth/token", json=token_body(agent)).status_code == 200
        subscribe(server, receiver.url, "agent.created")
        register(server)
        receiver.wait_for(lambda: len(receiver.taken) == 1, seconds=8)
        server.process.kill()


def test_ten_hostile_receivers_do_not_delay_a_healthy_one(
    serve: Serve, receive: Callable[..., Receiver]
) -> None:
    server, receiver = serve(LOCAL="1").wait(), receive()
    with ExitStack() as hostile:
        for behave in TEN:
            subscribe(server, hostile.enter_context(listening(behave)), "agent.created")
        for _ in range(20):
            register(server)
        subscribe(server, receiver.url, "key.rotated")
        delays = []
        for count in range(1, 6):
            requests.post(f"{server.url}/api/keys/rotate", json={}).raise_for_status()
            started = time.monotonic()
            receiver.wait_for(lambda count=count: len(receiver.taken) == count)
            delays.append(time.monotonic() - started)
            time.sleep(0.5)
        server.kill()
    assert max(delays) < 3, delays  # 0.3 on a quiet machine


def test_a_graceful_stop_lets_a_delivery_in_flight_finish(
    serve: Serve, receive: Callable[..., Receiver]
) -> None:
    arrived = threading.Event()

    def slowly(event_id: str) -> int:
        arrived.set()
        time.sleep(1)
        return 204

    receiver = receive(slowly)
    server = serve(LOCAL="1").wait()
    subscribe(server, receiver.url, "agent.created")
    register(server)
    assert arrived.wait(10)
    server.stop()
    again = serve(LOCAL="1").wait()
    (hook,) = requests.get(f"{again.url}/api/webhooks").json()["webhooks"]
    (delivery,) = requests.get(f"{again.url}/api/webhooks/{hook['id']}/deliveries").json()["deliveries"]
    assert (delivery["status"], delivery["attempts"]) == ("delivered", 1)


def test_one_delivery_at_a_time_waits_for_the_write_lock(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's lock knows no queue: sixteen that fail all the time would starve the requests."""
    inside: list[int] = []
    seen: list[int] = []

    @contextmanager
    def watched(**options: Any) -> Iterator[Any]:
        inside.append(1)
        with writing(**options) as connection:
            time.sleep(0.01)
            seen.append(len(inside))
            yield connection
        inside.pop()

    def settle() -> None:
        with app.app_context():
            delivery._record_outcome(attempt, delivery.Outcome(error="no answer"))

    attempt = SimpleNamespace(pk=1, webhook_pk=1)
    monkeypatch.setattr(delivery, "writing", watched)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(settle) for _ in range(8)]:
            future.result()
    assert seen == [1] * 8


def test_a_delivery_is_signed_as_standard_webhooks_says(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    agent = Operator(app).create(name="night-reporter")
    (attempt,) = due_deliveries(app)
    with app.app_context():
        raw = delivery._body(attempt)
        headers = delivery._headers(attempt, raw)
    body = Verifier(hook["secret"]).verify(raw, headers)
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
        (attempt,) = due_deliveries(app)
        with app.app_context():
            return delivery._secrets(attempt)

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


def test_any_response_of_a_receiver_can_be_stored(app: Flask, client: FlaskClient) -> None:
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
    for number, pause in enumerate(delivery.RETRY_DELAYS, start=1):
        assert settle(app, 500, body="oh no") == 1
        (found,) = deliveries(client, hook)
        assert (found["status"], found["attempts"]) == ("retrying", number)
        assert (found["response_status"], found["response_body"]) == (500, "oh no")
        time_machine.advance(seconds=pause - 1)
        assert settle(app, 500) == 0, "not before its time"
        time_machine.advance(seconds=pause * delivery.RETRY_JITTER + 2)
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
        ("9" * 5000, 86_400),
        ("0" * 5000 + "120", 120),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 5),
        ("Fri, 31 Dec 2999 00:00:00 GMT", 86_400),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 86_400),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_receiver_may_say_when_to_come_back(
    app: Flask, client: FlaskClient, time_machine: Clock, asked: str, seconds: int
) -> None:
    create(client, events=["agent.created"])
    Operator(app).create()
    settle(app, 503, retry_after=asked)
    time_machine.advance(seconds=seconds - 1)
    assert due_deliveries(app) == []
    time_machine.advance(seconds=1)
    assert len(due_deliveries(app)) == 1


@pytest.mark.parametrize(
    "malformed",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2035 99999999999999999999:00:00 GMT",
        "Mon, 01 Jan 2035 00:00:00 +9999999999999999",
        "Mon, 01 Jan " + "9" * 5000 + " 00:00:00 GMT",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "\u0661\u0662",
        "\xb2",
        "-5",
        "1e5",
        "inf",
        "nan",
        "",
        "\0",
    ],
    ids=ascii,
)
def test_a_retry_after_of_any_shape_ends_in_the_schedule(
    app: Flask, client: FlaskClient, time_machine: Clock, malformed: str
) -> None:
    hook = create(client, events=["agent.created"], max_retries=1)
    Operator(app).create()
    settle(app, 503, retry_after=malformed)
    time_machine.advance(seconds=delivery.RETRY_DELAYS[0] * (1 + delivery.RETRY_JITTER) + 1)
    settle(app, 503, retry_after=malformed)
    (found,) = deliveries(client, hook)
    assert (found["status"], found["attempts"]) == ("dead", 2)


def test_a_410_disables_the_webhook_and_is_an_event(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    settle(app, 410)
    shown = call(client, "GET", f"/{hook['webhook']['id']}").json["webhook"]
    assert (shown["is_active"], shown["disabled_reason"]) == (False, "The receiver answered 410 Gone.")
    assert deliveries(client, hook)[0]["status"] == "dead"
    told = client.get("/api/events?type=webhook.updated", headers=OPERATOR).json["events"]
    assert told[0]["data"]["disabled_reason"] == "The receiver answered 410 Gone."


def test_a_410_from_a_former_url_does_not_disable_the_webhook(app: Flask, client: FlaskClient) -> None:
    hook = create(client, events=["agent.created"])
    Operator(app).create()
    (attempt,) = due_deliveries(app)
    call(client, "PATCH", f"/{hook['webhook']['id']}", json={"url": "http://localhost:9/new"})
    with app.app_context():
        delivery._record_outcome(attempt, Outcome(410))
    assert call(client, "GET", f"/{hook['webhook']['id']}").json["webhook"]["is_active"] is True


def test_a_redelivery_asked_for_during_an_attempt_is_still_to_come(
    app: Flask, client: FlaskClient, time_machine: Clock
) -> None:
    hook = create(client, events=["agent.created"], max_retries=0)
    Operator(app).create()
    (attempt,) = due_deliveries(app)
    time_machine.advance(seconds=1)
    (shown,) = deliveries(client, hook)
    path = f"/{hook['webhook']['id']}/deliveries/{shown['id']}/redeliver"
    assert call(client, "POST", path).status_code == 202
    with app.app_context():
        delivery._record_outcome(attempt, Outcome(500))
    assert len(due_deliveries(app)) == 1


def test_a_response_that_cannot_be_recorded_is_a_failed_attempt(
    app: Flask, client: FlaskClient, receive: Callable[..., Receiver]
) -> None:
    """Whatever the reason, the delivery ends: here the database itself refuses a status."""
    refuse = "ALTER TABLE deliveries ADD CHECK (response_status <> 299)"
    if not on_postgresql.is_used():
        refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON deliveries WHEN NEW.response_status = 299"
        refuse += " BEGIN SELECT RAISE(ABORT, 'no'); END"
    with app.app_context(), writing() as connection:
        connection.exec_driver_sql(refuse)
    hook = create(client, events=["agent.created"], max_retries=0, url=receive(lambda _: 299).url)
    Operator(app).create()
    deliverer = delivery.Deliverer(app)
    deliverer.start()
    until = time.monotonic() + 10
    while deliveries(client, hook)[0]["status"] == "pending" and time.monotonic() < until:
        time.sleep(0.05)
    deliverer.stop()
    (found,) = deliveries(client, hook)
    assert (found["status"], found["attempts"]) == ("dead", 1)
    assert found["error"].startswith("The response cannot be recorded: ")


def test_slow_receivers_leave_a_slot_for_each_other(app: Flask, client: FlaskClient) -> None:
    """None of them has failed yet, and each may have eight."""
    for _ in range(5):
        create(client, events=["agent.created"])
    for _ in range(delivery.MAX_IN_FLIGHT_EACH):
        Operator(app).create()
    busy = delivery.Deliverer(app)
    with app.app_context():
        in_flight = {attempt.pk: attempt for attempt in busy._due()}
    assert len(in_flight) >= delivery.MAX_IN_FLIGHT
    assert len({attempt.webhook_pk for attempt in in_flight.values()}) == 5
    late = create(client, events=["agent.created"], url="http://localhost:9/late")
    Operator(app).create()
    busy._in_flight = in_flight
    with app.app_context():
        (attempt,) = busy._due()
    assert attempt.url == late["webhook"]["url"]


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
        busy._in_flight = {attempt.pk: attempt for attempt in due}
        assert busy._due() == [], "the other dead hosts wait for these"
    assert sum(attempt.url.endswith("/healthy") for attempt in due) == delivery.MAX_IN_FLIGHT_EACH
    assert len(due) == delivery.MAX_IN_FLIGHT_EACH + delivery.MAX_IN_FLIGHT_FAILING


def test_five_days_of_failures_disable_the_webhook(
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


def test_one_webhook_never_takes_all_slots(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"], name="busy")
    for _ in range(20):
        Operator(app).create()
    create(client, events=["agent.created"], name="quiet", url="http://localhost:9/quiet")
    Operator(app).create()
    due = due_deliveries(app)
    assert sum(attempt.url == URL for attempt in due) == delivery.MAX_IN_FLIGHT_EACH
    assert sum(attempt.url != URL for attempt in due) == 1


def test_a_failing_webhook_has_one_slot_until_a_success(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"])
    for _ in range(20):
        Operator(app).create()
    assert settle(app, 500) == delivery.MAX_IN_FLIGHT_EACH
    assert settle(app, 200) == 1
    assert settle(app, 200) == delivery.MAX_IN_FLIGHT_EACH


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
    (attempt,) = due_deliveries(app)
    with app.app_context():
        assert delivery._send(attempt) == Outcome(error="Refused: The host has a private address.")


# Secrets at rest


def test_a_secret_that_cannot_be_read_fails_its_own_delivery_only(app: Flask, client: FlaskClient) -> None:
    broken, fine = create(client, events=["agent.created"]), create(client, events=["agent.created"])
    with app.app_context():
        values = {"id": broken["webhook"]["id"]}
        db.session.execute(sa.text("UPDATE webhooks SET secret = 'fernet:x' WHERE id = :id"), values)
        db.session.commit()
    Operator(app).create()
    with app.app_context():
        for attempt in due_deliveries(app):
            delivery._record_outcome(attempt, delivery._send(attempt))
    assert "LANYARD_SECRET_KEY" in deliveries(client, broken)[0]["error"]
    assert "LANYARD_SECRET_KEY" not in str(deliveries(client, fine)[0]["error"])


def test_a_body_is_plain_json(app: Flask, client: FlaskClient) -> None:
    create(client, events=["agent.created"])
    Operator(app).create(name="Ünïcode 🤖")
    (attempt,) = due_deliveries(app)
    assert json.loads(delivery._body(attempt))["data"]["agent_name"] == "Ünïcode 🤖"
