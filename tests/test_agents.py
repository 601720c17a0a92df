"""The operator's routes: agents and their secrets, from creation to deletion."""

from __future__ import annotations

import re
from typing import Any

import pytest
from flask.testing import FlaskClient
from support.callers import Operator, ask_refresh, ask_token, bearer
from support.clock import Clock

AGENT_FIELDS = {
    "id", "name", "description", "owner", "client_id", "scopes", "audiences", "metadata", "is_active",
    "token_ttl", "rate_limit", "token_endpoint_auth_method", "created_at", "updated_at", "expires_at",
    "token_count", "refresh_count", "last_activity_at", "last_token_issued_at",
    "require_client_auth_for_refresh",
}  # fmt: skip


def test_creating_answers_the_agent_and_its_credentials(operator: Operator) -> None:
    response = operator.call("POST", json={"name": "night-reporter", "scopes": ["read", "write"]})
    body = response.json
    assert body
    assert response.status_code == 201
    assert response.headers["Location"] == f"/api/agents/{body['agent']['id']}"
    assert response.headers["Cache-Control"] == "no-store"
    assert set(body) == {"agent", "client_id", "client_secret"}
    assert set(body["agent"]) == AGENT_FIELDS
    assert body["agent"]["client_id"] == body["client_id"]
    assert re.fullmatch(r"cid_[A-Za-z0-9_-]{22}", body["client_id"])
    assert re.fullmatch(r"cs_[A-Za-z0-9_-]{57}", body["client_secret"])


def test_a_client_id_in_the_path_finds_the_agent(operator: Operator, agent: dict[str, Any]) -> None:
    path = f"/{agent['client_id']}"
    assert operator.call("GET", path).json["agent"]["id"] == agent["agent"]["id"]
    assert operator.call("PATCH", path, json={"name": "new"}).status_code == 200
    assert set(operator.call("POST", f"{path}/rotate").json) == {"client_secret"}
    assert operator.call("DELETE", path).status_code == 204
    assert operator.call("GET", path).status_code == 404


def test_every_field_comes_back_as_it_was_given(operator: Operator) -> None:
    fields: dict[str, Any] = {
        "name": "Ünïcode 🤖",
        "description": "two\nlines",
        "owner": "team@example.com",
        "scopes": ["write", "read", "mcp:tools/call"],
        "audiences": ["https://api.example.com/v1", "plain-name"],
        "metadata": {"env": "prod", "empty": ""},
        "token_ttl": 60,
        "rate_limit": 100,
        "require_client_auth_for_refresh": True,
    }
    shown = operator.get(operator.create(**fields))
    assert {name: shown[name] for name in fields} == fields


def test_what_is_left_out_has_plain_defaults(operator: Operator) -> None:
    shown = operator.get({"agent": operator.call("POST", json={"name": "x"}).json["agent"]})
    assert (shown["scopes"], shown["audiences"], shown["metadata"]) == ([], [], {})
    assert (shown["expires_at"], shown["token_ttl"], shown["rate_limit"], shown["owner"]) == (None,) * 4
    assert (shown["is_active"], shown["token_count"], shown["last_activity_at"]) == (True, 0, None)
    assert shown["token_endpoint_auth_method"] == "client_secret_basic"


