"""Metrics: exact over several workers, cheap, for the operator only, and nothing secret in them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import on_postgresql
import pytest
import requests
from conftest import OPERATOR, Clock, Operator, Server, ask_refresh, ask_token, bearer, free_port
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

import metrics
from credentials import SecretChecker, new_client_id
from models import Delivery, Webhook, db
from webhooks.delivery import Deliverer

maker = SecretChecker(cost=4)
REQUESTS = "lanyard_http_request_duration_seconds_count"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was counted row by row is kept."""
    monkeypatch.setattr(metrics, "KEPT", 0)


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the labels' order."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(s.name, *(s.labels[label] for label in sorted(s.labels))): s.value for s in samples}
    assert len(found) == len(samples), "a sample is there twice"
    return found


def scrape(client: FlaskClient) -> dict[tuple[str, ...], float]:
    response = client.get("/metrics", headers=OPERATOR)
    assert response.status_code == 200, response.text
    return values(response.text)


def failures(client: FlaskClient) -> dict[str, float]:
    """The reasons there were, and how often."""
    found = scrape(client)
    return {key[1]: value for key, value in found.items() if "auth_failures" in key[0] and value}


def test_nobody_but_the_operator_may_read_them(client: FlaskClient, token: dict[str, Any]) -> None:
    nobody, agent = client.get("/metrics"), client.get("/metrics", headers=bearer(token))
    assert (nobody.status_code, nobody.json["error"]) == (401, "unauthorized")
    assert (agent.status_code, agent.json["error"]) == (403, "insufficient_scope")
    guess = client.get("/metrics", headers={"Authorization": "Bearer a-guess-of-some-length"})
    assert (guess.status_code, guess.json["error"]) == (401, "invalid_token")


def test_an_agent_with_the_admin_scope_may(client: FlaskClient, operator: Operator) -> None:
    token = ask_token(client, operator.create(scopes=["admin"])).json
    assert client.get("/metrics", headers=bearer(token)).status_code == 200


def test_local_mode_asks_for_no_credentials(make_app: Callable[..., Flask]) -> None:
    client = make_app(LOCAL="1").test_client()
    assert client.get("/metrics").content_type == "text/plain; version=0.0.4; charset=utf-8"


def test_agents_are_counted_by_state(client: FlaskClient, operator: Operator, time_machine: Clock) -> None:
    operator.create()
    operator.create(expires_in=60)
    operator.act(operator.create(expires_in=60), "deactivate")
    time_machine.advance(seconds=61)
    found = scrape(client)
    states = {state: found["lanyard_agents", state] for state in ("active", "deactivated", "expired")}
    assert states == {"active": 1, "deactivated": 1, "expired": 1}


def test_tokens_are_counted(client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]) -> None:
    second = ask_token(client, agent).json
    refreshed = ask_refresh(client, token["refresh_token"]).json
    assert scrape(client)["lanyard_refresh_token_families",] == 2
    ask_refresh(client, token["refresh_token"])
    for text in (second["refresh_token"], second["refresh_token"], refreshed["access_token"]):
        client.post("/oauth/revoke", data={"token": text}, headers=OPERATOR)
    found = scrape(client)
    names = ("tokens_issued", "tokens_refreshed", "tokens_revoked", "refresh_token_reuses")
    # The access token died with its family.
    assert [found[f"lanyard_{name}_total",] for name in names] == [2, 1, 1, 1]
    assert found["lanyard_refresh_token_families",] == 0


def test_an_access_token_that_is_revoked_is_counted(client: FlaskClient, token: dict[str, Any]) -> None:
    client.post("/oauth/revoke", data={"token": token["access_token"]}, headers=OPERATOR)
    assert scrape(client)["lanyard_tokens_revoked_total",] == 1


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("wrong_secret", {"client_secret": maker.make().text}),
        ("unknown_client", {"client_id": new_client_id()}),
        ("malformed", {"client_secret": "a guess"}),
        ("malformed", {"client_secret": ""}),
    ],
    ids=["a wrong secret", "an unknown client", "a malformed secret", "no secret"],
)
def test_a_failed_sign_in_counts_by_its_reason(
    client: FlaskClient, agent: dict[str, Any], reason: str, fields: dict[str, str]
) -> None:
    assert ask_token(client, agent, **fields).status_code == 401
    assert failures(client) == {reason: 1}


