"""The log of events: what is told, by whom, and that nothing is told that must not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from authlib.oauth2.rfc7523.client import ASSERTION_TYPE
from flask import Flask
from flask.testing import FlaskClient
from joserfc.jwk import ECKey
from joserfc.jwt import encode as sign
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer, run_command
from support.clock import Clock
from support.instances import ADMIN_TOKEN

import credentials
from ops import cleanup


def log(client: FlaskClient, query: str = "") -> list[dict[str, Any]]:
    """The events, newest first."""
    response = client.get(f"/api/events{query}", headers=OPERATOR)
    assert response.status_code == 200, response.text
    return list(response.json["events"])


def test_events_of_an_agents_life_are_in_order(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(name="night-reporter")
    agent_id = agent["agent"]["id"]
    token = ask_token(client, agent).json
    token = ask_refresh(client, token["refresh_token"]).json
    operator.patch(agent, owner="ann", metadata={"a": "b"})
    client.post("/api/agents/me/rotate", headers=bearer(token), json={"grace_period": 60})
    client.post("/oauth/revoke", data={"token": token["access_token"]}, headers=OPERATOR)
    client.post("/oauth/revoke", data={"token": token["refresh_token"]}, headers=OPERATOR)
    operator.act(agent, "deactivate")
    operator.act(agent, "reactivate")
    operator.call("DELETE", f"/{agent_id}")
    told = log(client, f"?agent_id={agent_id}")[::-1]
    assert [(event["type"], event["actor"]) for event in told] == [
        ("agent.created", "admin"),
        ("token.issued", agent_id),
        ("token.refreshed", agent_id),
        ("agent.updated", "admin"),
        ("agent.credentials_rotated", agent_id),
        ("token.revoked", "admin"),
        ("token.revoked", "admin"),
        ("agent.deactivated", "admin"),
        ("agent.reactivated", "admin"),
        ("agent.deleted", "admin"),
    ]
    about = {"agent_id": agent_id, "agent_name": "night-reporter", "client_id": agent["client_id"]}
    assert all(about.items() <= event["data"].items() for event in told)
    assert {event["timestamp"] for event in told} == {time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")}
    assert told[3]["data"]["changed"] == ["metadata", "owner"]
    assert told[4]["data"] == {**about, "rotated_by": "self", "grace_period": 60, "revoke_tokens": False}
    assert [told[n]["data"]["token"] for n in (5, 6)] == ["access", "refresh"]


def test_an_event_has_its_address_and_request_id(make_app: Callable[..., Flask]) -> None:
    client = make_app(TRUSTED_PROXIES="1").test_client()
    headers = {**OPERATOR, "X-Forwarded-For": "203.0.113.9", "X-Request-Id": "deploy-7"}
    response = client.post("/api/agents", json={"name": "x"}, headers=headers)
    assert response.headers["X-Request-Id"] == "deploy-7"
    (event,) = log(client, "?type=agent.created")
    assert (event["address"], event["request_id"]) == ("203.0.113.9", "deploy-7")


@pytest.mark.parametrize(
    "given",
    ["", "a b", "x" * 65, 'a"b', "é", "rt_x", "cs_x", "whsec_x", "id-cs_x", "eyJhbGciOiJ"],
)
def test_a_request_id_that_is_no_good_is_replaced(client: FlaskClient, given: str) -> None:
    told = client.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"]
    assert told != given
    assert told.startswith("req_")


def test_the_admin_token_as_a_request_id_is_not_stored(client: FlaskClient) -> None:
    """But returned, as a wrong guess is: anybody may send one."""
    for given in (ADMIN_TOKEN, "a-wrong-guess", "start_1"):
        response = client.post("/api/agents", json={"name": "x"}, headers={**OPERATOR, "X-Request-Id": given})
        assert response.headers["X-Request-Id"] == given
    stored = [event["request_id"] for event in log(client)]
    assert stored[:2] == ["start_1", "a-wrong-guess"]
    assert stored[2].startswith("req_")


def test_a_refresh_token_used_twice_is_one_event(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    for _ in range(3):
        ask_refresh(client, token["refresh_token"])
    (event,) = log(client, "?type=token.reuse_detected")
    assert event["data"]["agent_id"] == agent["agent"]["id"]


def failed(client: FlaskClient) -> list[dict[str, Any]]:
    """What the log holds of failed sign-ins, oldest first."""
    return [event["data"] for event in log(client, "?type=auth.failed")[::-1]]


def guess(client: FlaskClient, client_id: str, address: str = "127.0.0.1") -> int:
    body = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": "cs_guess"}
    response = client.post("/oauth/token", json=body, environ_overrides={"REMOTE_ADDR": address})
    response.close()
    return response.status_code


def test_a_failed_sign_in_is_an_event(client: FlaskClient, agent: dict[str, Any]) -> None:
    guess(client, agent["client_id"])
    guess(client, "'; DROP TABLE agents")
    client.get("/api/agents", headers={"Authorization": "Bearer guess"}).close()
    named = {"agent_id": agent["agent"]["id"], "agent_name": "an agent", "client_id": agent["client_id"]}
    once = {"attempts": 1, "address_count": 1, "addresses": ["127.0.0.1"]}
    assert failed(client) == [
        {**named, "credential": "client", **once},
        {"credential": "client", **once},
        {"credential": "operator", **once},
    ]
    assert {event["actor"] for event in log(client, "?type=auth.failed")} == {"anonymous"}
    for name in (agent["agent"]["id"], agent["client_id"]):
        assert len(log(client, f"?agent_id={name}&type=auth.failed")) == 1


def test_further_failures_are_one_event_with_their_number(
    client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    for number in range(40):
        for _ in range(5):
            guess(client, credentials.new_client_id(), "192.0.2.1")
        guess(client, agent["client_id"], f"198.51.100.{number % 20}")
    assert [data["attempts"] for data in failed(client)] == [1, 1]
    time_machine.advance(minutes=10)
    guess(client, agent["client_id"], "203.0.113.1")
    others, own = failed(client)[2:]
    assert (own["client_id"], own["attempts"], own["address_count"]) == (agent["client_id"], 40, 21)
    assert len(own["addresses"]) == 10
    # One address may fail two hundred times; what is refused after that is no attempt.
    assert (others["attempts"], others["addresses"]) == (199, ["192.0.2.1"])


def test_the_last_failures_are_recorded_without_another(
    app: Flask, client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    for _ in range(3):
        guess(client, agent["client_id"])
    time_machine.advance(minutes=10)
    with app.app_context():
        for _ in range(3):
            cleanup.delete_batch()
    assert [data["attempts"] for data in failed(client)] == [1, 2]


def test_an_entry_names_only_the_addresses_of_its_own_failures(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    guessed, other = operator.create(), operator.create()
    for _ in range(3):
        guess(client, guessed["client_id"], "198.51.100.1")
    time_machine.advance(minutes=10)
    guess(client, other["client_id"], "203.0.113.5")
    about = log(client, f"?agent_id={guessed['client_id']}&type=auth.failed")
    assert [(event["address"], event["request_id"]) for event in about] == [("198.51.100.1", None)] * 2


def test_a_failure_is_recorded_after_its_response(client: FlaskClient, agent: dict[str, Any]) -> None:
    """The time that it takes does not show which agents exist."""
    body = {"grant_type": "client_credentials", "client_id": agent["client_id"], "client_secret": "cs_guess"}
    response = client.post("/oauth/token", json=body)
    assert failed(client) == []
    response.close()
    assert len(failed(client)) == 1


def test_a_throttled_guesser_adds_nothing_to_the_log(
    client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    statuses = [guess(client, agent["client_id"]) for _ in range(70)]
    assert statuses.count(429) == 20
    time_machine.advance(minutes=10)
    guess(client, agent["client_id"])
    assert [data["attempts"] for data in failed(client)] == [1, 50]


def test_a_forged_assertion_is_a_failure_of_its_agent(client: FlaskClient, operator: Operator) -> None:
    key, other = ECKey.generate_key("P-256"), ECKey.generate_key("P-256")
    jwks = {"keys": [key.as_dict(private=False)]}
    agent = operator.create(token_endpoint_auth_method="private_key_jwt", jwks=jwks)
    claims = {"sub": agent["client_id"], "iss": agent["client_id"]}
    body = {
        "client_assertion_type": ASSERTION_TYPE,
        "client_assertion": sign({"alg": "ES256"}, claims, other),
    }
    client.post("/oauth/token", data={"grant_type": "client_credentials", **body}).close()
    assert [data["client_id"] for data in failed(client)] == [agent["client_id"]]


def test_a_request_without_credentials_is_no_failed_sign_in(client: FlaskClient) -> None:
    client.get("/api/agents")
    client.get("/api/agents/me")
    assert log(client) == []


def test_a_key_rotation_is_an_event(client: FlaskClient) -> None:
    new = client.post("/api/keys/rotate", json={"now": True}, headers=OPERATOR).json["key"]
    (event,) = log(client, "?type=key.*")
    assert event["data"] == {"kid": new["kid"], "alg": "ES256", "at_once": True}


def test_a_refused_change_is_no_event(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    before = log(client)
    operator.patch(agent, name="")
    operator.act(agent, "reactivate")
    ask_token(client, agent, scope="admin")
    ask_refresh(client, token["refresh_token"], scope="admin")
    client.post("/oauth/revoke", data={"token": "unknown"}, headers=OPERATOR)
    assert log(client) == before


def test_no_secret_hash_or_token_is_in_an_event(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    newest = ask_refresh(client, token["refresh_token"]).json
    rotated = operator.act(agent, "rotate").json
    ask_refresh(client, token["refresh_token"])
    told = json.dumps(log(client))
    for secret in (agent["client_secret"], rotated["client_secret"]):
        assert secret[11:] not in told
    for answer in (token, newest):
        assert answer["refresh_token"][3:25] not in told
        assert answer["access_token"][-40:] not in told
    assert "$2b$" not in told


def test_events_are_listed_page_by_page(client: FlaskClient, operator: Operator) -> None:
    for number in range(5):
        operator.create(name=str(number))
    first = client.get("/api/events?limit=3", headers=OPERATOR).json
    rest = client.get(f"/api/events?limit=3&after={first['next']}", headers=OPERATOR).json
    names = [event["data"]["agent_name"] for event in first["events"] + rest["events"]]
    assert names == ["4", "3", "2", "1", "0"]
    assert rest["next"] is None


@pytest.mark.parametrize(("query", "found"), [("agent.*", 2), ("token.*", 1), ("token.issued", 1), ("*", 3)])
def test_events_are_filtered_by_type_and_group(
    client: FlaskClient, operator: Operator, query: str, found: int
) -> None:
    agent = operator.create()
    operator.patch(agent, name="new")
    ask_token(client, agent)
    assert len(log(client, f"?type={query}")) == found


@pytest.mark.parametrize(
    ("query", "named"),
    [("?type=agent", "type"), ("?type=nothing.*", "type"), ("?limit=0", "limit"), ("?x=1", "x")],
)
def test_a_bad_query_is_named(client: FlaskClient, query: str, named: str) -> None:
    response = client.get(f"/api/events{query}", headers=OPERATOR)
    assert (response.status_code, list(response.json["fields"])) == (400, [named])


def test_only_the_operator_reads_events(client: FlaskClient, token: dict[str, Any]) -> None:
    assert client.get("/api/events").status_code == 401
    assert client.get("/api/events", headers=bearer(token)).status_code == 403


def test_events_are_kept_as_long_as_the_setting_says(
    make_app: Callable[..., Flask], time_machine: Clock
) -> None:
    app = make_app(EVENT_RETENTION_DAYS="7")
    client = app.test_client()
    Operator(app).create()
    time_machine.advance(days=7, seconds=-1)
    for left in (1, 0):
        with app.app_context():
            cleanup.delete_batch()
        assert len(log(client)) == left
        time_machine.advance(seconds=1)


def test_the_command_prints_the_newest_oldest_first(app: Flask, operator: Operator) -> None:
    for number in range(3):
        operator.create(name=str(number))
    output = run_command(app, "events", "tail", "-n", "2", "--no-follow").output
    assert [json.loads(line)["data"]["agent_name"] for line in output.splitlines()] == ["1", "2"]