def test_expires_in_becomes_a_moment(operator: Operator, time_machine: Clock) -> None:
    agent = operator.create(expires_in=7_776_000)
    time_machine.advance(days=90)
    assert agent["agent"]["expires_at"] == time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "   "}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"name": 5}, "name"),
        ({"name": ["x"]}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"description": "x" * 1025}, "description"),
        ({"owner": {}}, "owner"),
        ({"scopes": "read write"}, "scopes"),
        ({"scopes": None}, "scopes"),
        ({"scopes": ["read", "read"]}, "scopes"),
        ({"scopes": ["two words"]}, "scopes.0"),
        ({"scopes": ["read", 'quo"te']}, "scopes.1"),
        ({"scopes": ["back\\slash"]}, "scopes.0"),
        ({"scopes": ["é"]}, "scopes.0"),
        ({"scopes": [""]}, "scopes.0"),
        ({"scopes": [None]}, "scopes.0"),
        ({"scopes": ["x" * 129]}, "scopes.0"),
        ({"scopes": [f"s{n}" for n in range(65)]}, "scopes"),
        ({"audiences": ["https://api.example.com/#part"]}, "audiences.0"),
        ({"audiences": ["two words"]}, "audiences.0"),
        ({"audiences": [f"a{n}" for n in range(17)]}, "audiences"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"n": 1}}, "metadata.n"),
        ({"metadata": {"deep": {"er": "x"}}}, "metadata.deep"),
        ({"metadata": {"\ud800": "x"}}, "metadata.\ud800"),
        ({"metadata": {f"k{n}": "v" for n in range(33)}}, "metadata"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": 3_155_760_001}, "expires_in"),
        ({"expires_in": 10**30}, "expires_in"),
        ({"expires_in": 1.5}, "expires_in"),
        ({"expires_in": "3600"}, "expires_in"),
        ({"expires_in": True}, "expires_in"),
        ({"token_ttl": 0}, "token_ttl"),
        ({"token_ttl": 86_401}, "token_ttl"),
        ({"rate_limit": 0}, "rate_limit"),
        ({"token_endpoint_auth_method": "none"}, "token_endpoint_auth_method"),
        ({"is_active": False}, "is_active"),
        ({"client_id": "cid_mine"}, "client_id"),
        ({"nonsense": 1}, "nonsense"),
        ({"key": 1}, "key"),
        ({"metadata": {"value": 1}}, "metadata.value"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named(operator: Operator, fields: dict[str, Any], named: str) -> None:
    response = operator.call("POST", json={"name": "fine", **fields})
    assert response.status_code == 400
    assert response.json
    assert response.json["error"] == "invalid_request"
    assert list(response.json["fields"]) == [named]
    assert (
        named.encode("utf-8", "ignore").decode() in response.json["error_description"]
        or "\\ud" in response.text
    )


def test_several_bad_fields_are_all_named(operator: Operator) -> None:
    response = operator.call("POST", json={"scopes": 1, "token_ttl": "x", "a": 1, "b": 2})
    assert set(response.json["fields"]) == {"name", "scopes", "token_ttl", "a", "b"}


def test_agents_are_listed_newest_first_page_by_page(operator: Operator) -> None:
    names = [operator.create(name=f"agent {n}")["agent"]["name"] for n in range(5)]
    seen: list[str] = []
    after = ""
    for _ in range(3):
        page = operator.call("GET", f"?limit=2&after={after}").json
        assert page
        seen += [agent["name"] for agent in page["agents"]]
        after = page["next"]
    assert seen == names[::-1]
    assert after is None


def test_a_page_stays_put_while_agents_come_and_go(operator: Operator) -> None:
    first, second, third = (operator.create(name=f"agent {n}") for n in range(3))
    after = operator.call("GET", "?limit=1").json["next"]
    operator.create(name="newer")
    operator.call("DELETE", f"/{third['agent']['id']}")
    page = operator.call("GET", f"?after={after}").json
    assert page
    assert [agent["id"] for agent in page["agents"]] == [second["agent"]["id"], first["agent"]["id"]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?is_active=true", {"one", "two"}),
        ("?is_active=false", {"off", "late"}),
        ("?scope=read", {"one", "off", "late"}),
        ("?scope=rea", set()),
        ("?scope=%25", set()),
        ("?owner=ann", {"one"}),
        ("?q=ON", {"one"}),
        ("?q=anne", {"two"}),
        ("?q=%25", set()),
        ("?q=ci", {"two"}),
        ("?q=cid_", set()),
        ("?is_active=&scope=&owner=&stale_days=&q=", {"one", "two", "off", "late"}),
        ("?stale_days=1", {"one", "two", "off", "late"}),
        ("?stale_days=3", set()),
    ],
)
def test_the_list_is_filtered(operator: Operator, time_machine: Clock, query: str, found: set[str]) -> None:
    operator.create(name="one", owner="ann", scopes=["read", "write"])
    operator.create(name="two", description="asked for by Anne, in the city", scopes=["reader"])
    operator.act(operator.create(name="off", scopes=["read"]), "deactivate")
    operator.create(name="late", scopes=["write", "read"], expires_in=60)
    time_machine.advance(days=2)
    page = operator.call("GET", query).json
    assert page
    assert {agent["name"] for agent in page["agents"]} == found


@pytest.mark.parametrize(("length", "found"), [(4, []), (7, []), (8, ["wanted"]), (None, ["wanted"])])
def test_a_client_id_finds_its_agent_by_four_characters_or_more(
    operator: Operator, length: int | None, found: list[str]
) -> None:
    operator.create(name="other")
    client_id = operator.create(name="wanted")["client_id"]
    page = operator.call("GET", f"?q={client_id[:length]}").json
    assert page
    assert [agent["name"] for agent in page["agents"]] == found


def test_activity_ends_staleness(operator: Operator, client: FlaskClient, time_machine: Clock) -> None:
    agent = operator.create()
    time_machine.advance(days=2)
    ask_token(client, agent)
    assert operator.call("GET", "?stale_days=1").json == {"agents": [], "next": None}


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("?limit=0", "limit"),
        ("?limit=201", "limit"),
        ("?limit=many", "limit"),
        ("?after=x", "after"),
        ("?after=-1", "after"),
        (f"?after={10**30}", "after"),
        ("?is_active=perhaps", "is_active"),
        ("?stale_days=0", "stale_days"),
        ("?q=%00", "q"),
        ("?sort=name", "sort"),
    ],
)
def test_a_bad_query_parameter_is_named(operator: Operator, query: str, named: str) -> None:
    response = operator.call("GET", query)
    assert response.status_code == 400
    assert list(response.json["fields"]) == [named]