def test_a_failed_assertion_counts(client: FlaskClient) -> None:
    body = {
        "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": "eyJhbGciOiJub25lIn0.e30.",
    }
    assert client.post("/oauth/token", json=body).status_code == 401
    assert failures(client) == {"assertion": 1}


def test_an_agent_that_is_switched_off_counts(
    client: FlaskClient, operator: Operator, agent: dict[str, Any]
) -> None:
    operator.act(agent, "deactivate")
    ask_token(client, agent)
    assert failures(client) == {"inactive_agent": 1}


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("/api/agents", "a-guess-of-some-length", "admin_token"),
        ("/api/agents", "eyJhbGciOiJub25lIn0.e30.", "access_token"),
        ("/api/agents/me", "a-guess-of-some-length", "access_token"),
    ],
)
def test_a_bad_bearer_token_counts_once(client: FlaskClient, path: str, text: str, reason: str) -> None:
    assert client.get(path, headers={"Authorization": f"Bearer {text}"}).status_code == 401
    assert failures(client) == {reason: 1}


def test_a_throttled_sign_in_counts_as_that(
    client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    for _ in range(52):
        ask_token(client, agent, client_secret="cs_" + "a" * 60)
    assert failures(client) == {"malformed": 50, "throttled": 2}


def test_webhook_deliveries_are_counted(app: Flask, client: FlaskClient, time_machine: Clock) -> None:
    hook = {"name": "h", "url": "https://93.184.215.14/", "events": ["*"]}
    assert client.post("/api/webhooks", json=hook, headers=OPERATOR).status_code == 201
    webhook_id = client.get("/api/webhooks", headers=OPERATOR).json["webhooks"][0]["id"]
    for _ in range(3):
        client.post(f"/api/webhooks/{webhook_id}/test", json={}, headers=OPERATOR)
    with app.app_context():
        deliveries = db.session.scalars(db.select(Delivery)).all()
        deliveries[0].status, deliveries[0].next_attempt_at = "dead", None
        deliveries[1].status = "retrying"
        db.session.commit()
    time_machine.advance(seconds=90)
    found = scrape(client)
    waiting = "lanyard_webhook_deliveries_waiting"
    assert (found[waiting, "pending"], found[waiting, "retrying"]) == (1, 1)
    assert found["lanyard_webhook_delivery_overdue_seconds",] == 90
    with app.app_context():
        db.session.execute(db.update(Webhook).values(is_active=False))
        db.session.commit()
    assert scrape(client)["lanyard_webhook_delivery_overdue_seconds",] == 0


def test_attempts_at_deliveries_are_counted(make_app: Callable[..., Flask]) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    client = app.test_client()
    hook = {"name": "h", "url": f"http://127.0.0.1:{free_port()}/", "events": ["agent.*"], "max_retries": 0}
    client.post("/api/webhooks", json=hook, headers=OPERATOR)
    client.post("/api/agents", json={"name": "x"}, headers=OPERATOR)
    deliverer = Deliverer(app)
    deliverer.start()
    try:
        until = time.monotonic() + 10
        while not scrape(client)["lanyard_webhook_attempts_total", "dead"] and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        deliverer.stop()
    found = scrape(client)
    attempts = [
        found["lanyard_webhook_attempts_total", status] for status in ("delivered", "retrying", "dead")
    ]
    assert attempts == [0, 0, 1]


def test_the_signing_keys_moments_are_there(client: FlaskClient, time_machine: Clock) -> None:
    following = "lanyard_signing_key_next_timestamp_seconds"
    made = "lanyard_signing_key_created_timestamp_seconds"
    before = scrape(client)
    assert (following, "RS256") not in before
    assert before[made, "RS256"] <= time_machine.now().timestamp()
    client.post("/api/keys/rotate", json={}, headers=OPERATOR)
    assert scrape(client)[following, "RS256"] == time_machine.now().timestamp() + 360
    time_machine.advance(seconds=360)
    after = scrape(client)
    assert (following, "RS256") not in after
    assert after[made, "RS256"] == time_machine.now().timestamp() - 360


def test_the_route_is_a_rule_and_no_path(client: FlaskClient, agent: dict[str, Any]) -> None:
    for path in ("/api/agents/one", "/api/agents/two", "/nowhere", "/elsewhere", "/.well-known/jwks.json"):
        client.get(path, headers=OPERATOR)
    client.open("/nowhere", method="BREW")
    found = scrape(client)
    assert found[REQUESTS, "GET", "/api/agents/<agent_id>", "4xx"] == 2
    assert found[REQUESTS, "any", "unmatched", "4xx"] == 3
    assert found[REQUESTS, "GET", "/.well-known/jwks.json", "2xx"] == 1


def test_a_crash_counts_as_5xx(app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError

    monkeypatch.setitem(app.view_functions, "service.health", crash)
    assert client.get("/health").status_code == 500
    assert scrape(client)[REQUESTS, "GET", "/health", "5xx"] == 1


def test_a_requests_time_falls_in_its_bucket(app: Flask, client: FlaskClient) -> None:
    for seconds in (0.001, 0.0011, 11):
        app.extensions["lanyard.tally"].time_request("/health", "GET", "2xx", seconds)
    found = scrape(client)
    bucket = "lanyard_http_request_duration_seconds_bucket"
    cells = {le: found[bucket, le, "GET", "/health", "2xx"] for le in ("0.001", "0.0025", "10.0", "+Inf")}
    assert cells == {"0.001": 1, "0.0025": 2, "10.0": 2, "+Inf": 3}
    seconds = found["lanyard_http_request_duration_seconds_sum", "GET", "/health", "2xx"]
    assert seconds == pytest.approx(11.0021)


def test_sizes_version_and_events_are_there(client: FlaskClient, agent: dict[str, Any]) -> None:
    found = scrape(client)
    assert found["lanyard_database_size_bytes", "main"] > 100_000
    assert on_postgresql.is_used() or found["lanyard_database_size_bytes", "wal"] > 0
    assert found["lanyard_events",] == 1
    assert {key[-1] for key in found if key[0] == "lanyard_build_info"} == {"0.1.0"}


def test_rows_are_not_counted_at_every_scrape(
    client: FlaskClient, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "KEPT", 60)
    before = scrape(client)["lanyard_agents", "active"]
    operator.create()
    assert scrape(client)["lanyard_agents", "active"] == before


def test_no_secret_name_or_client_id_is_in_them(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(name="sisyphus", owner="zeus", description="rolls", scopes=["stone"])
    token = ask_token(client, agent).json
    client.get(f"/api/agents/{agent['agent']['id']}", headers=OPERATOR)
    client.get("/api/agents?owner=zeus", headers=OPERATOR)
    text = client.get("/metrics", headers=OPERATOR).text
    told = [agent["client_id"], agent["client_secret"], agent["agent"]["id"], *token.values()]
    for value in ("sisyphus", "zeus", "rolls", "stone", "127.0.0.1", *told):
        assert str(value) not in text or value == 3600


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
def test_promtool_finds_nothing_to_better(client: FlaskClient, agent: dict[str, Any]) -> None:
    ask_token(client, agent)
    text = client.get("/metrics", headers=OPERATOR).text
    told = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def ask_many(server: Server, agent: dict[str, Any], times: int) -> None:
    """Token requests, each on a connection of its own, so that both workers answer some."""
    body = {name: agent[name] for name in ("client_id", "client_secret")}
    body["grant_type"] = "client_credentials"

    def ask(_: int) -> int:
        return requests.post(f"{server.url}/oauth/token", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(times))) == {200}


def test_both_workers_requests_count_exactly_also_after_one_was_killed(
    serve: Callable[..., Server],
) -> None:
    server = serve(LOCAL="1").wait()
    agent = requests.post(f"{server.url}/api/agents", json={"name": "x"}).json()

    def read(*name: str) -> float:
        return values(requests.get(f"{server.url}/metrics").text)[name]

    kind = (REQUESTS, "POST", "/oauth/token", "2xx")
    ask_many(server, agent, 60)
    assert {read(*kind) for _ in range(8)} == {60}
    cpu, began = read("lanyard_cpu_seconds_total"), read("lanyard_start_time_seconds")
    assert read("lanyard_processes") == 3

    for victim in set(server.workers()):
        before = set(server.workers())
        os.kill(victim, signal.SIGKILL)
        until = time.monotonic() + 10
        while len(set(server.workers()) - {victim}) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert set(server.workers()) != before
    ask_many(server, agent, 40)
    assert {read(*kind) for _ in range(8)} == {100}
    assert read("lanyard_tokens_issued_total") == 100
    assert read("lanyard_processes") == 3
    assert read("lanyard_cpu_seconds_total") >= cpu
    assert read("lanyard_start_time_seconds") == began
    assert 20e6 < read("lanyard_memory_bytes") < 400e6
