"""What a server has acknowledged, kept by those it was said to, and whether it is still so."""

from __future__ import annotations

import base64
import json
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from server import ADMIN_TOKEN, Server

OPERATOR = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
PATIENCE = 40  # seconds for an answer
SLOW = 1  # seconds
REFUSED, CUT, HALF, HUNG = "refused", "cut", "half", "hung"
REMEMBERED = 4  # of what is dead, the newest that many are tried again


class Tally:
    """Answers by status, and whatever no answer may be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answers: Counter[str] = Counter()
        self.violations: list[str] = []
        self.slow: list[tuple[str, float]] = []  # answers that took longer than SLOW

    def count(self, what: str) -> None:
        """Count an answer, or how there was none."""
        with self._lock:
            self.answers[what] += 1

    def time(self, what: str, seconds: float) -> None:
        """Keep what took long."""
        if seconds > SLOW:
            with self._lock:
                self.slow.append((what, seconds))

    def violation(self, text: str) -> None:
        """Something that must never be."""
        with self._lock:
            self.violations.append(text)


class Caller:
    """Sends requests from an address of its own, and looks at every answer."""

    def __init__(self, server: Server, tally: Tally) -> None:
        self.server = server
        self.tally = tally
        self.session = requests.Session()
        # Failed sign-ins are throttled by address: nobody else's failures shall count against this one.
        self.session.mount("http://", _From(_address()))

    def call(self, method: str, path: str, **kwargs: Any) -> tuple[str, Any]:
        """The status and the JSON of an answer, or how there was none."""
        try:
            response = self.session.request(method, self.server.url + path, timeout=PATIENCE, **kwargs)
            answer = response.json() if response.content else None
        except (requests.RequestException, ValueError) as error:
            return self._none(method, path, error)
        status = str(response.status_code)
        self.tally.count(status)
        self.tally.time(f"{method} {path}", response.elapsed.total_seconds())
        if response.status_code >= 400:
            self._look_at_error(f"{method} {path}", response, answer)
        return status, answer

    def _none(self, method: str, path: str, error: Exception) -> tuple[str, None]:
        how = _how(error)
        self.tally.count(how)
        if how == HUNG:
            self.tally.violation(f"no answer to {method} {path} in {PATIENCE} seconds")
        return how, None

    def _look_at_error(self, what: str, response: requests.Response, answer: Any) -> None:
        code = response.status_code
        if not isinstance(answer, dict) or not {"error", "error_description"} <= set(answer):
            self.tally.violation(f"{code} for {what} in another shape: {response.text[:100]}")
        elif code == 503 and not response.headers.get("Retry-After", "").isdigit():
            self.tally.violation(f"503 for {what} without Retry-After")
        elif code >= 500 and code != 503:
            self.tally.violation(f"{code} for {what}")


class _From(HTTPAdapter):
    """Connects from one address of this machine's many."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> Any:
        return super().init_poolmanager(*args, **kwargs, source_address=(self._address, 0))


def _address() -> str:
    return f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def _how(error: Exception) -> str:
    """Why there is no answer: nobody listened, it was cut off before or within the answer, or never came."""
    if isinstance(error, requests.ReadTimeout):
        return HUNG
    if isinstance(error, requests.exceptions.ChunkedEncodingError | ValueError):
        return HALF
    refused = isinstance(error, requests.ConnectTimeout) or "NewConnectionError" in repr(error)
    return REFUSED if refused else CUT


@dataclass
class Agent:
    """An agent as the server said it is."""

    id: str
    client_id: str
    secret: str
    is_active: bool = True
    is_deleted: bool = False
    access: str | None = None
    refresh: str | None = None
    tokens: int = 0
    refreshes: int = 0
    dead_secrets: list[str] = field(default_factory=list)
    dead_tokens: list[str] = field(default_factory=list)
    # The change that was sent and never answered, after which nothing more is done to the agent.
    doubt: str | None = None

    @property
    def path(self) -> str:
        """Its address."""
        return f"/api/agents/{self.id}"

    def end_tokens(self) -> None:
        """Whatever tokens it had are dead from now on."""
        self.dead_tokens += [token for token in (self.access, self.refresh) if token]
        del self.dead_tokens[:-REMEMBERED]
        self.access = self.refresh = None