@pytest.mark.parametrize(
    "agent_id", ["00000000-0000-4000-8000-000000000000", "no-uuid", "%00", "no%00uuid", "%FF", "x" * 3000]
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PATCH", "", {}),
        ("DELETE", "", None),
        ("POST", "", {"action": "deactivate"}),
        ("POST", "/rotate", {}),
        ("POST", "/deactivate", {}),
        ("POST", "/reactivate", {}),
        ("GET", "/secrets", None),
        ("DELETE", "/secrets/x", None),
    ],
)
def test_an_unknown_agent_is_not_found(
    operator: Operator, agent_id: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    response = operator.call(method, f"/{agent_id}{path}", json=body)
    assert (response.status_code, response.json["error"]) == (404, "not_found")


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_patch_changes_what_it_names_and_nothing_else(
    operator: Operator, time_machine: Clock, method: str
) -> None:
    agent = operator.create(description="old", owner="ann", token_ttl=60)
    before = operator.get(agent)
    time_machine.advance(seconds=5)
    change: dict[str, Any] = {"name": "new", "description": None, "scopes": ["write"], "metadata": {"a": "b"}}
    response = operator.call(method, f"/{agent['agent']['id']}", json=change)
    updated_at = time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")
    assert response.status_code == 200
    assert response.json == {"agent": {**before, **change, "updated_at": updated_at}}
    assert operator.get(agent) == response.json["agent"]


def test_a_bad_patch_changes_nothing(operator: Operator, agent: dict[str, Any]) -> None:
    before = operator.get(agent)
    assert operator.patch(agent, name="new", token_ttl=0).status_code == 400
    assert operator.patch(agent, name=None).status_code == 400
    assert operator.patch(agent, client_id="cid_x").status_code == 400
    assert operator.get(agent) == before


def test_expires_in_null_means_never(operator: Operator) -> None:
    agent = operator.create(expires_in=60)
    assert operator.patch(agent, expires_in=None).json["agent"]["expires_at"] is None


def test_deleting_ends_the_agent_and_its_tokens(
    operator: Operator, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    assert operator.call("DELETE", f"/{agent['agent']['id']}").status_code == 204
    assert operator.call("GET", f"/{agent['agent']['id']}").status_code == 404
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).json["error"] == "invalid_grant"
    assert ask_token(client, agent).status_code == 401


def test_rotation_stops_the_old_secret_and_leaves_tokens_alone(
    operator: Operator, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = operator.act(agent, "rotate")
    assert response.status_code == 200
    assert response.json
    assert set(response.json) == {"client_secret"}
    assert ask_token(client, agent).status_code == 401
    assert ask_token(client, {**agent, **response.json}).status_code == 200
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200
    assert ask_refresh(client, token["refresh_token"]).status_code == 200


def test_the_old_secret_works_for_the_grace_period(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create()
    new = {**agent, **(operator.act(agent, "rotate", grace_period=60).json or {})}
    assert ask_token(client, agent).status_code == 200
    time_machine.advance(seconds=59)
    assert ask_token(client, agent).status_code == 200
    time_machine.advance(seconds=1)
    assert ask_token(client, agent).status_code == 401
    assert ask_token(client, new).status_code == 200


def test_a_second_rotation_never_prolongs_an_older_secret(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create()
    operator.act(agent, "rotate", grace_period=60)
    operator.act(agent, "rotate", grace_period=3600)
    time_machine.advance(seconds=61)
    assert ask_token(client, agent).status_code == 401


def test_rotation_can_end_every_token(
    operator: Operator, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    new = operator.act(agent, "rotate", revoke_tokens=True).json
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400
    fresh = ask_token(client, {**agent, **(new or {})}).json
    assert client.get("/api/agents/me", headers=bearer(fresh or {})).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"grace_period": -1}, "grace_period"),
        ({"grace_period": 86_401}, "grace_period"),
        ({"grace_period": "60"}, "grace_period"),
        ({"revoke_tokens": 1}, "revoke_tokens"),
        ({"revoke_tokens": None}, "revoke_tokens"),
        ({"grace": 1}, "grace"),
    ],
)
@pytest.mark.parametrize("by_name", [True, False], ids=["action", "path"])
def test_a_bad_rotation_is_refused(
    operator: Operator,
    client: FlaskClient,
    agent: dict[str, Any],
    body: dict[str, Any],
    named: str,
    by_name: bool,
) -> None:
    path = f"/{agent['agent']['id']}" + ("" if by_name else "/rotate")
    response = operator.call("POST", path, json={"action": "rotate", **body} if by_name else body)
    assert response.status_code == 400
    assert list(response.json["fields"]) == [named]
    assert ask_token(client, agent).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "action"),
        ({"action": "explode"}, "action"),
        ({"action": ["rotate"]}, "action"),
        ({"action": "deactivate", "grace_period": 5}, "grace_period"),
        ({"action": "reactivate", "revoke_tokens": True}, "revoke_tokens"),
    ],
)
def test_a_bad_action_is_refused(
    operator: Operator, agent: dict[str, Any], body: dict[str, Any], named: str
) -> None:
    response = operator.call("POST", f"/{agent['agent']['id']}", json=body)
    assert response.status_code == 400
    assert list(response.json["fields"]) == [named]


