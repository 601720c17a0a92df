"""Every way to end an agent's access, over HTTP and by ./lanyard, and whether it ended."""

from __future__ import annotations

from ledger import OPERATOR, Agent, Change

COMMANDS = {
    "deactivate by ./lanyard": ("agents", "deactivate"),
    "delete by ./lanyard": ("agents", "delete", "--yes"),
    "rotate by ./lanyard": ("agents", "rotate", "--revoke-tokens"),
}
OVER_HTTP = ("deactivate", "delete", "rotate", "revoke", "revoke the refresh token")
KEY_ROTATIONS = ("rotate the key", "rotate the key by ./lanyard")


class Ending:
    """Ends agents' access; a way that does not work, or works only in part, is a violation."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._server = change.caller.server
        self._tally = change.caller.tally

    def new_agent(self) -> Agent:
        """An agent with a token."""
        agent = self._change.create()
        if not agent:
            raise RuntimeError("no agent could be created")
        self._change.token(agent)
        return agent

    def end(self, way: str, agent: Agent) -> None:
        """End the agent's access, which has to work the first time and at once."""
        token = agent.access
        if not self._ask(way, agent):
            self._tally.violation(f"{way} failed")
        elif token and self._is_active(token):
            self._tally.violation(f"{way} left the token valid")
        if way == "revoke":  # its refresh token lives on
            agent.dead_tokens.append(str(token))
            agent.access = None
        else:
            agent.end_tokens()

    def rotate_key(self, way: str) -> None:
        """End all access tokens; refresh tokens get new ones."""
        if way == "rotate the key":
            rotated = self._post("/api/keys/rotate", {"now": True})
        else:
            rotated = self._run("keys", "rotate", "--now") is not None
        if not rotated:
            self._tally.violation(f"{way} failed")
        for agent in self._change.ledger.agents:
            agent.dead_tokens += [agent.access] if agent.access else []
            agent.access = None

    def must_be_refused(self, agent: Agent) -> None:
        """No token is issued, and the server says that it is not ready."""
        self._change.token(agent)
        if self._change.status != "503":
            self._tally.violation(f"a token was answered {self._change.status} on a full disk")
        status, _ = self._change.caller.call("GET", "/health/ready")
        if status != "503":
            self._tally.violation(f"/health/ready was {status} on a full disk")

    def _ask(self, way: str, agent: Agent) -> bool:
        if way in COMMANDS:
            return self._ask_by_command(way, agent)
        if way.startswith("revoke"):
            return self._post("/oauth/revoke", {"token": agent.access if way == "revoke" else agent.refresh})
        if way == "rotate":
            self._change.rotate(agent, revoke_tokens=True)
        else:
            getattr(self._change, way)(agent)
        return self._change.status in ("200", "204")

    def _ask_by_command(self, way: str, agent: Agent) -> bool:
        group, command, *options = COMMANDS[way]
        told = self._run(group, command, agent.client_id, *options)
        if told is None:
            return False
        if command == "rotate":
            agent.dead_secrets.append(agent.secret)
            agent.secret = told.strip()
        agent.is_active = agent.is_active and command != "deactivate"
        agent.is_deleted = command == "delete"
        return True

    def _run(self, *arguments: str) -> str | None:
        ran = self._server.command(*arguments)
        if ran.returncode:
            self._tally.violation(f"lanyard {' '.join(arguments)}: {ran.stderr}")
        return None if ran.returncode else ran.stdout

    def _post(self, path: str, body: object) -> bool:
        status, _ = self._change.caller.call("POST", path, json=body, headers=OPERATOR)
        return status == "200"

    def _is_active(self, token: str) -> bool:
        _, answer = self._change.caller.call(
            "POST", "/oauth/introspect", json={"token": token}, headers=OPERATOR
        )
        return bool(answer["active"])
