"""Whatever happens to agents, secrets and tokens, in whatever order: two workers agree with the model of it.

`HYPOTHESIS_PROFILE=long .venv/bin/pytest tests/test_properties.py -n 0 --no-cov` looks for more.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
from conftest import OPERATOR
from expected import ACCESS_TTL, FAMILY_TTL, ISSUER, REFRESH_TTL, Agent, Family, Grant, Secret
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, multiple, precondition, rule, run_state_machine_as_test
from werkzeug.test import TestResponse
from world import World, assert_refused, hint, plain, signed

import housekeeping

SCOPES = ["read", "write", "admin"]
AUDIENCES = ["https://service.example/v1", "plain-name"]
DAY = 86_400
WAYS = ["json", "form", "basic"]

scopes = st.permutations(SCOPES) | st.lists(st.sampled_from(SCOPES), unique=True)
audiences = st.lists(st.sampled_from(AUDIENCES), unique=True)
resources = st.lists(st.sampled_from([ISSUER, *AUDIENCES]), unique=True, max_size=2)
ttls = st.none() | st.sampled_from([1, 60, 7200, DAY])
rate_limits = st.none() | st.none() | st.sampled_from([1, 2])
lifetimes = st.none() | st.sampled_from([1, 1800, DAY, 10 * DAY, 100 * DAY])
picks = st.integers(0, 20)
leaps = st.sampled_from([1, 59, 60, 600, 3599, 3600, 3601, 12 * 3600, DAY, 6 * DAY, 7 * DAY, 31 * DAY])


class Life(World):
    """What may happen."""

    agents: Bundle[Agent] = Bundle("agents")
    grants: Bundle[Grant] = Bundle("grants")

    # What an operator does.

    @initialize(target=agents)
    def first_agent(self) -> Agent:
        return self.create(scopes=SCOPES, audiences=AUDIENCES)

    @precondition(lambda self: len(self.all_agents) < 4)
    @rule(
        target=agents,
        given=st.fixed_dictionaries(
            {},
            optional={
                "scopes": scopes,
                "audiences": audiences,
                "token_ttl": ttls,
                "rate_limit": rate_limits,
                "expires_in": lifetimes,
            },
        ),
    )
    def another_agent(self, given: dict[str, Any]) -> Agent:
        return self.create(**given)

    def create(self, **given: Any) -> Agent:
        made = self.operate("POST", "/api/agents", 201, json={"name": "an agent", **given})
        seconds = given.pop("expires_in", None)
        agent = Agent(
            id=made["agent"]["id"],
            client_id=made["client_id"],
            fields={
                **dict.fromkeys(("description", "owner", "token_ttl", "rate_limit")),
                **{"name": "an agent", "scopes": [], "audiences": [], "metadata": {}, **given},
            },
            created_at=self.now,
            updated_at=self.now,
            expires_at=seconds and self.now + timedelta(seconds=seconds),
            secrets=[Secret(made["client_secret"], self.now)],
        )
        agent.tell("agent.created", "admin")
        self.all_agents.append(agent)
        assert made["agent"] == agent.shown(self.now)
        return agent

    @rule(
        agent=agents,
        changes=st.fixed_dictionaries({"scopes": scopes})
        | st.fixed_dictionaries({"audiences": audiences})
        | st.fixed_dictionaries({"token_ttl": ttls, "rate_limit": rate_limits})
        | st.fixed_dictionaries({"expires_in": lifetimes})
        | st.fixed_dictionaries({"name": st.sampled_from(["renamed", "an agent"])}),
    )
    def change(self, agent: Agent, changes: dict[str, Any]) -> None:
        path = f"/api/agents/{agent.id}"
        if agent.deleted:
            self.operate("PATCH", path, 404, json=changes)
            return
        agent.patch(changes, self.now, "admin")
        assert self.operate("PATCH", path, 200, json=changes) == {"agent": agent.shown(self.now)}

    @rule(agent=agents, options=st.sampled_from(["plain", "grace", "leak", "both"]), grace=leaps)
    def rotate(self, agent: Agent, options: str, grace: int) -> None:
        body = rotation(options, grace)
        path = f"/api/agents/{agent.id}/rotate"
        if agent.deleted:
            self.operate("POST", path, 404, json=body)
            return
        secret = self.operate("POST", path, 200, json=body)["client_secret"]
        agent.rotate(secret, self.now, by="admin", **body)

    @rule(agent=agents, pick=picks)
    def delete_secret(self, agent: Agent, pick: int) -> None:
        path = f"/api/agents/{agent.id}/secrets"
        if agent.deleted:
            self.operate("GET", path, 404)
            return
        listed = self.operate("GET", path, 200)["secrets"]
        if not listed:
            return
        gone = listed[pick % len(listed)]
        self.operate("DELETE", f"{path}/{gone['id']}", 204)
        self.operate("DELETE", f"{path}/{gone['id']}", 404)
        next(secret for secret in agent.secrets if hint(secret) == gone["hint"]).deleted = True
        agent.updated_at = self.now
        agent.tell("agent.updated", "admin")

    @rule(agent=agents)
    def deactivate(self, agent: Agent) -> None:
        path = f"/api/agents/{agent.id}/deactivate"
        if agent.deleted:
            self.operate("POST", path, 404)
            return
        agent.deactivate(self.now, "admin")
        assert self.operate("POST", path, 200) == {"agent": agent.shown(self.now)}

    @rule(agent=agents)
    def reactivate(self, agent: Agent) -> None:
        path = f"/api/agents/{agent.id}/reactivate"
        if agent.deleted or agent.is_expired(self.now):
            self.operate("POST", path, 404 if agent.deleted else 409)
            return
        agent.reactivate(self.now)
        assert self.operate("POST", path, 200) == {"agent": agent.shown(self.now)}

    @precondition(lambda self: len(self.all_agents) > 1)
    @rule(agent=agents)
    def delete(self, agent: Agent) -> None:
        self.operate("DELETE", f"/api/agents/{agent.id}", 404 if agent.deleted else 204)
        if not agent.deleted:
            agent.delete("admin")

    @rule(at_once=st.booleans())
    def rotate_keys(self, at_once: bool) -> None:
        self.operate("POST", "/api/keys/rotate", 200, json={"now": at_once})
        self.key_era += at_once

    # What an agent does for itself.

    @rule(grant=grants, options=st.sampled_from(["plain", "grace", "leak", "both"]), grace=leaps)
    def rotate_myself(self, grant: Grant, options: str, grace: int) -> None:
        body = rotation(options, grace)
        answer = self.act(grant, "POST", "/api/agents/me/rotate", 200, json=body)
        if answer:
            grant.agent.rotate(answer["client_secret"], self.now, by="self", **body)

    @rule(grant=grants)
    def deactivate_myself(self, grant: Grant) -> None:
        answer = self.act(grant, "POST", "/api/agents/me/deactivate", 200)
        if answer:
            grant.agent.deactivate(self.now, grant.agent.id)
            assert answer["agent"] == grant.agent.shown(self.now)

    @precondition(lambda self: len(self.all_agents) > 1)
    @rule(grant=grants)
    def delete_myself(self, grant: Grant) -> None:
        if self.act(grant, "DELETE", "/api/agents/me", 204) is not None:
            grant.agent.delete(grant.agent.id)

    @rule(grant=grants, agent=agents, name=st.sampled_from(["renamed by an agent", "an agent"]))
    def manage_with_a_token(self, grant: Grant, agent: Agent, name: str) -> None:
        right = self.is_good_here(grant) and "admin" in grant.held()
        status = (404 if agent.deleted else 200) if right else 403
        if self.act(grant, "PATCH", f"/api/agents/{agent.id}", status, json={"name": name}) and status == 200:
            agent.patch({"name": name}, self.now, grant.agent.id)

    # Tokens.

    @rule(
        target=grants,
        agent=agents,
        pick=picks,
        asked=st.none() | scopes,
        resource=st.just([]) | resources,
        way=st.sampled_from(WAYS),
    )
    def sign_in(self, agent: Agent, pick: int, asked: list[str] | None, resource: list[str], way: str) -> Any:
        # The newest ones first: they are more often alive.
        secret = agent.secrets[-1 - pick % len(agent.secrets)]
        body = {"grant_type": "client_credentials", **asking(asked, resource, way)}
        response = self.call("POST", "/oauth/token", **signed(agent, secret, body, way))
        refusals = set()
        if agent.deleted or not secret.is_live(self.now) or not agent.is_live(self.now):
            refusals.add((401, "invalid_client"))
        else:
            if not set(asked or []) <= set(agent.fields["scopes"]):
                refusals.add((400, "invalid_scope"))
            if not set(resource) <= {ISSUER, *agent.fields["audiences"]}:
                refusals.add((400, "invalid_target"))
        if self.refused(agent, response, refusals):
            return multiple()
        secret.last_used_at = self.now
        agent.count(agent.issued, self.now)
        agent.tell("token.issued", agent.id)
        family = Family(agent, agent.version, self.now + FAMILY_TTL, [], [])
        return self.keep(family, response, asked or agent.fields["scopes"], resource or [ISSUER])

    @rule(
        target=grants,
        grant=grants,
        asked=st.none() | scopes,
        resource=st.just([]) | resources,
        way=st.sampled_from(WAYS),
        proved=st.booleans(),
    )
    def refresh(
        self, grant: Grant, asked: list[str] | None, resource: list[str], way: str, proved: bool
    ) -> Any:
        agent, family = grant.agent, grant.family
        secret = next((secret for secret in agent.secrets if secret.is_live(self.now)), None)
        proved = proved and secret is not None
        body = {"refresh_token": grant.refresh, **asking(asked, resource, way)}
        sent = signed(agent, secret, body, way) if proved and secret else plain(body, way)
        response = self.call("POST", "/oauth/refresh", **sent)
        refusals = set()
        if proved and not agent.is_live(self.now):
            refusals.add((401, "invalid_client"))
        elif not grant.refresh_is_live(self.now):
            refusals.add((400, "invalid_grant"))
            if family.is_there(self.now) and family.newest != grant.refresh:
                family.ended = True
                agent.tell("token.reuse_detected", agent.id if proved else "anonymous")
        else:
            lost_scopes = family.scopes and not family.held_scopes()
            if lost_scopes or not set(asked or []) <= set(family.held_scopes()):
                refusals.add((400, "invalid_scope"))
            if not family.held_audiences() or not set(resource) <= set(family.held_audiences()):
                refusals.add((400, "invalid_target"))
        if self.refused(agent, response, refusals):
            return multiple()
        agent.count(agent.refreshed, self.now)
        agent.tell("token.refreshed", agent.id)
        granted = asked or family.held_scopes(), resource or family.held_audiences()
        return self.keep(family, response, *granted)

    def refused(self, agent: Agent, response: TestResponse, refusals: set[tuple[int, str]]) -> bool:
        """Whether it had to be refused; it was, for one of the reasons there are."""
        if not refusals and not agent.has_room(self.now):
            refusals.add((429, "too_many_requests"))
        if not refusals:
            assert response.status_code == 200, response.text
            return False
        assert_refused(response, *refusals.pop() if len(refusals) == 1 else (400, None))
        return True

    def keep(self, family: Family, response: TestResponse, scopes: list[str], audiences: list[str]) -> Grant:
        """Put the answer into the model, and see that it says what it should."""
        answer, agent, now = response.json, family.agent, self.now
        lives = agent.lifetime(now, timedelta(seconds=agent.fields["token_ttl"] or ACCESS_TTL))
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        family.scopes, family.audiences = list(scopes), list(audiences)
        family.newest, family.issued_at = answer["refresh_token"], now
        family.expires_at = min(now + agent.lifetime(now, REFRESH_TTL), family.ends_at)
        family.jti = claims["jti"].partition(".")[0]
        grant = Grant(
            family=family,
            access=answer["access_token"],
            refresh=answer["refresh_token"],
            scopes=list(scopes),
            audiences=list(audiences),
            issued_at=now,
            expires_at=now + lives,
            version=agent.version,
            key_era=self.key_era,
            jti=claims["jti"],
        )
        told = {name: value for name, value in claims.items() if name != "ver"}
        assert told | {"active": True, "token_type": "Bearer"} == grant.access_facts()
        assert (answer["token_type"], answer["scope"]) == ("Bearer", " ".join(scopes))
        assert answer["expires_in"] == lives.total_seconds()
        self.all_grants.append(grant)
        return grant

    @rule(grant=grants, caller=st.none() | agents, refresh=st.booleans(), way=st.sampled_from(WAYS))
    def revoke(self, grant: Grant, caller: Agent | None, refresh: bool, way: str) -> None:
        body = {"token": grant.refresh if refresh else grant.access}
        lives = grant.family.is_there(self.now) if refresh else grant.access_is_live(self.now, self.key_era)
        if caller is None:
            response = self.call("POST", "/oauth/revoke", json=body, headers=OPERATOR)
        else:
            response = self.call("POST", "/oauth/revoke", **signed(caller, caller.secrets[-1], body, way))
        if caller and not (caller.is_live(self.now) and caller.secrets[-1].is_live(self.now)):
            assert_refused(response, 401, "invalid_client")
            return
        if lives and caller not in (None, grant.agent):
            assert_refused(response, 400, "invalid_grant")
            return
        assert response.status_code == 200
        if lives:
            grant.agent.tell("token.revoked", caller.id if caller else "admin")
            grant.family.ended |= refresh
            grant.revoked |= not refresh

    # Time.

    @rule(seconds=leaps)
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds=seconds)

    @rule(pick=picks, short_by=st.sampled_from([0, 1]))
    def time_comes_to_an_edge(self, pick: int, short_by: int) -> None:
        """To the very second at which something ends, or the one before."""
        edges = {grant.expires_at for grant in self.all_grants}
        edges |= {end for grant in self.all_grants for end in (grant.family.expires_at, grant.family.ends_at)}
        edges |= {agent.expires_at for agent in self.all_agents if agent.expires_at}
        edges |= {secret.expires_at for a in self.all_agents for secret in a.secrets if secret.expires_at}
        ahead = sorted(edge for edge in edges if edge > self.now)
        if ahead:
            self.clock.moment = ahead[pick % len(ahead)] - timedelta(seconds=short_by)

    @rule()
    def rubbish_goes(self) -> None:
        with self.workers[0].app_context():
            housekeeping.sweep()


def rotation(options: str, grace: int) -> dict[str, Any]:
    """The body of a rotation."""
    with_grace = options in ("grace", "both")
    return {
        "grace_period": min(grace, DAY) if with_grace else 0,
        "revoke_tokens": options in ("leak", "both"),
    }


def asking(asked: list[str] | None, resource: list[str], way: str) -> dict[str, Any]:
    """`scope` and `resource`, when they are asked for."""
    wanted: dict[str, Any] = {} if asked is None else {"scope": " ".join(asked)}
    return {**wanted, "resource": resource} if resource else wanted


def test_whatever_happens_two_workers_agree_with_the_model(quick_start: Path) -> None:
    run_state_machine_as_test(lambda: Life(quick_start))
