"""Callers of an app in this process: the operator, agents, the command line."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from flask.testing import FlaskClient
from support.instances import ADMIN_TOKEN
from werkzeug.test import TestResponse

import credentials
from commands.__main__ import lanyard as commands

OPERATOR = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


class Operator:
    """The operator: calls the management API with the admin token."""

    def __init__(self, app: Flask) -> None:
        self.client = app.test_client()

    def call(self, method: str, path: str = "", **kwargs: Any) -> TestResponse:
        return self.client.open(f"/api/agents{path}", method=method, headers=OPERATOR, **kwargs)

    def create(self, **fields: Any) -> dict[str, Any]:
        response = self.call("POST", json={"name": "an agent", "scopes": ["read", "write"], **fields})
        assert response.status_code == 201, response.text
        return dict(response.json or {})

    def get(self, agent: Mapping[str, Any]) -> dict[str, Any]:
        answer = self.call("GET", f"/{agent['agent']['id']}").json
        assert answer
        return dict(answer["agent"])

    def act(self, agent: Mapping[str, Any], action: str, **fields: Any) -> TestResponse:
        return self.call("POST", f"/{agent['agent']['id']}", json={"action": action, **fields})

    def patch(self, agent: Mapping[str, Any], **fields: Any) -> TestResponse:
        return self.call("PATCH", f"/{agent['agent']['id']}", json=fields)


def ask_token(client: FlaskClient, agent: Mapping[str, Any], **fields: Any) -> TestResponse:
    """A token request with the agent's secret; `fields` are added or replace others."""
    body = {
        "grant_type": "client_credentials",
        "client_id": agent["client_id"],
        "client_secret": agent["client_secret"],
        **fields,
    }
    return client.post("/oauth/token", json=body)


def ask_refresh(client: FlaskClient, refresh_token: str, **fields: Any) -> TestResponse:
    return client.post("/oauth/refresh", json={"refresh_token": refresh_token, **fields})


def bearer(token: Mapping[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {token['access_token']}"}


def run_command(app: Flask, *arguments: object, **options: Any) -> Result:
    """Run a command of `./lanyard` in the app; its result has `stdout`, `stderr` and `exit_code`."""
    info = ScriptInfo(create_app=lambda: app)
    return CliRunner().invoke(commands, list(map(str, arguments)), obj=info, **options)


def basic(username: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{username}:{password}".encode()).decode()}


def forged(secret: str) -> str:
    """A wrong secret of the same hint, well formed."""
    body = secret[:11] + credentials.new_client_secret(4).text[11:-6]
    return body + credentials._checksum(body)


FORM = "application/x-www-form-urlencoded"


def refused(response: TestResponse, status: int, error: str) -> str:
    """Assert an error answer's shape; returns its description."""
    assert (response.status_code, response.json["error"]) == (status, error), response.text
    assert set(response.json) == {"error", "error_description"}
    assert response.headers["Cache-Control"] == "no-store"
    assert response.mimetype == "application/json"
    return str(response.json["error_description"])