@pytest.mark.parametrize("by_name", [True, False], ids=["action", "path"])
def test_the_actions_work_by_name_and_by_path(
    operator: Operator, agent: dict[str, Any], by_name: bool
) -> None:
    for action, is_active in (("deactivate", False), ("deactivate", False), ("reactivate", True)):
        path = f"/{agent['agent']['id']}" + ("" if by_name else f"/{action}")
        response = operator.call("POST", path, json={"action": action} if by_name else None)
        assert response.status_code == 200
        assert response.json["agent"]["is_active"] is is_active


def test_the_kill_switch_ends_everything_at_once(
    operator: Operator, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    operator.act(agent, "deactivate")
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400
    refused = ask_token(client, agent)
    assert (refused.status_code, refused.json["error"]) == (401, "invalid_client")


def test_reactivation_brings_the_agent_back_but_not_its_old_tokens(
    operator: Operator, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    operator.act(agent, "deactivate")
    operator.act(agent, "reactivate")
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400
    fresh = ask_token(client, agent).json
    assert client.get("/api/agents/me", headers=bearer(fresh or {})).status_code == 200


def test_an_expired_agent_is_treated_as_deactivated(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create(expires_in=60)
    token = ask_token(client, agent).json or {}
    time_machine.advance(seconds=60)
    assert operator.get(agent)["is_active"] is False
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400
    assert "expired" in ask_token(client, agent).json["error_description"]


def test_an_expired_agent_needs_a_new_expiry_before_it_can_return(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create(expires_in=60)
    time_machine.advance(seconds=61)
    refused = operator.act(agent, "reactivate")
    assert (refused.status_code, refused.json["error"]) == (409, "conflict")
    operator.patch(agent, expires_in=60)
    assert ask_token(client, agent).status_code == 200


def test_an_agent_that_returns_from_its_expiry_brings_no_old_tokens(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    operator.patch(agent, expires_in=1)
    time_machine.advance(seconds=1)
    operator.patch(agent, expires_in=None)
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400
    fresh = ask_token(client, agent).json
    assert client.get("/api/agents/me", headers=bearer(fresh)).status_code == 200


def test_live_secrets_are_listed_without_their_text(
    operator: Operator, client: FlaskClient, time_machine: Clock
) -> None:
    agent = operator.create()
    ask_token(client, agent)
    new = operator.act(agent, "rotate", grace_period=60).json or {}
    path = f"/{agent['agent']['id']}/secrets"
    listed = operator.call("GET", path).json["secrets"]
    assert [set(secret) for secret in listed] == [
        {"id", "hint", "created_at", "expires_at", "last_used_at"}
    ] * 2
    assert [secret["hint"] for secret in listed] == [new["client_secret"][3:11], agent["client_secret"][3:11]]
    assert [secret["expires_at"] is None for secret in listed] == [True, False]
    assert [secret["last_used_at"] is None for secret in listed] == [True, False]
    time_machine.advance(seconds=60)
    assert len(operator.call("GET", path).json["secrets"]) == 1


def test_a_secret_can_be_removed_at_once(
    operator: Operator, client: FlaskClient, agent: dict[str, Any]
) -> None:
    new = {**agent, **(operator.act(agent, "rotate", grace_period=3600).json or {})}
    path = f"/{agent['agent']['id']}/secrets"
    old = operator.call("GET", path).json["secrets"][1]
    assert operator.call("DELETE", f"{path}/{old['id']}").status_code == 204
    assert ask_token(client, agent).status_code == 401
    assert ask_token(client, new).status_code == 200
    assert operator.call("DELETE", f"{path}/{old['id']}").status_code == 404


def test_removing_a_secret_ends_the_refresh_tokens_it_was_used_for(
    operator: Operator, client: FlaskClient, agent: dict[str, Any]
) -> None:
    leaked = ask_token(client, agent).json
    leaked = ask_refresh(client, leaked["refresh_token"]).json
    new = {**agent, **(operator.act(agent, "rotate", grace_period=3600).json or {})}
    good = ask_token(client, new).json
    path = f"/{agent['agent']['id']}/secrets"
    old = operator.call("GET", path).json["secrets"][1]
    operator.call("DELETE", f"{path}/{old['id']}")
    assert ask_refresh(client, leaked["refresh_token"]).status_code == 400
    assert ask_refresh(client, good["refresh_token"]).status_code == 200


def test_removing_a_secret_is_an_update_of_the_agent(
    operator: Operator, agent: dict[str, Any], time_machine: Clock
) -> None:
    path = f"/{agent['agent']['id']}/secrets"
    secret = operator.call("GET", path).json["secrets"][0]
    time_machine.advance(seconds=5)
    operator.call("DELETE", f"{path}/{secret['id']}")
    assert operator.get(agent)["updated_at"] == time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_secret_of_another_agent_is_not_found(operator: Operator, agent: dict[str, Any]) -> None:
    other = operator.create()
    theirs = operator.call("GET", f"/{other['agent']['id']}/secrets").json["secrets"][0]
    response = operator.call("DELETE", f"/{agent['agent']['id']}/secrets/{theirs['id']}")
    assert response.status_code == 404
