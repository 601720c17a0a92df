"""The log: what a line tells, and that no secret is ever in one."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
import requests
from flask import Flask, g
from flask.testing import FlaskClient
from joserfc.jwk import ECKey
from support.callers import OPERATOR, Operator, ask_token, bearer
from support.servers import Server

from ops import access_log

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log() -> io.StringIO:
    """What `app` has logged of its requests."""
    return io.StringIO()


@pytest.fixture
def app(log: io.StringIO, make_app: Callable[..., Flask]) -> Flask:
    """An app that logs its requests."""
    app = make_app(ACCESS_LOG="1")
    handler = access_log._access.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(log)
    return app


@pytest.fixture
def lines(log: io.StringIO) -> Lines:
    """The lines logged."""
    return lambda: [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_line_names_caller_route_and_status(client: FlaskClient, lines: Lines) -> None:
    response = client.get("/api/agents?q=night", headers={**OPERATOR, "X-Request-Id": "deploy-7"})
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("time"))
    assert 0 < line.pop("duration_ms") < 10_000
    assert line == {
        "request_id": "deploy-7",
        "address": "127.0.0.1",
        "method": "GET",
        "route": "/api/agents",
        "path": "/api/agents",
        "status": 200,
        "bytes": len(response.data),
        "actor": "admin",
        "client_id": None,
    }


def test_an_agents_line_names_it(client: FlaskClient, operator: Operator, lines: Lines) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json or {}
    client.get("/api/agents/me", headers=bearer(token))
    client.post("/oauth/refresh", json={"refresh_token": token["refresh_token"]})
    named = [(line["actor"], line["client_id"]) for line in lines()]
    assert named == [("admin", None)] + [(agent["agent"]["id"], agent["client_id"])] * 3


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/nowhere", {"status": 404, "route": None, "path": None, "method": "GET"}),
        ("BREW", "/health", {"status": 405, "route": None, "path": None, "method": None}),
        ("HEAD", "/health", {"status": 200, "route": "/health", "bytes": 0}),
        ("GET", "/api/agents/me", {"status": 401, "path": "/api/agents/me", "actor": "anonymous"}),
        ("GET", "/crash", {"status": 500, "route": "/crash", "path": "/crash"}),
    ],
)
def test_errors_have_a_line_too(
    app: Flask, lines: Lines, method: str, path: str, known: dict[str, Any]
) -> None:
    app.add_url_rule("/crash", view_func=lambda: 1 / 0)
    app.test_client().open(path, method=method)
    (line,) = lines()
    assert known.items() <= line.items()


def test_a_path_is_logged_only_where_a_route_matched(
    client: FlaskClient, operator: Operator, lines: Lines
) -> None:
    agent_id = operator.create()["agent"]["id"]
    path = f"/api/agents/{agent_id}"
    client.get(path, headers=OPERATOR)
    client.get(path)
    told = [(line["route"], line["path"]) for line in lines()[1:]]
    assert told == [("/api/agents/<agent_id>", path), ("/api/agents/<agent_id>", None)]


@pytest.mark.parametrize("headers", [OPERATOR, {}], ids=["operator", "anyone"])
def test_a_secret_in_a_path_is_never_logged(app: Flask, log: io.StringIO, headers: dict[str, str]) -> None:
    client = app.test_client()
    rules = [rule for rule in app.url_map.iter_rules() if rule.arguments]
    assert len(rules) > 15
    for rule in rules:
        path = re.sub(r"<[^>]+>", "cs_a-secret", rule.rule)
        for method in rule.methods or ():
            body = {"action": "rotate"}
            client.open(f"{path}?token=cs_a-secret", method=method, headers=headers, json=body)
    assert log.getvalue().count("\n") >= len(rules)
    assert "a-secret" not in log.getvalue()


def test_no_line_can_be_forged(make_app: Callable[..., Flask], capsys: pytest.CaptureFixture[str]) -> None:
    client = make_app(ACCESS_LOG="1", TRUSTED_PROXIES="1").test_client()
    evil = 'x"\u2028\x1b[2J{"status": 200}'.encode().decode("latin-1")
    client.get("/health%0a{}", headers={"X-Forwarded-For": evil})
    client.get("/health", headers={"X-Request-Id": evil})
    told = capsys.readouterr().out
    assert told.isascii()
    assert [json.loads(line)["status"] for line in told.split("\n")[:-1]] == [404, 200]


def test_without_the_setting_no_request_is_logged(
    make_app: Callable[..., Flask], capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app()
    app.test_client().get("/health")
    assert capsys.readouterr().out == ""
    assert access_log._log_request not in app.after_request_funcs[None]


def test_a_warning_names_its_request_and_forges_no_line(app: Flask) -> None:
    record = logging.makeLogRecord({"msg": "one\n2026-01-01 two\r\x85three", "levelname": "WARNING"})
    with app.test_request_context():
        g.request_id = "deploy-7"
        first, *rest = access_log.Formatter().format(record).split("\n")
    assert first.endswith(" WARNING deploy-7 one")
    assert [line[:4] for line in rest] == ["    "] * 3
    assert " WARNING - one" in access_log.Formatter().format(record)


class Session:
    """Calls of every kind, and the secrets that were in them."""

    def __init__(self, server: Server, admin_token: str) -> None:
        self.url = server.url
        self.admin = {"Authorization": f"Bearer {admin_token}"}
        self.secrets = {admin_token}
        self.count = 0

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        response = requests.request(method, self.url + path, **kwargs)
        self.count += 1
        assert response.status_code < 500, response.text
        found = response.json() if response.content else {}
        names = ("access_token", "refresh_token", "client_secret", "secret")
        self.secrets |= {found[name] for name in names if name in found}
        return found

    def wrong(self, prefix: str = "") -> str:
        """A secret that is none here, and must not be logged all the same: it may be one elsewhere."""
        self.secrets.add(made := prefix + secrets.token_urlsafe(32))
        return made

    def manage(self) -> tuple[dict[str, Any], str]:
        """The operator's calls; returns an agent and its path."""
        agent = self.call("POST", "/api/agents", json={"name": "x", "scopes": ["read"]}, headers=self.admin)
        path = f"/api/agents/{agent['agent']['id']}"
        hook = {"name": "x", "url": "http://127.0.0.1:9/hook", "events": ["*"]}
        hook = self.call("POST", "/api/webhooks", json=hook, headers=self.admin)
        for action in ("rotate", "test"):
            self.call("POST", f"/api/webhooks/{hook['webhook']['id']}/{action}", headers=self.admin)
        for authorization in (f"Bearer {self.wrong()}", f"Basic {self.wrong()}", self.wrong()):
            self.call("GET", "/api/agents", headers={"Authorization": authorization})
        self.call("GET", "/api/agents", auth=("admin", self.wrong()))
        self.call("POST", f"/api/agents/{self.wrong('cs_')}/rotate", headers=self.admin)
        self.call("GET", f"/api/webhooks/{self.wrong('whsec_')}", headers=self.admin)
        self.call("GET", f"/api/agents?q={self.wrong('cs_')}&token={self.wrong('rt_')}", headers=self.admin)
        return agent, path

    def sign_in(self, agent: dict[str, Any]) -> None:
        """The token endpoint's, right and wrong."""
        names = {name: agent[name] for name in ("client_id", "client_secret")}
        body = {"grant_type": "client_credentials", **names}
        for kind in ("json", "data", "params"):
            self.call("POST", "/oauth/token", **{kind: body})
        self.call("POST", f"/oauth/token/{names['client_secret']}", json=body)
        self.call("GET", f"/{names['client_secret']}", headers={"Referer": f"http://x/?{self.wrong('rt_')}"})
        basic = (names["client_id"], names["client_secret"])
        self.call("POST", "/oauth/token", data={"grant_type": "client_credentials"}, auth=basic)
        self.call("POST", "/oauth/token", data={"grant_type": self.wrong()}, auth=basic[::-1])
        for wrong in (self.wrong("cs_"), names["client_secret"][:-1] + "!"):
            self.secrets.add(wrong)
            self.call("POST", "/oauth/token", json={**body, "client_secret": wrong})
        for text in ('{"client_secret": "%s', '{"token": "%s"} x', '["%s"]', '{"client_secret": ["%s"]}'):
            sent = text % self.wrong("cs_")
            self.call("POST", "/oauth/token", data=sent, headers={"Content-Type": "application/json"})
        for path in ("/oauth/token", "/api/agents"):
            text_plain = {**self.admin, "Content-Type": "text/plain"}
            self.call("POST", path, data=self.wrong("cs_"), headers=text_plain)
        misplaced = {"X-Request-Id": self.wrong("rt_"), "User-Agent": self.wrong("cs_")}
        self.call("GET", "/health", headers=misplaced)

    def assert_itself(self) -> None:
        """Signing in by assertion: a good one, the same again, a stranger's."""
        key, other = ECKey.generate_key("P-256"), ECKey.generate_key("P-256")
        fields = {"name": "keyed", "token_endpoint_auth_method": "private_key_jwt"}
        fields |= {"jwks": {"keys": [key.as_dict(private=False)]}}
        client_id = self.call("POST", "/api/agents", json=fields, headers=self.admin)["client_id"]
        now = int(time.time())
        claims = {"iss": client_id, "sub": client_id, "exp": now + 60, "jti": secrets.token_hex()}
        issuer = self.call("GET", "/.well-known/oauth-authorization-server")["issuer"]
        for signer in (key, other):
            assertion = jwt.encode({**claims, "aud": issuer}, signer.as_pem(private=True), "ES256")
            self.secrets.add(assertion)
            type_ = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
            body = {"grant_type": "client_credentials", "client_assertion_type": type_}
            for _ in range(2):
                self.call("POST", "/oauth/token", data={**body, "client_assertion": assertion})

    def use_tokens(self, agent: dict[str, Any], path: str) -> None:
        """Refresh, introspect, revoke, rotate; tokens in every wrong place."""
        names = {name: agent[name] for name in ("client_id", "client_secret")}
        token = self.call("POST", "/oauth/token", json={"grant_type": "client_credentials", **names})
        access, refresh = token["access_token"], token["refresh_token"]
        mine = {"Authorization": f"Bearer {access}"}
        self.call("GET", f"/api/agents/me?access_token={access}", headers=mine)
        self.call("GET", f"/api/agents/{access}", headers=mine)
        self.call("GET", "/api/agents/me", headers={"Authorization": f"Bearer {access[:-4]}abcd"})
        for shown in (access, refresh, self.wrong("rt_"), self.wrong()):
            self.call("POST", "/oauth/introspect", data={"token": shown, **names})
            self.call("POST", f"/oauth/introspect?token={shown}", data=names)
        for _ in range(2):
            self.call("POST", "/oauth/refresh", json={"refresh_token": refresh})
        for shown in (access, refresh):
            self.call("POST", "/oauth/revoke", data={"token": shown, **names})
        self.call("POST", path, json={"action": "rotate"}, headers=self.admin)
        self.call("DELETE", path, headers=self.admin)

    def break_http(self, server: Server) -> None:
        """What gunicorn refuses by itself: it is in no log."""
        for text in ("GET /?t=%s", "%s / HTTP/1.1\r\n", "GET / HTTP/1.1\r\n%s \r\n", "GET /%s" + "a" * 5000):
            sent = (text % self.wrong("cs_")).encode() + b"\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(65536).startswith(b"HTTP/1.1 4")
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(sent[:-4])


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        pytest.param((), {"ACCESS_LOG": "1"}, id="lanyards"),
        pytest.param(("--access-logfile=-", "--log-level=debug"), {}, id="gunicorns"),
    ],
)
def test_no_secret_of_a_whole_session_is_in_any_log(
    serve: Callable[..., Server], arguments: tuple[str, ...], variables: dict[str, str]
) -> None:
    server = serve(*arguments, WEBHOOK_ALLOW_PRIVATE="1", **variables).wait()
    session = Session(server, (server.instance / "admin_token").read_text().strip())
    agent, path = session.manage()
    session.sign_in(agent)
    session.assert_itself()
    session.use_tokens(agent, path)
    session.break_http(server)
    log = server.stop()
    assert "was used twice" in log
    if variables:
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        # All others waited for the server to start, as long as that took; one of the session asks there too.
        assert len([line for line in lines if line["route"] != "/health"]) == session.count - 1
        assert {200, 201, 204, 400, 401, 403, 404, 415} <= {line["status"] for line in lines}
    assert len(session.secrets) > 40
    for secret in session.secrets:
        encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
        assert not [form for form in (secret, secret[11:], encoded[4:-4]) if form in log], log
    # Ids are random, and may hold these in their middle.
    assert not re.search(r"\$2b\$|(?<![\w-])(cs_|rt_|whsec_|eyJ)", log)
