"""Metrics: exact over several workers, cheap, for the operator only, and nothing secret in them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support import postgresql as on_postgresql
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer
from support.clock import Clock
from support.servers import Server, free_port

import events
from credentials import new_client_id, new_client_secret
from models import Delivery, Webhook, db
from ops import metrics, metrics_files
from webhooks.delivery import Deliverer

MEMORY = Path("/dev/shm")  # noqa: S108
REQUESTS = "lanyard_http_request_duration_seconds_count"


BEFORE: dict[tuple[str, ...], float] = {}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No count of rows is kept, and what earlier tests of this process have counted is known."""
    monkeypatch.setattr(metrics, "ROW_COUNT_AGE", 0)
    BEFORE.clear()
    BEFORE.update(values(generate_latest(events.REGISTRY).decode()))


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the labels' order."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(s.name, *(s.labels[label] for label in sorted(s.labels))): s.value for s in samples}
    assert len(found) == len(samples), "a sample is there twice"
    return found


def scrape(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """Every sample; of the counts, which are the process's, what this test added."""
    response = client.get("/metrics", headers=OPERATOR)
    assert response.status_code == 200, response.text
    return {key: value - BEFORE.get(key, 0) for key, value in values(response.text).items()}


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
        ("wrong_secret", {"client_secret": new_client_secret(4).text}),
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
    assert (following, "ES256") not in before
    assert before[made, "ES256"] <= time_machine.now().timestamp()
    client.post("/api/keys/rotate", json={}, headers=OPERATOR)
    assert scrape(client)[following, "ES256"] == time_machine.now().timestamp() + 360
    time_machine.advance(seconds=360)
    after = scrape(client)
    assert (following, "ES256") not in after
    assert after[made, "ES256"] == time_machine.now().timestamp() - 360


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


def test_a_requests_time_falls_in_its_bucket(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0.001, 0.0011, 11):
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "perf_counter", iter((0, seconds)).__next__)
            client.get("/health")
    found = scrape(client)
    bucket = "lanyard_http_request_duration_seconds_bucket"
    cells = {le: found[bucket, le, "GET", "/health", "2xx"] for le in ("0.001", "0.0025", "10.0", "+Inf")}
    assert cells == {"0.001": 1, "0.0025": 2, "10.0": 2, "+Inf": 3}
    seconds = found["lanyard_http_request_duration_seconds_sum", "GET", "/health", "2xx"]
    assert seconds == pytest.approx(11.0021)


def test_every_reason_and_status_exists_before_its_first_event() -> None:
    made = {(name, *labels) for name, *labels in BEFORE}
    reasons = "access_token admin_token assertion inactive_agent malformed throttled unknown_client"
    assert made >= {("lanyard_auth_failures_total", reason) for reason in [*reasons.split(), "wrong_secret"]}
    statuses = ("dead", "delivered", "retrying")
    assert made >= {("lanyard_webhook_attempts_total", status) for status in statuses}


def test_sizes_version_and_events_are_there(client: FlaskClient, agent: dict[str, Any]) -> None:
    found = scrape(client)
    assert found["lanyard_database_size_bytes", "main"] > 100_000
    assert on_postgresql.is_used() or found["lanyard_database_size_bytes", "wal"] > 0
    assert found["lanyard_events",] == 1
    assert {key[-1] for key in found if key[0] == "lanyard_build_info"} == {"0.1.0"}


def test_rows_are_not_counted_at_every_scrape(
    client: FlaskClient, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROW_COUNT_AGE", 60)
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


def check_with_promtool(text: str) -> None:
    told = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool: apt-get install prometheus"
)


@needs_promtool
def test_promtool_accepts_the_metrics(client: FlaskClient, agent: dict[str, Any]) -> None:
    ask_token(client, agent)
    check_with_promtool(client.get("/metrics", headers=OPERATOR).text)


