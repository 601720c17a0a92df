"""Two changes of one agent at the same moment: the outcome is one that one of the two orders leaves."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from flask import Flask
from support.callers import OPERATOR, Operator, ask_token, refused
from support.instances import ADMIN_TOKEN
from support.servers import Server

import credentials

DELAYS = (0, 0, 0.002, 0.005)  # seconds that the first of a pair leaves later, one a try
SCOPES = ("read", "write")


@dataclass
class Grant:
    """A refresh token and the access token that came with it."""

    version: int
    scope: tuple[str, ...]
    is_newest: bool = True  # of its family, whose id is that of the first grant
    is_access_revoked: bool = False


@dataclass
class Model:
    """What the contract says of one agent that has a secret `old` and a grant `old`."""

    exists: bool = True
    is_active: bool = True
    name: str = "an agent"
    scopes: tuple[str, ...] = SCOPES
    version: int = 1
    secrets: set[str] = field(default_factory=lambda: {"old"})
    token_count: int = 1
    refresh_count: int = 0
    has_family: bool = True
    grants: dict[str, Grant] = field(default_factory=lambda: {"old": Grant(1, SCOPES)})
    others: dict[str, Grant] = field(default_factory=dict)  # of families of their own

    def rotate(self, me: str) -> tuple[int, Any]:
        """The operator's rotation."""
        if not self.exists:
            return 404, None
        self.secrets = {me}
        return 200, None

    def deactivate(self, me: str) -> tuple[int, Any]:
        """The operator's."""
        if not self.exists:
            return 404, None
        if self.is_active:
            self.is_active = False
            self._end_tokens()
        return 200, None

    def delete(self, me: str) -> tuple[int, Any]:
        """The operator's."""
        if not self.exists:
            return 404, None
        self.exists = False
        self._end_tokens()
        return 204, None

    def patch(self, me: str) -> tuple[int, Any]:
        """Another name, and a scope taken away."""
        if not self.exists:
            return 404, None
        self.name, self.scopes = "renamed", ("read",)
        return 200, None

    def rotate_myself(self, me: str) -> tuple[int, Any]:
        """With the old grant's access token, as the two that follow."""
        return self.rotate(me) if self._is_good(self.grants["old"]) else (401, None)

    def deactivate_myself(self, me: str) -> tuple[int, Any]:
        return self.deactivate(me) if self._is_good(self.grants["old"]) else (401, None)

    def delete_myself(self, me: str) -> tuple[int, Any]:
        return self.delete(me) if self._is_good(self.grants["old"]) else (401, None)

    def token(self, me: str) -> tuple[int, Any]:
        """With the old secret."""
        if not (self.exists and self.is_active and "old" in self.secrets):
            return 401, None
        self.token_count += 1
        self.others[me] = Grant(self.version, self.scopes)
        return 200, self.scopes

    def refresh(self, me: str) -> tuple[int, Any]:
        """With the old grant's refresh token."""
        old = self.grants["old"]
        if not (self.exists and self.is_active and self.has_family):
            return 400, None
        if not old.is_newest:
            # RFC 9700 §4.14: a token used twice ends the family, its access tokens too.
            self.has_family = False
            for grant in self.grants.values():
                grant.is_access_revoked = True
            return 400, None
        self.refresh_count += 1
        old.is_newest = False
        scope = tuple(name for name in old.scope if name in self.scopes)
        self.grants[me] = Grant(self.version, scope)
        return 200, scope

    def revoke(self, me: str) -> tuple[int, Any]:
        """The old grant's refresh token, by the operator: always 200 (RFC 7009 §2.2)."""
        if self.exists and self.has_family and self._is_live(self.grants["old"]):
            self.has_family = False
            for grant in self.grants.values():
                grant.is_access_revoked = True
        return 200, None

    def _end_tokens(self) -> None:
        self.version += 1
        self.has_family = False

    def _is_live(self, grant: Grant) -> bool:
        return self.exists and self.is_active and grant.version == self.version

    def _is_good(self, grant: Grant) -> bool:
        return self._is_live(grant) and not grant.is_access_revoked

    def _held(self, grant: Grant) -> tuple[str, ...]:
        return tuple(name for name in grant.scope if name in self.scopes)

    def seen(self) -> dict[str, Any]:
        """All that can be asked about afterwards."""
        row = (self.is_active, self.name, self.scopes, self.token_count, self.refresh_count)
        seen: dict[str, Any] = {
            "row": row if self.exists else None,
            "secrets": self.secrets if self.exists else set(),
        }
        for name, grant in (*self.grants.items(), *self.others.items()):
            refreshable = grant.is_newest and (name in self.others or self.has_family)
            seen[f"access {name}"] = self._held(grant) if self._is_good(grant) else None
            seen[f"refresh {name}"] = self._held(grant) if self._is_live(grant) and refreshable else None
        return seen


OPERATIONS = (
    "rotate",
    "refresh",
    "deactivate",
    "delete",
    "patch",
    "token",
    "revoke",
    "rotate_myself",
    "deactivate_myself",
    "delete_myself",
)


