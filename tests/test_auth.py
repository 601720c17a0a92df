"""Who may call: the operator, agents by their access tokens (RFC 6750), anyone in local mode."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from flask import Flask, request
from flask.testing import FlaskClient
from sqlalchemy import select
from support.callers import OPERATOR, Operator, ask_token, basic, bearer
from support.clock import Clock
from support.instances import ADMIN_TOKEN, settings_for
from support.strange_tokens import STRANGE_TOKENS, encoded

import keys
from app import create_app
from config import SettingError
from models import db

ASK_HERE = 'Bearer resource_metadata="http://localhost:8080/.well-known/oauth-protected-resource"'


INVALID_TOKEN = 'Bearer error="invalid_token"'


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


@pytest.mark.parametrize("headers", [OPERATOR, basic("admin", ADMIN_TOKEN)], ids=["Bearer", "Basic"])
def test_the_admin_token_opens_the_management_api(client: FlaskClient, headers: dict[str, str]) -> None:
    assert client.get("/api/agents", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer " + ADMIN_TOKEN[:-1]},
        {"Authorization": "Bearer " + ADMIN_TOKEN + "x"},
        {"Authorization": "Bearer " + ADMIN_TOKEN.upper()},
        {"Authorization": ADMIN_TOKEN},
        {"Authorization": "Digest " + ADMIN_TOKEN},
        {"Authorization": "Bearer \xff\xfe"},
        {"Authorization": "Basic \xff\xfe"},
        {"Authorization": "Basic !"},
        basic("root", ADMIN_TOKEN),
        basic("admin", ""),
        basic("admin", "guess"),
        basic("", ADMIN_TOKEN),
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
        {"Host": "localhost"},
    ],
    ids=repr,
)
def test_any_other_credential_is_a_401(client: FlaskClient, headers: dict[str, str]) -> None:
    response = client.post("/api/agents", json={"name": "x"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert ADMIN_TOKEN not in response.text


def test_only_its_owner_reads_the_admin_token_of_the_first_start(tmp_path: Path) -> None:
    app = create_app(settings_for(tmp_path, ADMIN_TOKEN=""), serving=True)
    kept = tmp_path / "admin_token"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    token = kept.read_text().strip()
    assert len(token) == 43
    headers = {"Authorization": f"Bearer {token}"}
    assert app.test_client().get("/api/agents", headers=headers).status_code == 200
    create_app(settings_for(tmp_path, ADMIN_TOKEN=""), serving=True)
    assert kept.read_text().strip() == token, "a second start keeps it"
    assert [path.name for path in tmp_path.glob(".*")] == [], "no draft is left behind"


def test_a_kept_admin_token_is_tightened_to_its_owner(tmp_path: Path) -> None:
    (tmp_path / "admin_token").write_text("a-token-the-operator-wrote\n")
    (tmp_path / "admin_token").chmod(0o644)
    create_app(settings_for(tmp_path, ADMIN_TOKEN=""), serving=True)
    assert stat.S_IMODE((tmp_path / "admin_token").stat().st_mode) == 0o600


def test_a_linked_admin_token_keeps_the_mode_of_its_target(tmp_path: Path) -> None:
    target, instance = tmp_path / "managed", tmp_path / "instance"
    target.write_text("a-token-the-operator-wrote\n")
    target.chmod(0o640)
    instance.mkdir()
    (instance / "admin_token").symlink_to(target)
    app = create_app(settings_for(instance, ADMIN_TOKEN=""), serving=True)
    headers = {"Authorization": "Bearer a-token-the-operator-wrote"}
    assert app.test_client().get("/api/agents", headers=headers).status_code == 200
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.unlink()
    with pytest.raises(SettingError, match="admin_token"):
        create_app(settings_for(instance, ADMIN_TOKEN=""), serving=True)
    assert (instance / "admin_token").is_symlink(), "no other token takes its place"


@pytest.mark.parametrize("text", ["", "\n", "short", "sixteen chars and spaces"])
def test_a_kept_admin_token_that_is_no_good_stops_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "admin_token").write_text(text)
    with pytest.raises(SettingError, match="admin_token must be at least 16"):
        create_app(settings_for(tmp_path, ADMIN_TOKEN=""), serving=True)


def test_no_admin_token_is_kept_when_the_settings_give_one(tmp_path: Path) -> None:
    create_app(settings_for(tmp_path), serving=True)
    assert not (tmp_path / "admin_token").exists()


def test_trusted_proxies_tell_where_a_request_came_from(make_app: Callable[..., Flask]) -> None:
    seen: list[str | None] = []

    def address_of(app: Flask) -> str | None:
        app.before_request(lambda: seen.append(request.remote_addr))
        app.test_client().get("/health", headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.9"})
        return seen[-1]

    assert address_of(make_app()) == "127.0.0.1"
    assert address_of(make_app(TRUSTED_PROXIES="1")) == "203.0.113.9"
    assert address_of(make_app(TRUSTED_PROXIES="2")) == "198.51.100.1"


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("203.0.113.20:51234", "203.0.113.20"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:203.0.113.20", "203.0.113.20"),
        ("unknown", "127.0.0.1"),
        ("x" * 200, "127.0.0.1"),
        ("\0", "127.0.0.1"),
        ("203.0.113.20:51234:9", "127.0.0.1"),
    ],
)
def test_what_a_proxy_forwards_is_an_address(
    make_app: Callable[..., Flask], forwarded: str, address: str
) -> None:
    client = make_app(TRUSTED_PROXIES="1").test_client()
    headers = {**OPERATOR, "X-Forwarded-For": forwarded}
    assert client.post("/api/agents", json={"name": "x"}, headers=headers).status_code == 201
    (event,) = client.get("/api/events", headers=OPERATOR).json["events"]
    assert event["address"] == address


def test_a_port_that_a_proxy_appends_makes_no_new_guesser(make_app: Callable[..., Flask]) -> None:
    client = make_app(TRUSTED_PROXIES="1").test_client()
    statuses = []
    for port in range(60):
        headers = {"Authorization": "Bearer a-guess", "X-Forwarded-For": f"203.0.113.20:{50_000 + port}"}
        statuses.append(client.get("/api/agents", headers=headers).status_code)
    assert 429 in statuses


# Local mode


@pytest.fixture
def local(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(LOCAL="1").test_client()


def create(local: FlaskClient, **kwargs: Any) -> Any:
    request = {"base_url": "http://localhost:8080", "json": {"name": "x"}, **kwargs}
    if "data" in request:
        del request["json"]
    return local.post("/api/agents", **request)


def test_local_mode_needs_no_credentials(local: FlaskClient) -> None:
    assert create(local).status_code == 201


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST"])
def test_local_mode_answers_this_machines_names(local: FlaskClient, host: str) -> None:
    assert create(local, headers={"Host": host}).status_code == 201


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_local_mode_answers_loopback_peers(local: FlaskClient, address: str) -> None:
    assert create(local, environ_overrides={"REMOTE_ADDR": address}).status_code == 201


@pytest.mark.parametrize(
    "request_",
    [
        {"environ_overrides": {"REMOTE_ADDR": "192.168.0.7"}},
        {"environ_overrides": {"REMOTE_ADDR": "::ffff:192.168.0.7"}},
        {"environ_overrides": {"REMOTE_ADDR": "fe80::1%eth0"}},
        {"environ_overrides": {"REMOTE_ADDR": ""}},
        {"headers": {"Host": "evil.example.com"}},
        {"headers": {"Host": "evil.example.com:8080"}},
        {"headers": {"Host": "localhost.evil.example.com"}},
        {"headers": {"Host": "localhost@evil.example.com"}},
        {"headers": {"Host": "127.0.0.1.nip.io"}},
        {"headers": {"Host": ""}},
        {"headers": {"X-Forwarded-For": "127.0.0.1"}},
        {"headers": {"X-Forwarded-Host": "localhost"}},
        {"headers": {"Forwarded": "for=127.0.0.1"}},
        {"headers": {"X-Real-IP": "127.0.0.1"}},
        {"headers": {"X-Forwarded": "for=127.0.0.1"}},
        {"headers": {"X-Original-Forwarded-For": "127.0.0.1"}},
        {"headers": {"X-Cluster-Client-IP": "127.0.0.1"}},
        {"headers": {"Sec-Fetch-Site": "cross-site"}},
        {"headers": {"Sec-Fetch-Site": "same-site"}},
        {"headers": {"Via": "1.1 proxy"}},
        {"headers": {"Origin": "https://evil.example.com"}},
        {"headers": {"Origin": "http://localhost:3000"}},
        {"headers": {"Origin": "https://localhost:8080"}},
        {"headers": {"Origin": "null"}},
        {"headers": {"Origin": ""}},
        {"data": '{"name": "x"}', "content_type": "text/plain"},
        {"data": '{"name": "x"}', "content_type": "application/x-www-form-urlencoded"},
        {"data": '{"name": "x"}', "content_type": "multipart/form-data; boundary=x"},
        {"data": '{"name": "x"}', "content_type": "text/plain; application/json"},
        {"data": '{"name": "x"}', "content_type": ""},
    ],
    ids=repr,
)
def test_local_mode_refuses_other_hosts_origins_and_proxies(
    local: FlaskClient, request_: dict[str, Any]
) -> None:
    response = create(local, **request_)
    assert (response.status_code, response.json["error"]) == (403, "forbidden")


@pytest.mark.parametrize("path", ["/", "/health", "/oauth/token", "/.well-known/jwks.json", "/nowhere"])
def test_local_mode_guards_every_address(local: FlaskClient, path: str) -> None:
    assert local.get(path, headers={"Host": "evil.example.com"}).status_code == 403


def test_a_page_of_lanyards_own_may_ask(local: FlaskClient) -> None:
    headers = {"Host": "localhost:8080", "Origin": "http://localhost:8080"}
    assert create(local, headers=headers).status_code == 201


def test_forms_still_reach_the_oauth_endpoints_in_local_mode(local: FlaskClient) -> None:
    response = local.post("/oauth/token", base_url="http://localhost:8080", data={"grant_type": "x"})
    assert response.json["error"] == "unsupported_grant_type"


def test_local_mode_still_judges_credentials_that_are_sent(local: FlaskClient) -> None:
    headers = {"Authorization": "Bearer guess"}
    response = local.get("/api/agents", base_url="http://localhost:8080", headers=headers)
    assert response.status_code == 401


def test_local_mode_does_not_stand_in_for_an_agents_token(local: FlaskClient) -> None:
    assert local.get("/api/agents/me", base_url="http://localhost:8080").status_code == 401


def test_a_request_without_a_token_gets_a_challenge_without_error(client: FlaskClient) -> None:
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
        return jwt.encode(claims, pem, "ES256", headers={"typ": "at+jwt", "kid": key.kid, **header})


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
def test_management_needs_the_operator(
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