def ask_many(server: Server, agent: dict[str, Any], times: int) -> None:
    """Token requests, each on a connection of its own, so that both workers answer some."""
    body = {name: agent[name] for name in ("client_id", "client_secret")}
    body["grant_type"] = "client_credentials"

    def ask(_: int) -> int:
        return requests.post(f"{server.url}/oauth/token", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(times))) == {200}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two workers."""
    server = Server(tmp_path_factory.mktemp("running"), LOCAL="1").wait()
    yield server
    server.kill()


def files_of(server: Server) -> Path:
    """The folder with the server's metrics, from what its master has mapped."""
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    found = {Path(line.split()[-1]).parent for line in maps.splitlines() if metrics_files.PREFIX in line}
    (folder,) = found
    return folder


def replace_workers(server: Server, signal_: signal.Signals) -> None:
    """End each worker, and wait for another in its place."""
    for victim in server.workers():
        os.kill(victim, signal_)
        wait_for(lambda gone=victim: len(set(server.workers()) - {gone}) == 2)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_counts_are_exact_over_both_workers_and_their_deaths(serve: Callable[..., Server]) -> None:
    server = serve(LOCAL="1").wait()
    agent = requests.post(f"{server.url}/api/agents", json={"name": "x"}).json()

    def read(*name: str) -> float:
        return values(requests.get(f"{server.url}/metrics").text)[name]

    assert read("lanyard_auth_failures_total", "throttled") == read("lanyard_tokens_issued_total") == 0
    kind = (REQUESTS, "POST", "/oauth/token", "2xx")
    ask_many(server, agent, 60)
    assert {read(*kind) for _ in range(8)} == {60}
    cpu, began = read("lanyard_cpu_seconds_total"), read("lanyard_start_time_seconds")

    replace_workers(server, signal.SIGKILL)
    ask_many(server, agent, 40)
    replace_workers(server, signal.SIGTERM)
    ask_many(server, agent, 40)
    assert {read(*kind) for _ in range(8)} == {140}
    assert read("lanyard_tokens_issued_total") == 140
    # Counters of the master and of two workers, durations of two workers, locks.
    assert len(list(files_of(server).iterdir())) == 6, "files of dead workers pile up"
    assert read("lanyard_cpu_seconds_total") >= cpu
    assert read("lanyard_start_time_seconds") == began
    assert 20e6 < read("lanyard_memory_bytes") < 400e6


def test_a_reload_loses_no_count(running: Server) -> None:
    agent = requests.post(f"{running.url}/api/agents", json={"name": "x"}).json()

    def issued() -> float:
        return values(requests.get(f"{running.url}/metrics").text)["lanyard_tokens_issued_total",]

    before, workers = issued(), set(running.workers())
    ask_many(running, agent, 10)
    running.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(running.workers()) == 2 and not workers & set(running.workers()))
    ask_many(running, agent, 10)
    assert issued() == before + 20


@needs_promtool
def test_promtool_accepts_the_metrics_of_several_workers(running: Server) -> None:
    ask_many(running, requests.post(f"{running.url}/api/agents", json={"name": "x"}).json(), 10)
    check_with_promtool(requests.get(f"{running.url}/metrics").text)


def test_the_next_start_removes_what_a_killed_server_left(
    running: Server, serve: Callable[..., Server]
) -> None:
    killed = serve(LOCAL="1").wait()
    left, workers = files_of(killed), killed.workers()
    killed.process.kill()
    killed.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    following = serve(LOCAL="1").wait()
    assert not left.exists()
    assert files_of(running).is_dir(), "another server's files are gone"
    folder = files_of(following)
    following.stop()
    assert not folder.exists()


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no /dev/shm")
def test_no_file_is_on_a_disk_that_can_fill_up(running: Server) -> None:
    assert files_of(running).parent == MEMORY
    assert not list(running.instance.rglob("*_*.db"))
    assert files_of(running).stat().st_mode & 0o077 == 0


def test_without_shared_memory_files_are_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert metrics_files.base_folder() == tmp_path
