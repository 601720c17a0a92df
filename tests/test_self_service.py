"""What an agent does for itself with its access token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bcrypt
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support.callers import Operator, ask_refresh, ask_token, bearer
from support.clock import Clock
from werkzeug.test import TestResponse

from models import Rotation, db


def test_an_agent_sees_itself_as_the_operator_does(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = client.get("/api/agents/me", headers=bearer(token))
    assert response.status_code == 200
    assert response.json == {"agent": operator.get(agent)}
    assert response.headers["Cache-Control"] == "no-store"


def test_usage_counts_tokens_refreshes_and_the_days(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    first = ask_token(client, agent).json
    time_machine.advance(days=1)
    ask_token(client, agent)
    last = ask_refresh(client, first["refresh_token"]).json
    usage = client.get("/api/agents/me/usage", headers=bearer(last)).json
    now = time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (usage["token_count"], usage["refresh_count"]) == (2, 1)
    assert (usage["last_activity_at"], usage["last_token_issued_at"]) == (now, now)
    assert len(usage["daily"]) == 30
    assert usage["daily"][-1] == {"date": now[:10], "tokens_issued": 1, "tokens_refreshed": 1}
    assert (usage["daily"][-2]["tokens_issued"], usage["daily"][-2]["tokens_refreshed"]) == (1, 0)
    assert all(day["tokens_issued"] == 0 for day in usage["daily"][:-2])
    assert [day["date"] for day in usage["daily"]] == sorted({day["date"] for day in usage["daily"]})


def test_the_usage_of_a_month_ago_leaves_the_series(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    ask_token(client, agent)
    time_machine.advance(days=30)
    token = ask_token(client, agent).json
    usage = client.get("/api/agents/me/usage", headers=bearer(token)).json
    assert sum(day["tokens_issued"] for day in usage["daily"]) == 1
    assert usage["token_count"] == 2


def test_usage_lists_rotations_newest_first(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    token = ask_token(client, agent).json
    operator.act(agent, "rotate")
    time_machine.advance(seconds=1)
    client.post("/api/agents/me/rotate", headers=bearer(token))
    history = client.get("/api/agents/me/usage", headers=bearer(token)).json["rotation_history"]
    assert [entry["rotated_by"] for entry in history] == ["self", "admin"]
    assert history[0]["rotated_at"] == time_machine.now().strftime("%Y-%m-%dT%H:%M:%SZ")


def test_of_many_rotations_the_newest_hundred_are_kept(
    app: Flask, client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    for _ in range(103):
        operator.act(agent, "rotate")
    history = client.get("/api/agents/me/usage", headers=bearer(token)).json["rotation_history"]
    assert len(history) == 100
    with app.app_context():
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Rotation)) == 100


def test_an_agent_rotates_its_own_secret(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = client.post("/api/agents/me/rotate", headers=bearer(token))
    assert response.status_code == 200
    assert set(response.json) == {"client_secret"}
    assert ask_token(client, agent).status_code == 401
    assert ask_token(client, {**agent, **response.json}).status_code == 200
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 200


def test_an_agent_rotates_with_a_grace_period(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = client.post("/api/agents/me/rotate", headers=bearer(token), json={"grace_period": 60})
    assert response.status_code == 200
    assert ask_token(client, agent).status_code == 200


def test_an_agent_rotates_six_times_a_minute_at_most(
    client: FlaskClient,
    operator: Operator,
    agent: dict[str, Any],
    token: dict[str, Any],
    time_machine: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rotate() -> TestResponse:
        return client.post("/api/agents/me/rotate", headers=bearer(token))

    assert [rotate().status_code for _ in range(6)] == [200] * 6
    time_machine.advance(seconds=20)
    with monkeypatch.context() as patch:
        patch.setattr(bcrypt, "hashpw", lambda *_: pytest.fail("a hash was spent"))
        refused = rotate()
    assert (refused.status_code, refused.json["error"]) == (429, "too_many_requests")
    assert refused.headers["Retry-After"] == "40"
    assert operator.act(agent, "rotate").status_code == 200, "the operator's do not count"
    time_machine.advance(seconds=40)
    assert rotate().status_code == 200


def test_many_rotations_at_once_do_not_hold_up_the_operators(
    app: Flask, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    def rotate(_: int) -> int:
        return app.test_client().post("/api/agents/me/rotate", headers=bearer(token)).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = pool.map(rotate, range(200))
        time.sleep(0.2)
        started = time.monotonic()
        assert operator.act(agent, "rotate", revoke_tokens=True).status_code == 200
        assert time.monotonic() - started < 2
    assert set(statuses) <= {200, 401, 429}


def test_rotations_count_against_the_rate_limit(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(rate_limit=3)
    token = ask_token(client, agent).json
    statuses = [client.post("/api/agents/me/rotate", headers=bearer(token)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert ask_refresh(client, token["refresh_token"]).status_code == 429


def test_an_agents_rotation_can_end_its_tokens(client: FlaskClient, token: dict[str, Any]) -> None:
    response = client.post("/api/agents/me/rotate", headers=bearer(token), json={"revoke_tokens": True})
    assert response.status_code == 200
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    assert ask_refresh(client, token["refresh_token"]).status_code == 400


def test_an_agent_switches_itself_off_and_cannot_switch_itself_on(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    response = client.post("/api/agents/me/deactivate", headers=bearer(token))
    assert response.status_code == 200
    assert set(response.json) == {"message", "agent"}
    assert response.json["agent"] == operator.get(agent)
    assert response.json["agent"]["is_active"] is False
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    path = f"/api/agents/{agent['agent']['id']}/reactivate"
    assert client.post(path, headers=bearer(token)).status_code == 401
    assert ask_token(client, agent).status_code == 401


def test_an_agent_deletes_itself(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    assert client.delete("/api/agents/me", headers=bearer(token)).status_code == 204
    assert operator.call("GET", f"/{agent['agent']['id']}").status_code == 404
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401


@pytest.mark.parametrize("path", ["/rotate", "/deactivate"])
def test_an_unknown_field_is_named_and_changes_nothing(
    client: FlaskClient, agent: dict[str, Any], token: dict[str, Any], path: str
) -> None:
    response = client.post(f"/api/agents/me{path}", headers=bearer(token), json={"force": True})
    assert response.status_code == 400
    assert response.json["fields"] == {"force": ["Unknown field."]}
    assert ask_token(client, agent).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_another_method_on_oneself_is_a_405_and_not_the_operators(
    client: FlaskClient, token: dict[str, Any], method: str
) -> None:
    response = client.open("/api/agents/me", method=method, json={}, headers=bearer(token))
    assert (response.status_code, response.json["error"]) == (405, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
