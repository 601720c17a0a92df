"""Tokens: how they are asked for, what is in them, how they are refreshed, and how families end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.callers import FORM, OPERATOR, Operator, ask_refresh, ask_token, bearer, refused
from support.clock import Clock


def decoded(app: Flask, token: dict[str, Any], audience: str = "http://localhost:8080") -> dict[str, Any]:
    """The claims, as a service finds them that verifies offline from the JWKS."""
    jwks = jwt.PyJWKSet.from_dict(app.test_client().get("/.well-known/jwks.json").json)
    kid = jwt.get_unverified_header(token["access_token"])["kid"]
    return dict(
        jwt.decode(
            token["access_token"],
            jwks[kid],
            algorithms=["RS256", "ES256", "EdDSA"],
            audience=audience,
            issuer="http://localhost:8080",
            options={"verify_exp": False, "verify_iat": False},
        )
    )


def test_the_answer_is_the_contracts(client: FlaskClient, agent: dict[str, Any]) -> None:
    response = ask_token(client, agent, scope="read write")
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert list(response.json) == ["access_token", "token_type", "expires_in", "scope", "refresh_token"]
    assert response.json["access_token"].startswith("eyJ")
    assert response.json["refresh_token"].startswith("rt_")
    assert response.json["token_type"] == "Bearer"
    assert (response.json["expires_in"], response.json["scope"]) == (3600, "read write")


def test_the_access_token_is_an_rfc_9068_jwt(
    app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    now = int(time_machine.now().timestamp())
    claims = decoded(app, token)
    assert {k: v for k, v in jwt.get_unverified_header(token["access_token"]).items() if k != "kid"} == {
        "alg": "ES256",
        "typ": "at+jwt",
    }
    assert len(claims.pop("jti")) == 16 + 1 + 22
    assert claims == {
        "iss": "http://localhost:8080",
        "sub": agent["client_id"],
        "aud": "http://localhost:8080",
        "exp": now + 3600,
        "iat": now,
        "client_id": agent["client_id"],
        "scope": "read write",
        "agent_id": agent["agent"]["id"],
        "ver": 1,
    }


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_each_signing_algorithm_works_from_issue_to_use(
    make_app: Callable[..., Flask], tmp_path: Path, algorithm: str
) -> None:
    app = make_app(SIGNING_ALG=algorithm, INSTANCE=str(tmp_path / "new"))
    client = app.test_client()
    token = ask_token(client, Operator(app).create()).json
    assert jwt.get_unverified_header(token["access_token"])["alg"] == algorithm
    assert decoded(app, token)["scope"] == "read write"
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, "read write"),
        ("", "read write"),
        ("write", "write"),
        ("write read", "write read"),
        ("read read", "read"),
    ],
)
def test_scope_is_a_part_of_the_agents_or_all_of_it(
    app: Flask, client: FlaskClient, agent: dict[str, Any], asked: str | None, granted: str
) -> None:
    fields = {} if asked is None else {"scope": asked}
    token = ask_token(client, agent, **fields).json
    assert token["scope"] == decoded(app, token)["scope"] == granted


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ("admin", "admin"),
        ("read admin x", "admin x"),
        ("READ", "READ"),
        ('a"b é', "a?b ?"),
        ("read,write",) * 2,
    ],
)
def test_any_other_scope_is_invalid_and_named(
    client: FlaskClient, agent: dict[str, Any], asked: str, missing: str
) -> None:
    text = refused(ask_token(client, agent, scope=asked), 400, "invalid_scope")
    assert text == f"This agent does not have the scope: {missing}."


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("write  read", "write read"),
        (" read", "read"),
        ("read\twrite", "read write"),
        ("read\n", "read"),
        (" ", "read write"),
    ],
)
def test_any_run_of_blanks_separates_scopes(
    client: FlaskClient, agent: dict[str, Any], asked: str, given: str
) -> None:
    assert ask_token(client, agent, scope=asked).json["scope"] == given


def test_null_in_json_counts_as_left_out(client: FlaskClient, agent: dict[str, Any]) -> None:
    token = ask_token(client, agent, scope=None, resource=None, refresh_token=None).json
    assert token["scope"] == "read write"


def test_an_agent_without_scopes_gets_an_empty_scope(
    app: Flask, client: FlaskClient, operator: Operator
) -> None:
    token = ask_token(client, operator.create(scopes=[])).json
    assert token["scope"] == decoded(app, token)["scope"] == ""
    assert ask_refresh(client, token["refresh_token"]).json["scope"] == ""


def test_a_token_lives_as_long_as_its_agent_says(app: Flask, client: FlaskClient, operator: Operator) -> None:
    token = ask_token(client, operator.create(token_ttl=60)).json
    claims = decoded(app, token)
    assert (token["expires_in"], claims["exp"] - claims["iat"]) == (60, 60)


def test_no_token_outlives_its_agent(
    app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(expires_in=100)
    token = ask_token(client, agent).json
    assert token["expires_in"] == 100
    operator.patch(agent, expires_in=None)
    time_machine.advance(seconds=100)
    refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_grant")


def test_a_resource_becomes_the_audience(app: Flask, client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["https://api.example.com", "plain"])
    token = ask_token(client, agent, resource="https://api.example.com").json
    assert decoded(app, token, "https://api.example.com")["aud"] == "https://api.example.com"


def test_several_resources_become_several_audiences(
    app: Flask, client: FlaskClient, operator: Operator
) -> None:
    agent = operator.create(audiences=["https://api.example.com", "plain"])
    form = (
        f"grant_type=client_credentials&client_id={agent['client_id']}&client_secret={agent['client_secret']}"
        "&resource=plain&resource=https%3A%2F%2Fapi.example.com"
    )
    token = client.post("/oauth/token", data=form, content_type=FORM).json
    assert decoded(app, token, "plain")["aud"] == ["plain", "https://api.example.com"]
    narrowed = ask_refresh(client, token["refresh_token"], resource="plain").json
    assert decoded(app, narrowed, "plain")["aud"] == "plain"
    wide = ask_refresh(client, narrowed["refresh_token"]).json
    assert decoded(app, wide, "plain")["aud"] == ["plain", "https://api.example.com"]
    other = ask_refresh(client, wide["refresh_token"], resource="http://localhost:8080")
    refused(other, 400, "invalid_target")


@pytest.mark.parametrize(
    ("registered", "asked"),
    [
        ("https://api.example", "https://api.example/"),
        ("https://api.example/", "https://api.example"),
        ("https://api.example:443", "HTTPS://API.example"),
        ("http://[2001:DB8::1]:80/a", "http://[2001:db8::1]/a"),
    ],
)
def test_a_resource_may_be_spelled_in_several_ways(
    app: Flask, client: FlaskClient, operator: Operator, registered: str, asked: str
) -> None:
    agent = operator.create(audiences=[registered])
    token = ask_token(client, agent, resource=[asked, registered]).json
    assert decoded(app, token, asked)["aud"] == asked
    assert ask_refresh(client, token["refresh_token"], resource=registered).status_code == 200
    introspected = client.post("/oauth/introspect", json={"token": token["access_token"]}, headers=OPERATOR)
    assert introspected.json["aud"] == asked


@pytest.mark.parametrize(
    "asked",
    [
        " https://api.example",
        " " * 60_000 + "https://api.example",
        "https://api.exa\nmple/",
        "\x01https://api.example",
        "https://ap\u0131.example",
        "https://api.example?",
        "https://api.example#",
        "https:\\\\api.example",
        ["https://api.example"] * 18,
    ],
    ids=lambda asked: repr(asked)[-30:],
)
def test_a_strange_spelling_of_a_resource_is_refused(
    client: FlaskClient, operator: Operator, asked: str | list[str]
) -> None:
    agent = operator.create(audiences=["https://api.example"])
    answer = ask_token(client, agent, resource=asked)
    assert (answer.status_code, answer.json["error"][:9]) == (
        400,
        "invalid_t" if isinstance(asked, str) else "invalid_r",
    )


@pytest.mark.parametrize(
    "asked", ["https://api.example/A", "https://api.example:80", "http://api.example", "API"]
)
def test_another_path_port_or_scheme_is_another_resource(
    client: FlaskClient, operator: Operator, asked: str
) -> None:
    agent = operator.create(audiences=["https://api.example/a", "api"])
    refused(ask_token(client, agent, resource=asked), 400, "invalid_target")


def test_audience_is_another_name_for_resource(app: Flask, client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["one", "two"])
    assert decoded(app, ask_token(client, agent, audience="one").json, "one")["aud"] == "one"
    token = ask_token(client, agent, audience="one", resource="two").json
    assert sorted(decoded(app, token, "one")["aud"]) == ["one", "two"]
    refused(ask_token(client, agent, audience="three"), 400, "invalid_target")


@pytest.mark.parametrize("resource", ["http://localhost:8080", "http://LOCALHOST:8080/", "my-api"])
def test_the_servers_own_audience_may_be_named_as_the_issuer(
    make_app: Callable[..., Flask], resource: str
) -> None:
    app = make_app(AUDIENCE="my-api")
    client = app.test_client()
    token = ask_token(client, Operator(app).create(), resource=resource).json
    assert decoded(app, token, "my-api")["aud"] == "my-api"
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200
    assert ask_refresh(client, token["refresh_token"], resource=resource).status_code == 200


@pytest.mark.parametrize("resource", ["https://other.example.com", ["plain", "other"], "plain/"])
def test_any_other_resource_is_an_invalid_target(
    client: FlaskClient, operator: Operator, resource: str | list[str]
) -> None:
    agent = operator.create(audiences=["plain"])
    refused(ask_token(client, agent, resource=resource), 400, "invalid_target")


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/refresh"])
def test_json_and_form_bodies_are_the_same(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], path: str
) -> None:
    body = {"grant_type": "refresh_token", "refresh_token": token["refresh_token"]}
    first = client.post(path, data=body, content_type=FORM)
    assert first.status_code == 200
    assert client.post(path, json={**body, "refresh_token": first.json["refresh_token"]}).status_code == 200


def test_unknown_parameters_are_ignored(client: FlaskClient, agent: dict[str, Any]) -> None:
    assert ask_token(client, agent, foo={"bar": [1]}, assertion=None).status_code == 200


def test_json_without_its_content_type_is_named(client: FlaskClient) -> None:
    answer = client.post("/oauth/token", data='{"grant_type": "client_credentials"}', content_type=FORM)
    assert "Content-Type: application/json" in refused(answer, 400, "invalid_request")


def test_a_form_may_hold_plain_utf_8(client: FlaskClient, agent: dict[str, Any]) -> None:
    body = f"grant_type=client_credentials&client_id={agent['client_id']}&x=é&client_secret="
    answer = client.post("/oauth/token", data=(body + agent["client_secret"]).encode(), content_type=FORM)
    assert answer.status_code == 200


@pytest.mark.parametrize("grant_type", ["password", "authorization_code", "implicit", 'x"y\\z', "é", " "])
def test_another_grant_type_is_unsupported_and_not_repeated(client: FlaskClient, grant_type: str) -> None:
    text = refused(
        client.post("/oauth/token", json={"grant_type": grant_type}), 400, "unsupported_grant_type"
    )
    assert text == "The grant types here are client_credentials and refresh_token."


@pytest.mark.parametrize("body", [{}, {"grant_type": ""}, {"client_id": "x"}])
def test_a_missing_grant_type_is_an_invalid_request(client: FlaskClient, body: dict[str, str]) -> None:
    assert "grant_type" in refused(client.post("/oauth/token", json=body), 400, "invalid_request")


def test_the_refresh_endpoint_takes_no_other_grant(client: FlaskClient, agent: dict[str, Any]) -> None:
    body = {"grant_type": "client_credentials", **{k: agent[k] for k in ("client_id", "client_secret")}}
    refused(client.post("/oauth/refresh", json=body), 400, "unsupported_grant_type")


@pytest.mark.parametrize("name", ["client_id", "client_secret", "client_assertion", "refresh_token", "token"])
@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/refresh"])
def test_credentials_in_the_url_are_refused(
    client: FlaskClient, agent: dict[str, Any], path: str, name: str
) -> None:
    body = {"grant_type": "client_credentials", **{k: agent[k] for k in ("client_id", "client_secret")}}
    text = refused(client.post(f"{path}?{name}=x", json=body), 400, "invalid_request")
    assert name in text


def test_parameters_in_the_url_do_not_count(client: FlaskClient) -> None:
    response = client.post(
        "/oauth/token?grant_type=client_credentials&scope=read", data={}, content_type=FORM
    )
    assert "grant_type" in refused(response, 400, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        "grant_type=client_credentials&grant_type=client_credentials",
        "grant_type=client_credentials&scope=read&scope=write",
        "grant_type=client_credentials&foo=1&foo=2",
    ],
)
def test_a_repeated_parameter_is_an_invalid_request(client: FlaskClient, body: str) -> None:
    refused(client.post("/oauth/token", data=body, content_type=FORM), 400, "invalid_request")


def test_a_name_repeated_in_json_is_an_invalid_request(client: FlaskClient) -> None:
    body = '{"grant_type": "client_credentials", "scope": "a", "scope": "b"}'
    refused(client.post("/oauth/token", data=body, content_type="application/json"), 400, "invalid_request")


@pytest.mark.parametrize(
    "name", ["grant_type", "client_id", "client_secret", "scope", "refresh_token", "resource"]
)
@pytest.mark.parametrize("value", [5, True, {}, ["x", 1], "\ud800", "a\0b"], ids=repr)
def test_a_parameter_that_is_no_string_is_named(
    client: FlaskClient, agent: dict[str, Any], name: str, value: object
) -> None:
    assert name in refused(ask_token(client, agent, **{name: value}), 400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", FORM),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b'"grant_type"', "application/json"),
        (b"null", "application/json"),
        (b"{", "application/json"),
        (b"{'a': 1}", "application/json"),
        (b'{"a": NaN}', "application/json"),
        (b'{"a": -Infinity}', "application/json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "application/json"),
        (b"[" * 60_000, "application/json"),
        (b'{"a":' * 10_000, "application/json"),
        (b'{"grant_type": "\xff"}', "application/json"),
        (b"\xff\xfe{}", "application/json"),
        (b"grant_type=\xff", FORM),
        (b"grant_type=%ff", FORM),
        (b"&".join(b"p%d=1" % n for n in range(200)), FORM),
        (b"grant_type=client_credentials", "text/plain"),
        (b"grant_type=client_credentials", "multipart/form-data; boundary=x"),
        (b'{"grant_type": "client_credentials"}', "application/vnd.api+json"),
        (b'{"grant_type": "client_credentials"}', ""),
        (b"<a/>", "application/xml"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_cannot_be_read_is_an_invalid_request(
    client: FlaskClient, body: bytes, content_type: str
) -> None:
    refused(client.post("/oauth/token", data=body, content_type=content_type), 400, "invalid_request")


@pytest.mark.parametrize("content_type", [FORM, "application/json"])
def test_a_large_body_is_refused(client: FlaskClient, content_type: str) -> None:
    response = client.post("/oauth/token", data=b"a" * 70_000, content_type=content_type)
    refused(response, 413, "payload_too_large")


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/refresh"])
def test_get_is_not_answered(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


# Refreshing


def test_refreshing_gives_new_tokens_of_the_same_scope(
    app: Flask, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = ask_refresh(client, token["refresh_token"], grant_type="refresh_token")
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json["scope"] == "read write"
    assert response.json["refresh_token"] != token["refresh_token"]
    claims, before = decoded(app, response.json), decoded(app, token)
    assert claims["jti"] != before["jti"]
    assert (claims["sub"], claims["aud"]) == (before["sub"], before["aud"])


def test_a_refresh_token_used_twice_ends_its_family_and_says_so(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    newest = ask_refresh(client, token["refresh_token"]).json["refresh_token"]
    with caplog.at_level(logging.WARNING, "lanyard"):
        refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_grant")
    refused(ask_refresh(client, newest), 400, "invalid_grant")
    assert len(caplog.messages) == 1
    assert agent["agent"]["id"] in caplog.messages[0]
    assert "rt_" not in caplog.text


def test_another_family_of_the_agent_lives_on(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    other = ask_token(client, agent).json
    for _ in range(2):
        ask_refresh(client, token["refresh_token"])
    assert ask_refresh(client, other["refresh_token"]).status_code == 200


def test_the_access_tokens_of_an_ended_family_end_with_it(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    other = ask_token(client, agent).json
    newest = ask_refresh(client, token["refresh_token"]).json
    ask_refresh(client, token["refresh_token"])
    for dead in (token, newest):
        assert client.get("/api/agents/me", headers=bearer(dead)).status_code == 401
    assert client.get("/api/agents/me", headers=bearer(other)).status_code == 200


@pytest.mark.parametrize("text", ["rt_", "rt_" + "a" * 65, "x", "cs_" + "a" * 57, "rt_" + "é" * 65, " "])
def test_a_strange_refresh_token_is_an_invalid_grant(client: FlaskClient, text: str) -> None:
    refused(ask_refresh(client, text), 400, "invalid_grant")


@pytest.mark.parametrize("fields", [{"refresh_token": ""}, {}])
def test_a_missing_refresh_token_is_an_invalid_request(client: FlaskClient, fields: dict[str, str]) -> None:
    assert "refresh_token" in refused(client.post("/oauth/refresh", json=fields), 400, "invalid_request")


def test_a_narrowed_refresh_narrows_that_access_token_only(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(scopes=["read", "write", "admin"])
    token = ask_token(client, agent, scope="read write").json
    narrowed = ask_refresh(client, token["refresh_token"], scope="read").json
    assert narrowed["scope"] == "read"
    following = ask_refresh(client, narrowed["refresh_token"]).json
    assert following["scope"] == "read write"
    text = refused(ask_refresh(client, following["refresh_token"], scope="read admin"), 400, "invalid_scope")
    assert text == "The refresh token was not given the scope: admin."


def test_a_refused_scope_does_not_use_the_token_up(client: FlaskClient, token: dict[str, Any]) -> None:
    refused(ask_refresh(client, token["refresh_token"], scope="admin"), 400, "invalid_scope")
    assert ask_refresh(client, token["refresh_token"]).status_code == 200


def test_a_scope_taken_from_the_agent_is_not_given_again(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    operator.patch(agent, scopes=["read"])
    refused(ask_refresh(client, token["refresh_token"], scope="write"), 400, "invalid_scope")
    narrowed = ask_refresh(client, token["refresh_token"]).json
    assert narrowed["scope"] == "read"
    operator.patch(agent, scopes=[])
    refused(ask_refresh(client, narrowed["refresh_token"]), 400, "invalid_scope")


def test_a_family_without_scopes_gets_none_of_those_given_later(
    client: FlaskClient, operator: Operator
) -> None:
    agent = operator.create(scopes=[])
    token = ask_token(client, agent).json
    operator.patch(agent, scopes=["admin", "read"])
    assert ask_refresh(client, token["refresh_token"]).json["scope"] == ""


def test_an_audience_taken_from_the_agent_is_not_given_again(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(audiences=["plain"])
    token = ask_token(client, agent, resource="plain").json
    operator.patch(agent, audiences=[])
    refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_target")


def test_a_refresh_token_lives_seven_days_from_each_use(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    token = ask_token(client, operator.create()).json
    time_machine.advance(days=7, seconds=-1)
    token = ask_refresh(client, token["refresh_token"]).json
    time_machine.advance(days=7)
    refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_grant")


def test_a_family_lives_thirty_days(client: FlaskClient, operator: Operator, time_machine: Clock) -> None:
    token = ask_token(client, operator.create()).json
    for _ in range(4):
        time_machine.advance(days=6)
        token = ask_refresh(client, token["refresh_token"]).json
    time_machine.advance(days=6, seconds=-1)
    token = ask_refresh(client, token["refresh_token"]).json
    time_machine.advance(seconds=1)
    refused(ask_refresh(client, token["refresh_token"]), 400, "invalid_grant")


def test_credentials_sent_with_a_refresh_are_checked(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    credentials = {name: agent[name] for name in ("client_id", "client_secret")}
    stranger = operator.create()
    strangers = {name: stranger[name] for name in ("client_id", "client_secret")}
    wrong = {**credentials, "client_secret": stranger["client_secret"]}
    refused(ask_refresh(client, token["refresh_token"], **wrong), 401, "invalid_client")
    refused(ask_refresh(client, token["refresh_token"], **strangers), 400, "invalid_grant")
    refused(
        ask_refresh(client, token["refresh_token"], client_id=stranger["client_id"]), 400, "invalid_grant"
    )
    assert ask_refresh(client, token["refresh_token"], **credentials).status_code == 200


@pytest.mark.parametrize("where", ["the setting", "the agent"])
def test_refreshing_may_need_credentials(make_app: Callable[..., Flask], where: str) -> None:
    by_setting = where == "the setting"
    app = make_app(REQUIRE_CLIENT_AUTH_FOR_REFRESH="1" if by_setting else "0")
    client, agent = app.test_client(), Operator(app).create(require_client_auth_for_refresh=not by_setting)
    refresh_token = ask_token(client, agent).json["refresh_token"]
    credentials = {name: agent[name] for name in ("client_id", "client_secret")}
    for fields in ({}, {"client_id": agent["client_id"]}):
        refused(ask_refresh(client, refresh_token, **fields), 401, "invalid_client")
    assert ask_refresh(client, refresh_token, **credentials).status_code == 200
    # Without credentials, a token that was used before does not end its family.
    refused(ask_refresh(client, refresh_token), 401, "invalid_client")
    assert ask_refresh(client, refresh_token, **credentials).status_code == 400


def test_a_refresh_with_the_right_client_id_alone_is_fine(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    assert ask_refresh(client, token["refresh_token"], client_id=agent["client_id"]).status_code == 200


def test_an_access_token_is_no_refresh_token(client: FlaskClient, token: dict[str, Any]) -> None:
    refused(ask_refresh(client, token["access_token"]), 400, "invalid_grant")


def test_the_jwks_is_public_and_cacheable(client: FlaskClient) -> None:
    response = client.get("/.well-known/jwks.json")
    assert response.headers["Cache-Control"].startswith("public, max-age=")
    (key,) = response.json["keys"]
    assert set(key) == {"kty", "crv", "x", "y", "kid", "alg", "use"}
    assert json.dumps(key).count('"d"') == 0