class Ledger:
    """Every agent there ever was, and how many changes were acknowledged."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.agents: list[Agent] = []
        self.acknowledged = 0
        self._lock = threading.Lock()

    def acknowledge(self, new: Agent | None = None) -> None:
        """Note that a change was answered with success."""
        with self._lock:
            self.acknowledged += 1
            if new:
                self.agents.append(new)


class Change:
    """The changes that a client asks for; each is noted in the ledger when it is acknowledged."""

    def __init__(self, ledger: Ledger, caller: Caller) -> None:
        self.ledger = ledger
        self.caller = caller
        self.status: str | None = None  # of the last answer

    def create(self) -> Agent | None:
        """Register an agent; None when that was not acknowledged."""
        body = {"name": "soaked", "scopes": ["read", "write"]}
        answer = self._ask("POST", "/api/agents", "201", json=body, headers=OPERATOR)
        if not answer:
            return None
        agent = Agent(answer["agent"]["id"], answer["client_id"], answer["client_secret"])
        self.ledger.acknowledge(agent)
        return agent

    def token(self, agent: Agent) -> None:
        """A new grant."""
        answer = self._change(agent, "token", "POST", "/oauth/token", "200", json=secret_body(agent))
        if answer:
            agent.tokens += 1
            agent.access, agent.refresh = answer["access_token"], answer["refresh_token"]

    def refresh(self, agent: Agent) -> None:
        """The next of its newest family."""
        self.status = None
        if agent.refresh is None:
            return
        body = {"refresh_token": agent.refresh}
        answer = self._change(agent, "refresh", "POST", "/oauth/refresh", "200", json=body)
        if answer:
            agent.refreshes += 1
            agent.dead_tokens = [*agent.dead_tokens, agent.refresh][-REMEMBERED:]
            agent.access, agent.refresh = answer["access_token"], answer["refresh_token"]

    def rotate(self, agent: Agent, *, revoke_tokens: bool = False) -> None:
        """A new secret."""
        body = {"revoke_tokens": revoke_tokens}
        path = f"{agent.path}/rotate"
        answer = self._change(agent, "rotate", "POST", path, "200", json=body, headers=OPERATOR)
        if answer:
            agent.dead_secrets = [*agent.dead_secrets, agent.secret][-REMEMBERED:]
            agent.secret = answer["client_secret"]

    def deactivate(self, agent: Agent) -> None:
        """Off."""
        if self._change(agent, "deactivate", "POST", f"{agent.path}/deactivate", "200", headers=OPERATOR):
            agent.is_active = False
            agent.end_tokens()

    def reactivate(self, agent: Agent) -> None:
        """On again."""
        if self._change(agent, "reactivate", "POST", f"{agent.path}/reactivate", "200", headers=OPERATOR):
            agent.is_active = True

    def delete(self, agent: Agent) -> None:
        """Gone."""
        if self._change(agent, "delete", "DELETE", agent.path, "204", headers=OPERATOR):
            agent.is_deleted = True
            agent.end_tokens()

    def read(self) -> None:
        """What changes nothing."""
        self._ask("GET", "/api/agents?limit=5", "200", headers=OPERATOR)
        self._ask("GET", "/health", "200")
        self._ask("GET", "/.well-known/jwks.json", "200")

    def _change(self, agent: Agent, kind: str, method: str, path: str, expected: str, **kwargs: Any) -> Any:
        answer = self._ask(method, path, expected, agent, kind, **kwargs)
        if answer:
            self.ledger.acknowledge()
        return answer

    def _ask(
        self,
        method: str,
        path: str,
        expected: str,
        agent: Agent | None = None,
        kind: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """What was answered, True for an empty answer, None when it was not the expected one."""
        status, answer = self.caller.call(method, path, **kwargs)
        self.status = status
        if status == expected:
            return answer or True
        if status in (CUT, HALF, HUNG):
            if agent:
                agent.doubt = kind
        elif status not in (REFUSED, "503"):
            self.caller.tally.violation(f"{status} for {method} {path}: {answer}")
        return None


def secret_body(agent: Agent, secret: str | None = None) -> dict[str, str]:
    """A token request with the agent's secret, or another."""
    return {
        "grant_type": "client_credentials",
        "client_id": agent.client_id,
        "client_secret": secret or agent.secret,
    }


