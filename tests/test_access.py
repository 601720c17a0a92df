"""Who is calling: the operator's proof, and local mode's guard."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from flask.testing import FlaskClient
from support.callers import OPERATOR, basic
from support.instances import ADMIN_TOKEN, settings_for

from app import create_app
from config import SettingError


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
def test_anything_else_is_a_401(client: FlaskClient, headers: dict[str, str]) -> None:
    response = client.post("/api/agents", json={"name": "x"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert ADMIN_TOKEN not in response.text


def test_the_first_start_makes_an_admin_token_that_only_its_owner_reads(tmp_path: Path) -> None:
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
def test_local_mode_refuses_strangers(local: FlaskClient, request_: dict[str, Any]) -> None:
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


def test_local_mode_opens_nothing_of_an_agents(local: FlaskClient) -> None:
    assert local.get("/api/agents/me", base_url="http://localhost:8080").status_code == 401
