"""Signing keys: made at the first start, rotated without a gap, dead at once when leaked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
from flask import Flask
from flask.testing import FlaskClient
from joserfc.jwk import import_key
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer, run_command
from support.clock import Clock
from support.instances import settings_for

import keys
from app import create_app
from config import SettingError


def published(client: FlaskClient) -> list[dict[str, str]]:
    found: list[dict[str, str]] = client.get("/.well-known/jwks.json").json["keys"]
    return found


def kid_of(token: dict[str, Any]) -> str:
    return str(jwt.get_unverified_header(token["access_token"])["kid"])


def rotate(client: FlaskClient, **body: Any) -> dict[str, Any]:
    response = client.post("/api/keys/rotate", json=body, headers=OPERATOR)
    assert response.status_code == 200, response.text
    return dict(response.json["key"])


def states(client: FlaskClient) -> list[str]:
    return [key["state"] for key in client.get("/api/keys", headers=OPERATOR).json["keys"]]


@pytest.mark.parametrize(
    ("algorithm", "members"),
    [
        ("RS256", {"kty": "RSA"}),
        ("ES256", {"kty": "EC", "crv": "P-256"}),
        ("EdDSA", {"kty": "OKP", "crv": "Ed25519"}),
    ],
)
def test_the_first_start_makes_one_key(tmp_path: Path, algorithm: str, members: dict[str, str]) -> None:
    (key,) = published(create_app(settings_for(tmp_path, SIGNING_ALG=algorithm), serving=True).test_client())
    assert key["kid"] == import_key(dict(key)).thumbprint()
    assert {name: key[name] for name in ("alg", "use", *members)} == {
        "alg": algorithm,
        "use": "sig",
        **members,
    }
    assert "d" not in key


def test_a_restart_keeps_the_key(make_app: Callable[..., Flask]) -> None:
    assert published(make_app().test_client()) == published(make_app().test_client())


def test_a_key_is_published_then_signs_then_retires_and_is_gone(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(token_ttl=86_400)
    old = kid_of(ask_token(client, agent).json)
    new = rotate(client)["kid"]
    assert states(client) == ["published", "signing"]
    assert {key["kid"] for key in published(client)} == {old, new}
    time_machine.advance(seconds=keys.LEAD - 1)
    last = ask_token(client, agent).json
    assert kid_of(last) == old
    time_machine.advance(seconds=1)
    assert states(client) == ["signing", "retired"]
    assert kid_of(ask_token(client, agent).json) == new
    assert kid_of(ask_refresh(client, last["refresh_token"]).json) == new
    time_machine.advance(seconds=86_400 - 2)
    assert client.get("/api/agents/me", headers=bearer(last)).status_code == 200
    assert {key["kid"] for key in published(client)} == {old, new}
    time_machine.advance(seconds=2)
    assert states(client) == ["signing", "gone"]
    assert [key["kid"] for key in published(client)] == [new]


def test_a_verifier_that_caches_the_jwks_never_meets_an_unknown_key(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    max_age = int(client.get("/.well-known/jwks.json").headers["Cache-Control"].split("max-age=")[1])
    cached: list[str] = []
    fetched_at = time_machine.now()
    for second in range(0, 1200, 20):
        if second == 300:
            rotate(client)
        if not cached or (time_machine.now() - fetched_at).total_seconds() >= max_age:
            cached, fetched_at = [key["kid"] for key in published(client)], time_machine.now()
        assert kid_of(ask_token(client, agent).json) in cached
        time_machine.advance(seconds=20)
    assert len(cached) == 2


def test_rotating_twice_in_a_row_leaves_no_gap(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    first = kid_of(ask_token(client, agent).json)
    second = rotate(client)["kid"]
    time_machine.advance(seconds=100)
    third = rotate(client)["kid"]
    seen = []
    for _ in range(6):
        seen.append(kid_of(ask_token(client, agent).json))
        time_machine.advance(seconds=100)
    assert list(dict.fromkeys(seen)) == [first, second, third]


def test_a_leaked_key_is_gone_at_once_with_all_it_signed(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    new = rotate(client, now=True)["kid"]
    assert states(client) == ["signing"]
    assert [key["kid"] for key in published(client)] == [new]
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    fresh = ask_token(client, agent).json
    assert kid_of(fresh) == new
    assert client.get("/api/agents/me", headers=bearer(fresh)).status_code == 200


def test_a_leaked_key_is_dead_in_a_worker_with_an_old_key_set(
    make_app: Callable[..., Flask],
) -> None:
    here, there = make_app(), make_app()
    agent = Operator(here).create()
    token = ask_token(there.test_client(), agent).json
    new = rotate(here.test_client(), now=True)["kid"]
    assert there.test_client().get("/api/agents/me", headers=bearer(token)).status_code == 401
    fresh = ask_token(there.test_client(), agent).json
    assert kid_of(fresh) == new
    assert there.test_client().get("/api/agents/me", headers=bearer(fresh)).status_code == 200


def test_a_new_keys_token_is_good_in_a_worker_with_an_old_key_set(
    make_app: Callable[..., Flask],
) -> None:
    here, there = make_app(), make_app()
    agent = Operator(here).create()
    ask_token(there.test_client(), agent)
    rotate(here.test_client(), now=True)
    fresh = ask_token(here.test_client(), agent).json
    assert there.test_client().get("/api/agents/me", headers=bearer(fresh)).status_code == 200


def test_a_change_of_algorithm_is_a_rotation(make_app: Callable[..., Flask], time_machine: Clock) -> None:
    before = make_app()
    agent = Operator(before).create()
    token = ask_token(before.test_client(), agent).json
    after = make_app(SIGNING_ALG="EdDSA").test_client()
    assert [key["alg"] for key in published(after)] == ["ES256", "EdDSA"]
    assert kid_of(ask_token(after, agent).json) == kid_of(token)
    time_machine.advance(seconds=keys.LEAD)
    fresh = ask_token(after, agent).json
    assert jwt.get_unverified_header(fresh["access_token"])["alg"] == "EdDSA"
    for good in (token, fresh):
        assert after.get("/api/agents/me", headers=bearer(good)).status_code == 200
    assert len(published(make_app(SIGNING_ALG="EdDSA").test_client())) == 2, "a restart makes no other"


def test_a_command_does_not_change_the_signing_algorithm(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    server = make_app(SIGNING_ALG="ES256", INSTANCE=str(tmp_path / "new"))
    command = create_app(settings_for(tmp_path / "new"))
    assert len(published(server.test_client())) == 1
    run_command(command, "keys", "rotate")
    assert [key["alg"] for key in published(server.test_client())] == ["ES256", "ES256"]


@pytest.mark.sqlite
def test_a_command_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="LANYARD_INSTANCE must be the server's"):
        create_app(settings_for(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_clock_set_back_does_not_stop_signing(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    rotate(client, now=True)
    time_machine.advance(hours=-1)
    earlier = ask_token(client, agent).json
    assert client.get("/api/agents/me", headers=bearer(earlier)).status_code == 200
    assert states(client) == ["signing"]
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401


def test_a_worker_with_an_old_key_set_publishes_new_keys(
    make_app: Callable[..., Flask],
) -> None:
    here, there = make_app().test_client(), make_app().test_client()
    assert published(here) == published(there)
    new = rotate(here, now=True)["kid"]
    assert [key["kid"] for key in published(there)] == [new]


def test_an_option_in_the_url_is_not_overlooked(client: FlaskClient) -> None:
    response = client.post("/api/keys/rotate?now=true", headers=OPERATOR)
    assert response.status_code == 400
    assert len(published(client)) == 1


def test_the_list_shows_no_key(client: FlaskClient) -> None:
    (key,) = client.get("/api/keys", headers=OPERATOR).json["keys"]
    assert set(key) == {"kid", "alg", "state", "created_at", "signs_from", "gone_at"}


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/keys"), ("POST", "/api/keys/rotate")])
def test_keys_are_the_operators(client: FlaskClient, token: dict[str, Any], method: str, path: str) -> None:
    assert client.open(path, method=method).status_code == 401
    assert client.open(path, method=method, headers=bearer(token)).status_code == 403


@pytest.mark.parametrize("body", [{"now": "yes"}, {"now": None}, {"later": True}, []])
def test_a_bad_rotation_is_refused(client: FlaskClient, body: Any) -> None:
    assert client.post("/api/keys/rotate", json=body, headers=OPERATOR).status_code == 400
    assert len(published(client)) == 1


def test_the_commands_list_and_rotate(app: Flask) -> None:
    run = partial(run_command, app)
    assert "signing" in run("keys", "list").output
    assert "signs from" in run("keys", "rotate").output
    listed = run("keys", "list").output.splitlines()
    assert [line.split()[1] for line in listed] == ["STATE", "published", "signing"]
    run("keys", "rotate", "--now")
    assert len(run("keys", "list").output.splitlines()) == 2
