"""The promises of SECURITY.md that no other file tests."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import bcrypt
import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from support.callers import Operator, forged
from support.servers import Server

import credentials

Serve = Callable[..., Server]

# Guessers


def guess(client: FlaskClient, client_id: str, secret: str, address: str) -> float:
    """The seconds of work that a refusal takes; how long it waits for others' is no matter."""
    body = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": secret}
    began = time.process_time()
    answer = client.post("/oauth/token", json=body, environ_overrides={"REMOTE_ADDR": address})
    taken = time.process_time() - began
    assert answer.status_code == 401
    return taken


@pytest.mark.parametrize("knows_the_hint", [False, True], ids=["wrong hint", "right hint"])
def test_an_unknown_client_takes_as_long_as_a_wrong_secret(
    make_app: Callable[..., Flask], knows_the_hint: bool
) -> None:
    """A missing hash makes a factor of twenty; a busy machine makes both slow."""
    app = make_app(BCRYPT_COST="10")
    agent, client = Operator(app).create(), app.test_client()
    secret = forged(agent["client_secret"])
    if not knows_the_hint:
        secret = credentials.new_client_secret(4).text
    times: dict[str, list[float]] = {"known": [], "unknown": []}
    turns = ["known", "unknown"] * 14
    random.Random(1).shuffle(turns)
    for number, kind in enumerate(turns):
        client_id = agent["client_id"] if kind == "known" else credentials.new_client_id()
        times[kind].append(guess(client, client_id, secret, f"192.0.2.{number}"))
    known, unknown = times["known"], times["unknown"]
    assert 0.6 < median(known) / median(unknown) < 1.7
    # Of all pairs, those in which the known one is slower: half of them, when nothing tells them apart.
    slower = sum(one > other for one in known for other in unknown) / (len(known) * len(unknown))
    assert 0.05 < slower < 0.95
    # That the hash is there at all: no refusal is quicker than a fair part of one.
    began = time.process_time()
    bcrypt.hashpw(b"x", bcrypt.gensalt(10))
    assert min(known + unknown) > (time.process_time() - began) / 3


@pytest.mark.parametrize("secret", ["hunter2", "cs_" + "a" * 57, "rt_" + "a" * 57], ids=str)
@pytest.mark.parametrize("client_id", ["known", "unknown", "malformed"])
def test_a_malformed_secret_is_never_hashed(
    client: FlaskClient,
    agent: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    client_id: str,
    secret: str,
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(bcrypt, "checkpw", lambda *given: bool(asked.append(given)))
    ids = {"known": agent["client_id"], "unknown": credentials.new_client_id(), "malformed": "admin"}
    guess(client, ids[client_id], secret, "192.0.2.1")
    assert asked == []


# Limits that hold for all workers


@contextmanager
def only(worker: int, workers: list[int]) -> Iterator[None]:
    """Let one worker alone answer: the others stand still."""
    others = [pid for pid in workers if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    for state in [path for pid in others for path in Path(f"/proc/{pid}/task").glob("*/stat")]:
        while state.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def ask(server: Server, agent: dict[str, Any], secret: str | None = None, address: str = "192.0.2.1") -> Any:
    """A token request from an address, by way of a trusted proxy."""
    body = {"grant_type": "client_credentials", "client_id": agent["client_id"]}
    body["client_secret"] = secret or agent["client_secret"]
    came_from = {"X-Forwarded-For": address}
    return requests.post(f"{server.url}/oauth/token", json=body, headers=came_from, timeout=10)


def manage(server: Server, token: str, address: str = "192.0.2.9", **kwargs: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": address}
    call = requests.post if "json" in kwargs else requests.get
    path = kwargs.pop("path", "/api/agents")
    return call(f"{server.url}{path}", headers=headers, timeout=10, **kwargs)


def guess_until_throttled(call: Callable[[], Any]) -> int:
    """How many guesses are answered as wrong; the last answer says when to come again."""
    for count in range(80):
        answer = call()
        if answer.status_code != 401:
            assert (answer.status_code, answer.json()["error"]) == (429, "too_many_requests")
            assert 1 <= int(answer.headers["Retry-After"]) <= 6
            return count
    raise AssertionError("never throttled")


def test_a_guesser_is_throttled_by_all_workers_and_after_a_restart(serve: Serve) -> None:
    settings = {"TRUSTED_PROXIES": "1", "ADMIN_TOKEN": "the-operators-token"}
    server = serve(**settings).wait()
    agent = manage(server, "the-operators-token", json={"name": "x"}).json()
    one, other = workers = server.workers()
    began = time.monotonic()
    with only(one, workers):
        wrong = guess_until_throttled(lambda: ask(server, agent, "a guess"))
        admin = guess_until_throttled(lambda: manage(server, "a guess", "192.0.2.1"))

    def forgiven() -> int:
        return int(time.monotonic() - began) // 6 + 2  # a failure is forgotten each six seconds

    assert 50 <= min(wrong, admin) <= max(wrong, admin) <= 50 + forgiven()
    with only(other, workers):
        assert guess_until_throttled(lambda: ask(server, agent, "a guess")) <= forgiven()
        assert guess_until_throttled(lambda: manage(server, "a guess", "192.0.2.1")) <= forgiven()
        assert manage(server, "the-operators-token", "192.0.2.1").status_code == 429
        assert ask(server, agent).status_code == 200, "the agent itself gets in, from the same address"
        assert ask(server, agent, address="192.0.2.2").status_code == 200
        told = manage(server, "the-operators-token", path="/api/events?type=auth.failed").json()["events"]
        assert 1 <= len(told) <= 4, "each worker has recorded the first failure of each kind"
    server.stop()
    server = serve(**settings).wait()
    assert guess_until_throttled(lambda: ask(server, agent, "a guess")) <= forgiven()
    assert guess_until_throttled(lambda: manage(server, "a guess", "192.0.2.1")) <= forgiven()
    assert ask(server, agent).status_code == 200


def test_a_stop_records_the_failures_that_it_has_counted(serve: Serve) -> None:
    settings = {"WORKERS": "1", "ADMIN_TOKEN": "the-operators-token"}
    server = serve(**settings).wait()
    agent = manage(server, "the-operators-token", json={"name": "x"}).json()
    for _ in range(3):
        assert ask(server, agent, "a guess").status_code == 401
    server.stop()
    server = serve(**settings).wait()
    told = manage(server, "the-operators-token", path="/api/events?type=auth.failed").json()["events"]
    assert [event["data"]["attempts"] for event in told] == [2, 1]


def test_a_rate_limit_counts_the_tokens_of_all_workers(serve: Serve) -> None:
    server = serve(TRUSTED_PROXIES="1", ADMIN_TOKEN="the-operators-token").wait()
    agent = manage(server, "the-operators-token", json={"name": "x", "rate_limit": 5}).json()
    one, other = workers = server.workers()
    with only(one, workers):
        assert [ask(server, agent).status_code for _ in range(3)] == [200] * 3
    with only(other, workers):
        assert [ask(server, agent).status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(server, agent)
    assert refused.json()["error"] == "too_many_requests"
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
