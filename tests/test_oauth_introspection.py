"""Asking about tokens and ending them: who may, and what they are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from joserfc import jwt
from joserfc.jwk import ECKey
from support.callers import FORM, OPERATOR, Operator, ask_refresh, ask_token, basic, bearer, refused
from support.clock import Clock
from support.strange_tokens import STRANGE_TOKENS
from werkzeug.test import TestResponse

INACTIVE = {"active": False}


def introspect(
    client: FlaskClient, token: str, headers: dict[str, str] | None = None, **body: str
) -> TestResponse:
    return client.post("/oauth/introspect", data={"token": token, **body}, headers=OPERATOR | (headers or {}))


def revoke(
    client: FlaskClient, token: str, headers: dict[str, str] | None = None, **body: str
) -> TestResponse:
    return client.post("/oauth/revoke", data={"token": token, **body}, headers=headers or OPERATOR)


def test_a_good_access_token_is_described(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent, scope="read").json
    response = introspect(client, token["access_token"])
    now = int(time_machine.now().timestamp())
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert len(response.json.pop("jti")) == 39
    assert response.json == {
        "active": True,
        "scope": "read",
        "client_id": agent["client_id"],
        "sub": agent["client_id"],
        "aud": "http://localhost:8080",
        "iss": "http://localhost:8080",
        "exp": now + 3600,
        "iat": now,
        "agent_id": agent["agent"]["id"],
        "token_type": "Bearer",
    } | {"jti": response.json["jti"]}


def test_an_audience_taken_from_the_agent_is_gone_from_its_tokens(
    client: FlaskClient, operator: Operator
) -> None:
    agent = operator.create(audiences=["one", "two"])
    both = ask_token(client, agent, resource=["one", "two"]).json["access_token"]
    one = ask_token(client, agent, resource="one").json["access_token"]
    assert introspect(client, both).json["aud"] == ["one", "two"]
    operator.patch(agent, audiences=["two"])
    assert introspect(client, both).json["aud"] == "two"
    assert introspect(client, one).json == INACTIVE
    operator.patch(agent, audiences=["two", "one"])
    assert introspect(client, one).json["aud"] == "one"


def test_a_token_whose_audience_was_taken_can_be_revoked(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["one"])
    token = ask_token(client, agent, resource="one").json["access_token"]
    operator.patch(agent, audiences=[])
    assert revoke(client, token).status_code == 200
    operator.patch(agent, audiences=["one"])
    assert introspect(client, token).json == INACTIVE


def test_a_good_refresh_token_is_described(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    about = introspect(client, token["refresh_token"]).json
    now = int(time_machine.now().timestamp())
    assert set(about) == {
        "active", "scope", "client_id", "sub", "aud", "iss", "exp", "iat", "jti", "agent_id", "token_type",
    }  # fmt: skip
    assert (about["active"], about["scope"], about["token_type"]) == (True, "read write", "refresh_token")
    assert (about["iat"], about["exp"]) == (now, now + 7 * 86_400)
    assert about["jti"] not in token["refresh_token"]


def test_asking_about_a_refresh_token_does_not_use_it(client: FlaskClient, token: dict[str, Any]) -> None:
    newest = ask_refresh(client, token["refresh_token"]).json
    assert introspect(client, token["refresh_token"]).json == INACTIVE, "it was used"
    assert introspect(client, newest["refresh_token"]).json["active"] is True
    assert ask_refresh(client, newest["refresh_token"]).status_code == 200


def test_a_token_for_another_audience_is_active(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["https://api.example.com"])
    token = ask_token(client, agent, resource="https://api.example.com").json
    for kind in ("access_token", "refresh_token"):
        assert introspect(client, token[kind]).json["aud"] == "https://api.example.com"


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "id_token", ""])
@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
def test_a_hint_does_not_mislead(client: FlaskClient, token: dict[str, Any], kind: str, hint: str) -> None:
    assert introspect(client, token[kind], token_type_hint=hint).json["active"] is True


@pytest.mark.parametrize("strange", STRANGE_TOKENS.values(), ids=STRANGE_TOKENS)
def test_a_strange_token_is_inactive(
    client: FlaskClient, token: dict[str, Any], strange: Callable[[str], str]
) -> None:
    text = strange(token["access_token"])
    if text:
        assert introspect(client, text).json == INACTIVE
        assert revoke(client, text).status_code == 200


def test_a_client_secret_is_no_token(client: FlaskClient, agent: dict[str, Any]) -> None:
    assert introspect(client, agent["client_secret"]).json == INACTIVE


@pytest.mark.parametrize("path", ["/oauth/introspect", "/oauth/revoke"])
@pytest.mark.parametrize("body", [{}, {"token": ""}, {"access_token": "x"}])
def test_the_token_must_be_sent(client: FlaskClient, path: str, body: dict[str, str]) -> None:
    refused(client.post(path, data=body, headers=OPERATOR), 400, "invalid_request")


@pytest.mark.parametrize("path", ["/oauth/introspect", "/oauth/revoke"])
def test_the_token_must_not_be_in_the_url(client: FlaskClient, path: str) -> None:
    refused(client.post(f"{path}?token=x", data={"token": "x"}, headers=OPERATOR), 400, "invalid_request")


Headers = Callable[[dict[str, Any], dict[str, Any]], dict[str, str]]

CALLERS: dict[str, Headers] = {
    "the operator": lambda agent, token: OPERATOR,
    "the operator by Basic": lambda agent, token: basic("admin", OPERATOR["Authorization"][7:]),
    "an agent by its secret": lambda agent, token: basic(agent["client_id"], agent["client_secret"]),
    "an agent by its token": lambda agent, token: bearer(token),
}


@pytest.mark.parametrize("headers", CALLERS.values(), ids=CALLERS)
def test_who_may_ask_about_anybodys_token(client: FlaskClient, operator: Operator, headers: Headers) -> None:
    owner, other = operator.create(), operator.create()
    token = ask_token(client, owner).json
    who = headers(other, ask_token(client, other).json)
    response = client.post("/oauth/introspect", data={"token": token["access_token"]}, headers=who)
    assert response.json["active"] is True


def test_an_agent_may_ask_with_its_secret_in_the_body(client: FlaskClient, agent: dict[str, Any]) -> None:
    token = ask_token(client, agent).json
    body = {"token": token["access_token"], **{k: agent[k] for k in ("client_id", "client_secret")}}
    assert client.post("/oauth/introspect", json=body).json["active"] is True


def test_an_agent_may_ask_with_an_assertion(client: FlaskClient, operator: Operator) -> None:
    key = ECKey.generate_key("P-256")
    jwks = {"keys": [key.as_dict(private=False)]}
    agent = operator.create(token_endpoint_auth_method="private_key_jwt", jwks=jwks)
    claims = {"iss": agent["client_id"], "sub": agent["client_id"], "aud": "http://localhost:8080"}
    assertion = jwt.encode({"alg": "ES256"}, claims | {"jti": "1", "exp": int(time.time()) + 60}, key)
    body = {
        "token": "x",
        "client_assertion": assertion,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }
    assert client.post("/oauth/introspect", data=body).json == INACTIVE


@pytest.mark.parametrize("path", ["/oauth/introspect", "/oauth/revoke"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer guess"},
        {"Authorization": "Bearer"},
        basic("admin", "guess"),
        basic("cid_x", "cs_x"),
        {"Authorization": "Basic \xff"},
    ],
    ids=repr,
)
def test_nobody_else_may_call(
    client: FlaskClient, token: dict[str, Any], path: str, headers: dict[str, str]
) -> None:
    response = client.post(path, data={"token": token["access_token"]}, headers=headers)
    assert response.status_code == 401
    assert "WWW-Authenticate" in response.headers
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200


def test_local_mode_does_not_open_introspection(make_app: Callable[..., Any]) -> None:
    local = make_app(LOCAL="1").test_client()
    refused(local.post("/oauth/introspect", data={"token": "x"}), 401, "invalid_client")


def test_a_dead_agent_may_not_ask(client: FlaskClient, operator: Operator, agent: dict[str, Any]) -> None:
    token = ask_token(client, agent).json
    operator.act(agent, "deactivate")
    for headers in (bearer(token), basic(agent["client_id"], agent["client_secret"])):
        assert client.post("/oauth/introspect", data={"token": "x"}, headers=headers).status_code == 401


@pytest.mark.parametrize("headers", [OPERATOR, None], ids=["the operator", "an agent's token"])
def test_credentials_in_header_and_body_are_an_invalid_request(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], headers: dict[str, str] | None
) -> None:
    body = {"token": "x", **{k: agent[k] for k in ("client_id", "client_secret")}}
    refused(
        client.post("/oauth/introspect", data=body, headers=headers or bearer(token)), 400, "invalid_request"
    )


# The ways a token dies, each seen at introspection, on Lanyard's own API, and at refresh

End = Callable[[FlaskClient, Operator, dict[str, Any], dict[str, Any], Clock], object]

DEATHS: dict[str, End] = {
    "deactivated": lambda client, operator, agent, token, hand: operator.act(agent, "deactivate"),
    "reactivated since": lambda client, operator, agent, token, hand: (
        operator.act(agent, "deactivate"),
        operator.act(agent, "reactivate"),
    ),
    "deleted": lambda client, operator, agent, token, hand: operator.call(
        "DELETE", f"/{agent['agent']['id']}"
    ),
    "agent expired": lambda client, operator, agent, token, hand: (
        operator.patch(agent, expires_in=1),
        hand.advance(seconds=1),
    ),
    "all revoked": lambda client, operator, agent, token, hand: operator.act(
        agent, "rotate", revoke_tokens=True
    ),
    "family revoked": lambda client, operator, agent, token, hand: revoke(client, token["refresh_token"]),
    "signing key leaked": lambda client, operator, agent, token, hand: (
        client.post("/api/keys/rotate", json={"now": True}, headers=OPERATOR),
        revoke(client, token["refresh_token"]),
    ),
    "time passed": lambda client, operator, agent, token, hand: hand.advance(days=7),
}


@pytest.mark.parametrize("end", DEATHS.values(), ids=DEATHS)
def test_a_dead_token_is_dead_everywhere_from_the_next_request(
    client: FlaskClient, operator: Operator, time_machine: Clock, end: End
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    assert introspect(client, token["access_token"]).json["active"] is True
    end(client, operator, agent, token, time_machine)
    assert introspect(client, token["access_token"]).json == INACTIVE
    assert introspect(client, token["refresh_token"]).json == INACTIVE
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_grant")


# Revocation


def test_a_revoked_access_token_is_dead_and_its_refresh_token_lives(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    other = ask_token(client, agent).json
    response = revoke(client, token["access_token"], bearer(token))
    assert (response.status_code, response.json) == (200, {})
    assert response.headers["Cache-Control"] == "no-store"
    assert introspect(client, token["access_token"]).json == INACTIVE
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert client.get("/api/agents/me", headers=bearer(other)).status_code == 200
    assert ask_refresh(client, token["refresh_token"]).status_code == 200


def test_revoking_a_refresh_token_ends_its_whole_family(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    other = ask_token(client, agent).json
    newest = ask_refresh(client, token["refresh_token"]).json
    secret = basic(agent["client_id"], agent["client_secret"])
    assert revoke(client, newest["refresh_token"], secret).status_code == 200
    refused(ask_refresh(client, newest["refresh_token"]), 400, "invalid_grant")
    for dead in (token, newest):
        assert introspect(client, dead["access_token"]).json == INACTIVE
    assert introspect(client, other["access_token"]).json["active"] is True


@pytest.mark.parametrize("which", ["used", "newest"])
def test_a_used_refresh_token_takes_its_family_too(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], which: str
) -> None:
    newest = ask_refresh(client, token["refresh_token"]).json
    sent = token if which == "used" else newest
    assert revoke(client, sent["refresh_token"], bearer(newest)).status_code == 200
    refused(ask_refresh(client, newest["refresh_token"]), 400, "invalid_grant")
    for dead in (token, newest):
        assert introspect(client, dead["access_token"]).json == INACTIVE


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
def test_an_agent_with_the_admin_scope_revokes_any_token(
    client: FlaskClient, operator: Operator, token: dict[str, Any], kind: str
) -> None:
    admin = ask_token(client, operator.create(scopes=["admin"])).json
    assert revoke(client, token[kind], bearer(admin)).status_code == 200
    assert introspect(client, token[kind]).json == INACTIVE


def test_a_refresh_token_that_would_be_refused_is_inactive(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    operator.patch(agent, scopes=["read"])
    assert introspect(client, token["refresh_token"]).json["scope"] == "read"
    operator.patch(agent, scopes=[])
    assert introspect(client, token["refresh_token"]).json == INACTIVE


def test_revoking_again_is_fine(client: FlaskClient, token: dict[str, Any]) -> None:
    for _ in range(2):
        assert revoke(client, token["access_token"]).status_code == 200
        assert revoke(client, token["refresh_token"]).status_code == 200


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
def test_an_agent_may_not_revoke_anothers_token(
    client: FlaskClient, operator: Operator, token: dict[str, Any], kind: str
) -> None:
    other = operator.create()
    headers = basic(other["client_id"], other["client_secret"])
    refused(revoke(client, token[kind], headers), 400, "invalid_grant")
    assert introspect(client, token[kind]).json["active"] is True


def test_json_bodies_work_too(client: FlaskClient, token: dict[str, Any]) -> None:
    body = {"token": token["access_token"]}
    assert client.post("/oauth/introspect", json=body, headers=OPERATOR).json["active"] is True
    assert client.post("/oauth/revoke", json=body, headers=OPERATOR).status_code == 200
    assert client.post("/oauth/introspect", json=body, headers=OPERATOR).json == INACTIVE


def test_a_form_content_type_is_needed(client: FlaskClient) -> None:
    response = client.post("/oauth/introspect", data="token=x", content_type="text/plain", headers=OPERATOR)
    refused(response, 400, "invalid_request")
    assert FORM in response.json["error_description"]