class Trial:
    """A new agent with a grant, two operations on it at once, and what was to be seen then."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        body = {"name": "an agent", "scopes": SCOPES}
        self.agent = requests.post(f"{self.url}/api/agents", json=body, headers=OPERATOR).json()
        self.path = f"/api/agents/{self.agent['agent']['id']}"
        self.grants = {"old": requests.post(f"{self.url}/oauth/token", json=self._secret()).json()}
        self.hints = {self.agent["client_secret"][3:11]: "old"}
        self.together = threading.Barrier(2)

    def _secret(self) -> dict[str, str]:
        names = ("client_id", "client_secret")
        return {"grant_type": "client_credentials", **{name: self.agent[name] for name in names}}

    def _request(self, operation: str) -> tuple[str, str, dict[str, Any]]:
        mine = {"headers": {"Authorization": f"Bearer {self.grants['old']['access_token']}"}}
        theirs = {"headers": OPERATOR}
        refresh_token = self.grants["old"]["refresh_token"]
        fields = {"name": "renamed", "scopes": ["read"]}
        requests_: dict[str, tuple[str, str, dict[str, Any]]] = {
            "rotate": ("POST", f"{self.path}/rotate", theirs),
            "deactivate": ("POST", f"{self.path}/deactivate", theirs),
            "delete": ("DELETE", self.path, theirs),
            "patch": ("PATCH", self.path, {**theirs, "json": fields}),
            "rotate_myself": ("POST", "/api/agents/me/rotate", mine),
            "deactivate_myself": ("POST", "/api/agents/me/deactivate", mine),
            "delete_myself": ("DELETE", "/api/agents/me", mine),
            "token": ("POST", "/oauth/token", {"json": self._secret()}),
            "refresh": ("POST", "/oauth/refresh", {"json": {"refresh_token": refresh_token}}),
            "revoke": ("POST", "/oauth/revoke", {**theirs, "json": {"token": refresh_token}}),
        }
        return requests_[operation]

    def fire(self, operation: str, me: str, delay: float) -> tuple[int, Any]:
        """One of the two: connected first, so that both leave at the same moment."""
        method, path, options = self._request(operation)
        with requests.Session() as session:
            session.get(f"{self.url}/health")
            self.together.wait(20)
            time.sleep(delay)
            response = session.request(method, self.url + path, **options)
        answer = response.json() if response.content else {}
        if "client_secret" in answer:
            self.hints[answer["client_secret"][3:11]] = me
        if "refresh_token" in answer:
            self.grants[me] = answer
            return response.status_code, tuple(answer["scope"].split())
        return response.status_code, None

    def seen(self) -> dict[str, Any]:
        """What a Model's `seen` tells, asked of the server."""
        with requests.Session() as session:
            session.headers.update(OPERATOR)
            seen = self._row(session)
            for name, grant in self.grants.items():
                for kind in ("access", "refresh"):
                    body = {"token": grant[f"{kind}_token"]}
                    answer = session.post(f"{self.url}/oauth/introspect", json=body).json()
                    seen[f"{kind} {name}"] = tuple(answer["scope"].split()) if answer["active"] else None
        return seen

    def _row(self, session: requests.Session) -> dict[str, Any]:
        response = session.get(self.url + self.path)
        if response.status_code == 404:
            return {"row": None, "secrets": set()}
        row = response.json()["agent"]
        secrets = session.get(f"{self.url}{self.path}/secrets").json()["secrets"]
        names = ("is_active", "name", "scopes", "token_count", "refresh_count")
        return {
            "row": tuple(tuple(row[name]) if name == "scopes" else row[name] for name in names),
            "secrets": {self.hints[secret["hint"]] for secret in secrets},
        }


def allowed(first: str, second: str) -> list[dict[str, Any]]:
    """What each of the two orders leaves: both answers, and all that is to be seen afterwards."""
    outcomes = []
    pair = (("one", first), ("two", second))
    for order in (pair, pair[::-1]):
        model = Model()
        answers = {me: getattr(model, operation)(me) for me, operation in order}
        outcomes.append({**answers, **model.seen()})
    return outcomes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the file: two workers, and agents of their own for every trial."""
    started = Server(tmp_path_factory.mktemp("races"), ADMIN_TOKEN=ADMIN_TOKEN).wait()
    yield started
    assert "Traceback" not in started.stop()


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as two:
        yield two


PAIRS = list(itertools.combinations_with_replacement(OPERATIONS, 2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[" and ".join(pair) for pair in PAIRS])
def test_two_concurrent_changes_end_like_one_after_the_other(
    server: Server, pool: ThreadPoolExecutor, first: str, second: str
) -> None:
    for delay in DELAYS:
        trial = Trial(server)
        one = pool.submit(trial.fire, first, "one", delay)
        two = pool.submit(trial.fire, second, "two", 0)
        outcome = {"one": one.result(), "two": two.result(), **trial.seen()}
        assert outcome in allowed(first, second)


def test_a_secret_that_ends_while_it_is_checked_gets_no_token(app: Flask, operator: Operator) -> None:
    agent = operator.create()
    secret_id = operator.call("GET", f"/{agent['agent']['id']}/secrets").json["secrets"][0]["id"]
    with ThreadPoolExecutor(1) as pool:
        with credentials._bcrypt_lock:
            asked = pool.submit(ask_token, app.test_client(), agent)
            time.sleep(0.3)
            assert not asked.done()
            assert operator.call("DELETE", f"/{agent['agent']['id']}/secrets/{secret_id}").status_code == 204
        refused(asked.result(10), 401, "invalid_client")