class Audit:
    """Asks the server about agents, and tells what is not as it was acknowledged."""

    def __init__(self, ledger: Ledger, tally: Tally) -> None:
        self.ledger = ledger
        self.server = ledger.server
        self.tally = tally
        self.lost = 0

    def check(self, agent: Agent) -> None:
        """Everything about one agent."""
        self.change = Change(self.ledger, Caller(self.server, self.tally))
        try:
            self._check_row(agent)
        finally:
            self.change.caller.session.close()

    def _check_row(self, agent: Agent) -> None:
        status, answer = self._call("GET", agent.path)
        allowed = {"404"} if agent.is_deleted else {"200", "404"} if agent.doubt == "delete" else {"200"}
        if not self._expect(agent, "its row", status, allowed) or status == "404":
            self._check_dead(agent)
            return
        row = answer["agent"]
        self._check_counters(agent, row)
        in_doubt = agent.doubt in ("deactivate", "reactivate")
        self._expect(agent, "is_active", row["is_active"], {True, False} if in_doubt else {agent.is_active})
        if in_doubt and not row["is_active"]:
            agent.is_active = False
            agent.end_tokens()
        agent.is_active = row["is_active"]
        self._check_secrets(agent)
        self._check_tokens(agent)

    def _check_dead(self, agent: Agent) -> None:
        agent.is_deleted = True
        agent.end_tokens()
        self._expect(agent, "a secret of a dead agent", self._try(agent, agent.secret), {"401"})
        self._check_tokens(agent)

    def _check_counters(self, agent: Agent, row: dict[str, Any]) -> None:
        for name, kind, known in (
            ("token_count", "token", agent.tokens),
            ("refresh_count", "refresh", agent.refreshes),
        ):
            self._expect(agent, name, row[name], {known, known + (agent.doubt == kind)})

    def _check_secrets(self, agent: Agent) -> None:
        _, answer = self._call("GET", f"{agent.path}/secrets")
        hints = [secret["hint"] for secret in answer["secrets"]]
        is_mine = hints == [agent.secret[3:11]]
        self._expect(agent, "its secret is the one live", is_mine, {True, agent.doubt != "rotate"})
        for secret in agent.dead_secrets[-2:] if is_mine else [agent.secret, *agent.dead_secrets[-2:]]:
            self._expect(agent, "a rotated secret", self._try(agent, secret), {"401"})
        if not agent.is_active:
            self._expect(agent, "the secret of one deactivated", self._try(agent, agent.secret), {"401"})

    def _check_tokens(self, agent: Agent) -> None:
        if agent.refresh and agent.doubt != "refresh":
            self._expect(agent, "its refresh token", self._is_active(agent.refresh), {True})
        if agent.access and abs(left := _expiry(agent.access) - self.server.now()) > 5:
            self._expect(agent, "its access token", self._is_active(agent.access), {left > 0})
        for token in agent.dead_tokens:
            self._expect(agent, "a token that ended", self._is_active(token), {False})

    def _try(self, agent: Agent, secret: str) -> str:
        status, _ = self.change.caller.call("POST", "/oauth/token", json=secret_body(agent, secret))
        return status

    def _is_active(self, token: str) -> Any:
        status, answer = self._call("POST", "/oauth/introspect", json={"token": token})
        return answer["active"] if status == "200" else status

    def _call(self, method: str, path: str, **kwargs: Any) -> tuple[str, Any]:
        return self.change.caller.call(method, path, headers=OPERATOR, **kwargs)

    def _expect(self, agent: Agent, what: str, found: Any, allowed: set[Any]) -> bool:
        if found in allowed:
            return True
        self.lost += 1
        doubt = f" (in doubt: {agent.doubt})" if agent.doubt else ""
        self.tally.violation(f"agent {agent.id}{doubt}: {what} is {found!r}, not {allowed}")
        return False


def _expiry(token: str) -> float:
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return float(claims["exp"])
