"""Which access tokens Lanyard's own API takes, and what it says to the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select
from support.callers import OPERATOR, Operator, ask_token, bearer
from support.clock import Clock
from support.strange_tokens import STRANGE_TOKENS, encoded

import keys
from models import db

ASK_HERE = 'Bearer resource_metadata="http://localhost:8080/.well-known/oauth-protected-resource"'
INVALID_TOKEN = 'Bearer error="invalid_token"'


def test_a_request_without_a_token_is_told_the_scheme_and_no_error(client: FlaskClient) -> None:
    response = client.get("/api/agents/me")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == ASK_HERE
    assert response.json["error"] == "unauthorized"


@pytest.mark.parametrize("header", ["Basic YTpi", "Digest x", "Negotiate"])
def test_another_scheme_is_no_token(client: FlaskClient, header: str) -> None:
    response = client.get("/api/agents/me", headers={"Authorization": header})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, ASK_HERE)


def test_the_scheme_is_case_insensitive(client: FlaskClient, token: dict[str, Any]) -> None:
    header = {"Authorization": f"bEARER {token['access_token']}"}
    assert client.get("/api/agents/me", headers=header).status_code == 200


@pytest.mark.parametrize("strange", STRANGE_TOKENS.values(), ids=STRANGE_TOKENS)
def test_a_strange_token_is_invalid(
    client: FlaskClient, token: dict[str, Any], strange: Callable[[str], str]
) -> None:
    header = f"Bearer {strange(token['access_token'])}"
    response = client.get("/api/agents/me", headers={"Authorization": header.encode().decode("latin-1")})
    assert response.status_code == 401
    assert response.json["error"] == "invalid_token"
    assert response.headers["WWW-Authenticate"].startswith(INVALID_TOKEN)


def signing_key() -> Any:
    return keys.signing_key(db.session.scalar(select(keys.NEWEST_KEY)))


def signed(app: Flask, claims: dict[str, Any], **header: Any) -> str:
    """A JWT that Lanyard's own key signs: what only its checks of the claims can refuse."""
    with app.app_context():
        key = signing_key()
        pem = key.as_pem(private=True)
        return jwt.encode(claims, pem, "RS256", headers={"typ": "at+jwt", "kid": key.kid, **header})


def claims_of(token: dict[str, Any]) -> dict[str, Any]:
    return dict(jwt.decode(token["access_token"], options={"verify_signature": False}))


def test_a_token_signed_anew_with_the_same_claims_is_good(
    app: Flask, client: FlaskClient, token: dict[str, Any]
) -> None:
    again = {"access_token": signed(app, claims_of(token))}
    assert client.get("/api/agents/me", headers=bearer(again)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://other.example.com"},
        {"iss": None},
        {"aud": "https://api.example.com"},
        {"aud": ["https://api.example.com"]},
        {"aud": None},
        {"exp": 1},
        {"exp": None},
        {"exp": "tomorrow"},
        {"exp": float("nan")},
        {"iat": None},
        {"jti": None},
        {"sub": None},
        {"client_id": "cid_unknown"},
        {"client_id": 7},
        {"agent_id": "another"},
        {"ver": 0},
        {"ver": None},
    ],
    ids=repr,
)
def test_a_token_whose_claims_are_not_right_is_invalid(
    app: Flask, client: FlaskClient, token: dict[str, Any], change: dict[str, Any]
) -> None:
    claims = {k: v for k, v in {**claims_of(token), **change}.items() if v is not None}
    response = client.get("/api/agents/me", headers=bearer({"access_token": signed(app, claims)}))
    assert (response.status_code, response.json["error"]) == (401, "invalid_token")


@pytest.mark.parametrize("typ", ["JWT", "", None, "id+jwt"])
def test_a_jwt_of_another_type_is_no_access_token(
    app: Flask, client: FlaskClient, token: dict[str, Any], typ: str | None
) -> None:
    other = {"access_token": signed(app, claims_of(token), typ=typ)}
    assert client.get("/api/agents/me", headers=bearer(other)).status_code == 401


