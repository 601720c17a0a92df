"""An instance with two workers and a clock that is moved, and whether it is as `expected.py` has it."""

from __future__ import annotations

import base64
import shutil
import tempfile
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant
from support.callers import OPERATOR
from support.clock import Clock
from support.expected import ISSUER, Agent, Grant, Secret, written
from support.instances import close, copy_instance, settings_for
from werkzeug.test import TestResponse

import models
from app import create_app


class World(RuleBasedStateMachine):
    """Agents of one instance, served by two workers in turn, while time passes."""

    def __init__(self, first_start: Path) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(models, "time", self.clock)
        self.folder = Path(tempfile.mkdtemp(dir=first_start.parent))
        copy_instance(first_start, self.folder)
        settings = settings_for(self.folder, EVENT_RETENTION_DAYS="3650")
        self.workers = [create_app(settings, serving=True) for _ in range(2)]
        self.clients = cycle([worker.test_client() for worker in self.workers])
        # Each call comes from an address of its own: throttling is tested elsewhere.
        self.address = 0
        self.key_era = 0
        self.all_agents: list[Agent] = []
        self.all_grants: list[Grant] = []

    def teardown(self) -> None:
        self.patch.undo()
        for worker in self.workers:
            close(worker)
        shutil.rmtree(self.folder)

    @property
    def now(self) -> Any:
        return self.clock.now()

    def call(self, method: str, path: str, **kwargs: Any) -> TestResponse:
        self.address += 1
        address = f"10.0.{self.address >> 8 & 255}.{self.address & 255}"
        return next(self.clients).open(
            path, method=method, environ_overrides={"REMOTE_ADDR": address}, **kwargs
        )

    def operate(self, method: str, path: str, status: int, **kwargs: Any) -> Any:
        """Call as the operator; the answer, which has the status expected."""
        response = self.call(method, path, headers=OPERATOR, **kwargs)
        assert response.status_code == status, response.text
        return response.json if response.data else None

    def act(self, grant: Grant, method: str, path: str, status: int, **kwargs: Any) -> Any:
        """Call with a grant's access token; the answer, or None when the token is refused, as it must be."""
        headers = {"Authorization": f"Bearer {grant.access}"}
        response = self.call(method, path, headers=headers, **kwargs)
        if not self.is_good_here(grant):
            assert_refused(response, 401, "invalid_token")
            return None
        assert response.status_code == status, response.text
        return response.json if response.data else {}

    def is_good_here(self, grant: Grant) -> bool:
        return grant.access_is_live(self.now, self.key_era) and ISSUER in grant.audiences

    # What must hold at any time.

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        self.the_agents_are_as_they_should_be()
        self.live_secrets_work_and_dead_ones_do_not()
        self.the_secrets_are_listed()
        self.live_access_tokens_work_and_dead_ones_do_not()
        self.live_refresh_tokens_are_known_and_dead_ones_are_not()
        self.usage_is_what_was_used()
        self.the_log_tells_what_happened()

    def the_agents_are_as_they_should_be(self) -> None:
        there = [agent for agent in reversed(self.all_agents) if not agent.deleted]
        listed = self.operate("GET", "/api/agents", 200)
        assert listed == {"agents": [agent.shown(self.now) for agent in there], "next": None}
        live = self.operate("GET", "/api/agents?is_active=true", 200)["agents"]
        assert [agent["id"] for agent in live] == [agent.id for agent in there if agent.is_live(self.now)]

    def live_secrets_work_and_dead_ones_do_not(self) -> None:
        for agent in self.all_agents:
            for secret in agent.secrets:
                response = self.call(
                    "POST", "/oauth/introspect", **signed(agent, secret, {"token": "none"}, "json")
                )
                if agent.is_live(self.now) and secret.is_live(self.now):
                    assert (response.status_code, response.json) == (200, {"active": False})
                else:
                    assert_refused(response, 401, "invalid_client")

    def the_secrets_are_listed(self) -> None:
        for agent in self.all_agents:
            path = f"/api/agents/{agent.id}/secrets"
            if agent.deleted:
                self.operate("GET", path, 404)
                continue
            live = [secret for secret in reversed(agent.secrets) if secret.is_live(self.now)]
            listed = self.operate("GET", path, 200)["secrets"]
            assert [{**told, "id": None} for told in listed] == [
                {
                    "id": None,
                    "hint": hint(secret),
                    "created_at": written(secret.created_at),
                    "expires_at": written(secret.expires_at),
                    "last_used_at": written(secret.last_used_at),
                }
                for secret in live
            ]

    def live_access_tokens_work_and_dead_ones_do_not(self) -> None:
        for grant in self.all_grants:
            lives = grant.access_is_live(self.now, self.key_era) and grant.held_audiences()
            facts = grant.access_facts() if lives else {"active": False}
            assert self.introspect(grant.access) == facts
            me = self.act(grant, "GET", "/api/agents/me", 200)
            assert me in (None, {"agent": grant.agent.shown(self.now)})

    def live_refresh_tokens_are_known_and_dead_ones_are_not(self) -> None:
        for grant in self.all_grants:
            lives = grant.refresh_is_live(self.now) and not grant.family.lost_all()
            assert self.introspect(grant.refresh) == (grant.refresh_facts() if lives else {"active": False})

    def introspect(self, token: str) -> Any:
        return self.operate("POST", "/oauth/introspect", 200, json={"token": token})

    def usage_is_what_was_used(self) -> None:
        for grant in {grant.agent: grant for grant in self.all_grants if self.is_good_here(grant)}.values():
            usage = self.act(grant, "GET", "/api/agents/me/usage", 200)
            assert usage == grant.agent.usage(self.now)

    def the_log_tells_what_happened(self) -> None:
        events = self.operate("GET", "/api/events?limit=200", 200)["events"]
        for agent in self.all_agents:
            about = [event for event in reversed(events) if event["data"].get("agent_id") == agent.id]
            assert {event["data"]["client_id"] for event in about} <= {agent.client_id}
            told = [
                (event["type"], event["actor"], event["data"]["agent_name"])
                for event in about
                if event["type"] != "auth.failed"
            ]
            assert told == agent.events
        assert all(one["timestamp"] >= other["timestamp"] for one, other in pairwise(events))


def hint(secret: Secret) -> str:
    return secret.text[3:11]


def asking(asked: list[str] | None, resource: list[str]) -> dict[str, Any]:
    """`scope` and `resource`, when they are asked for."""
    wanted: dict[str, Any] = {} if asked is None else {"scope": " ".join(asked)}
    return {**wanted, "resource": resource} if resource else wanted


def plain(body: dict[str, Any], way: str) -> dict[str, Any]:
    return {"json": body} if way == "json" else {"data": body}


def signed(agent: Agent, secret: Secret, body: dict[str, Any], way: str) -> dict[str, Any]:
    """The body with an agent's credentials, in one of the ways to send them."""
    if way != "basic":
        return plain({**body, "client_id": agent.client_id, "client_secret": secret.text}, way)
    basic = base64.b64encode(f"{agent.client_id}:{secret.text}".encode()).decode()
    return {"data": body, "headers": {"Authorization": f"Basic {basic}"}}


def assert_refused(response: TestResponse, status: int, error: str | None) -> None:
    assert response.status_code == status, response.text
    assert set(response.json) == {"error", "error_description"}
    assert error in (None, response.json["error"])
