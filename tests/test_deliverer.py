"""Deliveries for real: gunicorn, a receiver that listens, and processes that die."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from standardwebhooks import Webhook as Verifier
from support import postgresql as on_postgresql
from support.instances import engine_of
from support.receiver import Receiver
from support.servers import Server, register, token_body

from database import writing
from webhooks import delivery

Serve = Callable[..., Server]


def subscribe(server: Server, url: str, *events: str) -> str:
    body = {"name": "hook", "url": url, "events": events or ["*"]}
    response = requests.post(f"{server.url}/api/webhooks", json=body)
    assert response.status_code == 201, response.text
    return str(response.json()["secret"])


def test_a_receiver_is_told_and_can_verify_it(serve: Serve, receive: Callable[..., Receiver]) -> None:
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


def test_what_was_acknowledged_arrives_though_the_server_is_killed_in_a_burst(
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


def test_a_dead_host_delays_nobody_elses_deliveries(serve: Serve, receive: Callable[..., Receiver]) -> None:
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
            delivery._settle(parcel, delivery.Outcome(None, None, "no answer", None))

    parcel = delivery.Parcel(1, 1, "https://example.com", b"", "evt_x", (), None, True)
    monkeypatch.setattr(delivery, "writing", watched)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(settle) for _ in range(8)]:
            future.result()
    assert seen == [1] * 8