def test_the_public_key_is_no_hmac_secret(app: Flask, client: FlaskClient, token: dict[str, Any]) -> None:
    with app.app_context():
        key = signing_key()
    pem = key.as_pem(private=False)
    header = {"alg": "HS256", "typ": "at+jwt", "kid": key.kid}
    signing_input = f"{encoded(header)}.{encoded(claims_of(token))}"
    mac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signing_input.encode(), pem)
    forged = {"access_token": f"{signing_input}.{encoded(mac)}"}
    assert client.get("/api/agents/me", headers=bearer(forged)).status_code == 401


@pytest.mark.parametrize("where", ["jwk", "jku", "x5u"])
def test_a_key_that_the_token_brings_along_is_not_used(
    client: FlaskClient, token: dict[str, Any], where: str
) -> None:
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(stranger.public_key()))
    brought = {"jwk": public, "jku": "https://evil.example.com/jwks", "x5u": "https://evil.example.com/x5u"}
    pem = stranger.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    headers = {"typ": "at+jwt", where: brought[where]}
    forged = {"access_token": jwt.encode(claims_of(token), pem, "RS256", headers=headers)}
    assert client.get("/api/agents/me", headers=bearer(forged)).status_code == 401


def test_a_token_ends_at_its_expiry(client: FlaskClient, operator: Operator, time_machine: Clock) -> None:
    token = ask_token(client, operator.create(token_ttl=60)).json
    time_machine.advance(seconds=59)
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200
    time_machine.advance(seconds=1)
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401


def test_a_token_for_another_audience_is_refused_here(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["https://api.example.com"])
    token = ask_token(client, agent, resource="https://api.example.com").json
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401


MANAGEMENT = [
    ("POST", ""),
    ("GET", ""),
    ("GET", "/{id}"),
    ("PATCH", "/{id}"),
    ("PUT", "/{id}"),
    ("DELETE", "/{id}"),
    ("POST", "/{id}"),
    ("POST", "/{id}/rotate"),
    ("POST", "/{id}/deactivate"),
    ("POST", "/{id}/reactivate"),
    ("GET", "/{id}/secrets"),
    ("DELETE", "/{id}/secrets/x"),
]


def test_the_list_of_management_routes_is_complete(app: Flask) -> None:
    routes = {
        (
            method,
            re.sub("<[^>]*agent_id>", "{id}", rule.rule.replace("/api/agents", "")).replace(
                "<secret_id>", "x"
            ),
        )
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("agents.")
        for method in rule.methods or ()
        if method != "HEAD"
    }
    assert routes == set(MANAGEMENT)


@pytest.mark.parametrize(("method", "path"), MANAGEMENT)
def test_management_wants_the_operator(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], method: str, path: str
) -> None:
    url = "/api/agents" + path.format(id=agent["agent"]["id"])
    nobody = client.open(url, method=method, json={})
    assert (nobody.status_code, nobody.headers["WWW-Authenticate"]) == (401, ASK_HERE)
    guess = client.open(url, method=method, json={}, headers={"Authorization": "Bearer guess"})
    assert guess.status_code == 401
    mere_agent = client.open(url, method=method, json={}, headers=bearer(token))
    assert (mere_agent.status_code, mere_agent.json["error"]) == (403, "insufficient_scope")
    assert 'error="insufficient_scope"' in mere_agent.headers["WWW-Authenticate"]
    assert 'scope="admin"' in mere_agent.headers["WWW-Authenticate"]


def test_an_agent_with_the_admin_scope_manages_agents(client: FlaskClient, operator: Operator) -> None:
    token = ask_token(client, operator.create(scopes=["admin"])).json
    created = client.post("/api/agents", json={"name": "made by an agent"}, headers=bearer(token))
    assert created.status_code == 201


def test_a_token_without_the_admin_scope_of_its_agent_does_not(
    client: FlaskClient, operator: Operator
) -> None:
    token = ask_token(client, operator.create(scopes=["admin", "read"]), scope="read").json
    assert client.get("/api/agents", headers=bearer(token)).status_code == 403


def test_an_agent_that_lost_the_admin_scope_manages_no_more(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(scopes=["admin", "read"])
    token = ask_token(client, agent).json
    operator.patch(agent, scopes=["read"])
    assert client.get("/api/agents", headers=bearer(token)).status_code == 403


def test_the_admin_token_is_no_agents_token(client: FlaskClient) -> None:
    assert client.get("/api/agents/me", headers=OPERATOR).status_code == 401
