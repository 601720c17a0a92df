"""Whatever happens to agents, secrets and tokens, in whatever order: two workers agree with the model of it.

`HYPOTHESIS_PROFILE=long .venv/bin/pytest tests/test_properties.py -n 0` looks for more.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from support.callers import OPERATOR
from support.expected import ACCESS_TTL, FAMILY_TTL, ISSUER, REFRESH_TTL, Agent, Family, Grant, Secret
from support.world import World, asking, assert_refused, hint, plain, signed
from werkzeug.test import TestResponse

from ops import cleanup

SCOPES = ["read", "write", "admin"]
AUDIENCES = ["https://service.example/v1", "plain-name"]
DAY = 86_400
WAYS = ["json", "form", "basic"]

scopes = st.permutations(SCOPES) | st.lists(st.sampled_from(SCOPES), unique=True)
audiences = st.lists(st.sampled_from(AUDIENCES), unique=True)
asked_scopes = st.none() | scopes
asked_resources = (
    st.just([]) | st.just([]) | st.lists(st.sampled_from([ISSUER, *AUDIENCES]), unique=True, max_size=2)
)
ttls = st.none() | st.sampled_from([1, 60, 7200, DAY])
rate_limits = st.none() | st.none() | st.sampled_from([1, 2])
lifetimes = st.none() | st.sampled_from([1800, 7200, DAY, 10 * DAY])
# Most leave something alive.
leaps = st.sampled_from([1, 5, 30, 60, 61, 600, 1800, 3600, 12 * 3600, 6 * DAY])
ways = st.sampled_from(["json", "form", "basic"])
rotations = st.builds(
    lambda grace_period, revoke_tokens: {"grace_period": grace_period, "revoke_tokens": revoke_tokens},
    st.sampled_from([0, 60, 1800, DAY]),
    st.sampled_from([False, False, True]),
)
# Which one: the first are those that are alive, newest first.
picks = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5, 8])


class Life(World):
    """What may happen."""

    def agent(self, who: int, *, alive: bool = True) -> Agent:
        ordered = sorted(reversed(self.all_agents), key=lambda agent: agent.is_live(self.now) != alive)
        return ordered[who % len(ordered)]

    def grant(self, which: int) -> Grant:
        self.someone_signs_in()
        ordered = sorted(reversed(self.all_grants), key=lambda grant: not self.is_good_here(grant))
        return ordered[which % len(ordered)]

    def someone_signs_in(self) -> None:
        """When all tokens are dead, bring the newest agent back: there is not much to see in a dead world."""
        if any(grant.refresh_is_live(self.now) and self.is_good_here(grant) for grant in self.all_grants):
            return
        agent = next((agent for agent in reversed(self.all_agents) if not agent.deleted), None)
        if agent is None:
            self.create(scopes=SCOPES, audiences=AUDIENCES)
        else:
            self.patch_agent(agent, expires_in=None, rate_limit=None, scopes=SCOPES, audiences=AUDIENCES)
            self.reactivate_agent(agent)
            self.rotate_secret(agent, {"grace_period": 60, "revoke_tokens": False})
        agent = agent or self.all_agents[-1]
        self.ask(agent, agent.secrets[-1], None, [], "json")

    # What an operator does.

    @initialize()
    def it_begins(self) -> None:
        self.someone_signs_in()

    @precondition(lambda self: len(self.all_agents) < 4)
    @rule(
        given=st.fixed_dictionaries(
            {"scopes": st.just(SCOPES) | scopes, "audiences": st.just(AUDIENCES) | audiences},
            optional={"token_ttl": ttls, "rate_limit": rate_limits, "expires_in": lifetimes},
        ),
    )
    def another_agent(self, given: dict[str, Any]) -> None:
        self.create(**given)

    def create(self, **given: Any) -> None:
        made = self.operate("POST", "/api/agents", 201, json={"name": "an agent", **given})
        seconds = given.pop("expires_in", None)
        agent = Agent(
            id=made["agent"]["id"],
            client_id=made["client_id"],
            fields={
                **dict.fromkeys(("description", "owner", "token_ttl", "rate_limit")),
                **{"name": "an agent", "scopes": [], "audiences": [], "metadata": {}, **given},
                "require_client_auth_for_refresh": False,
            },
            created_at=self.now,
            updated_at=self.now,
            expires_at=seconds and self.now + timedelta(seconds=seconds),
            secrets=[Secret(made["client_secret"], self.now)],
        )
        agent.tell("agent.created", "admin")
        self.all_agents.append(agent)
        assert made["agent"] == agent.shown(self.now)

    @rule(who=picks, given=st.fixed_dictionaries({"scopes": scopes}, optional={"audiences": audiences}))
    def give_and_take(self, who: int, given: dict[str, Any]) -> None:
        self.someone_signs_in()
        self.patch_agent(self.agent(who), **given)

    @rule(who=picks, lifetime=lifetimes, ttl=ttls, rate_limit=rate_limits)
    def limit(self, who: int, lifetime: int | None, ttl: int | None, rate_limit: int | None) -> None:
        agent = self.agent(who)
        self.patch_agent(agent, expires_in=lifetime, token_ttl=ttl, rate_limit=rate_limit)
        for _ in range(2):
            self.ask(agent, agent.secrets[-1], None, [], "form")

    @rule(who=picks, name=st.sampled_from(["renamed", "an agent"]))
    def rename(self, who: int, name: str) -> None:
        self.patch_agent(self.agent(who), name=name)

    def patch_agent(self, agent: Agent, **changes: Any) -> None:
        path = f"/api/agents/{agent.id}"
        if agent.deleted:
            self.operate("PATCH", path, 404, json=changes)
            return
        agent.patch(changes, self.now, "admin")
        assert self.operate("PATCH", path, 200, json=changes) == {"agent": agent.shown(self.now)}

    @rule(who=picks, body=rotations)
    def rotate(self, who: int, body: dict[str, Any]) -> None:
        self.rotate_secret(self.agent(who), body)

    def rotate_secret(self, agent: Agent, body: dict[str, Any]) -> None:
        path = f"/api/agents/{agent.id}/rotate"
        if agent.deleted:
            self.operate("POST", path, 404, json=body)
            return
        secret = self.operate("POST", path, 200, json=body)["client_secret"]
        agent.rotate(secret, self.now, by="admin", **body)

    @rule(who=picks, which=picks)
    def delete_secret(self, who: int, which: int) -> None:
        agent = self.agent(who)
        path = f"/api/agents/{agent.id}/secrets"
        if agent.deleted:
            self.operate("GET", path, 404)
            return
        listed = self.operate("GET", path, 200)["secrets"]
        if not listed:
            return
        gone = listed[-1 - which % len(listed)]
        for status in (204, 404):
            self.operate("DELETE", f"{path}/{gone['id']}", status)
        secret = next(secret for secret in agent.secrets if hint(secret) == gone["hint"])
        secret.deleted = True
        for grant in self.all_grants:
            grant.family.secret_deleted |= grant.family.secret is secret
        agent.updated_at = self.now
        agent.tell("agent.updated", "admin")

    @rule(who=picks)
    def deactivate(self, who: int) -> None:
        agent = self.agent(who)
        path = f"/api/agents/{agent.id}/deactivate"
        if agent.deleted:
            self.operate("POST", path, 404)
            return
        agent.deactivate(self.now, "admin")
        assert self.operate("POST", path, 200) == {"agent": agent.shown(self.now)}

    @rule(who=picks)
    def reactivate(self, who: int) -> None:
        self.reactivate_agent(self.agent(who, alive=False))

    def reactivate_agent(self, agent: Agent) -> None:
        path = f"/api/agents/{agent.id}/reactivate"
        if agent.deleted or agent.is_expired(self.now):
            self.operate("POST", path, 404 if agent.deleted else 409)
            return
        agent.reactivate(self.now)
        assert self.operate("POST", path, 200) == {"agent": agent.shown(self.now)}

    @precondition(lambda self: len(self.all_agents) > 1)
    @rule(who=picks)
    def delete(self, who: int) -> None:
        agent = self.agent(who)
        self.operate("DELETE", f"/api/agents/{agent.id}", 404 if agent.deleted else 204)
        if not agent.deleted:
            agent.delete("admin")

    @rule(at_once=st.booleans())
    def rotate_keys(self, at_once: bool) -> None:
        self.operate("POST", "/api/keys/rotate", 200, json={"now": at_once})
        self.key_era += at_once

    # What an agent does for itself.

    @rule(which=picks, body=rotations)
    def rotate_myself(self, which: int, body: dict[str, Any]) -> None:
        grant = self.grant(which)
        status = 200 if grant.agent.may_rotate(self.now) else 429
        answer = self.act(grant, "POST", "/api/agents/me/rotate", status, json=body)
        if answer and status == 200:
            grant.agent.rotate(answer["client_secret"], self.now, by="self", **body)

    @rule(which=picks)
    def deactivate_myself(self, which: int) -> None:
        grant = self.grant(which)
        answer = self.act(grant, "POST", "/api/agents/me/deactivate", 200)
        if answer:
            grant.agent.deactivate(self.now, grant.agent.id)
            assert answer["agent"] == grant.agent.shown(self.now)

    @precondition(lambda self: len(self.all_agents) > 1)
    @rule(which=picks)
    def delete_myself(self, which: int) -> None:
        grant = self.grant(which)
        if self.act(grant, "DELETE", "/api/agents/me", 204) is not None:
            grant.agent.delete(grant.agent.id)

    @rule(which=picks, who=picks, name=st.sampled_from(["renamed by an agent", "an agent"]))
    def manage_with_a_token(self, which: int, who: int, name: str) -> None:
        grant, agent = self.grant(which), self.agent(who)
        right = self.is_good_here(grant) and "admin" in grant.held()
        status = (404 if agent.deleted else 200) if right else 403
        if self.act(grant, "PATCH", f"/api/agents/{agent.id}", status, json={"name": name}) and status == 200:
            agent.patch({"name": name}, self.now, grant.agent.id)

    # Tokens.

    @rule(who=picks, which=picks, asked=asked_scopes, resource=asked_resources, way=ways)
    def sign_in(self, who: int, which: int, asked: list[str] | None, resource: list[str], way: str) -> None:
        agent = self.agent(who)
        self.ask(agent, agent.secrets[-1 - which % len(agent.secrets)], asked, resource, way)

    def ask(
        self, agent: Agent, secret: Secret, asked: list[str] | None, resource: list[str], way: str
    ) -> None:
        body = {"grant_type": "client_credentials", **asking(asked, resource)}
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
            return
        secret.last_used_at = self.now
        agent.count(agent.issued, self.now)
        agent.tell("token.issued", agent.id)
        family = Family(agent, agent.version, self.now + FAMILY_TTL, [], [], secret=secret)
        self.keep(family, response, asked or agent.fields["scopes"], resource or [ISSUER])

    @rule(which=picks, asked=asked_scopes, resource=asked_resources, way=ways, proved=st.booleans())
    def refresh(
        self, which: int, asked: list[str] | None, resource: list[str], way: str, proved: bool
    ) -> None:
        self.someone_signs_in()
        ordered = sorted(reversed(self.all_grants), key=lambda grant: not grant.refresh_is_live(self.now))
        self.use(ordered[which % len(ordered)], asked, resource, way, proved)

    @rule(which=picks, way=ways, proved=st.booleans())
    def use_again(self, which: int, way: str, proved: bool) -> None:
        used = [grant for grant in reversed(self.all_grants) if grant.refresh != grant.family.newest]
        ordered = sorted(used, key=lambda grant: not grant.family.is_there(self.now))
        if ordered:
            self.use(ordered[which % len(ordered)], None, [], way, proved)

    @rule(which=picks)
    def refresh_for_a_month(self, which: int) -> None:
        family = self.grant(which).family
        for _ in range(6):
            newest = next(grant for grant in self.all_grants if grant.refresh == family.newest)
            self.clock.advance(seconds=6 * DAY)
            self.use(newest, None, [], "json", False)
            if newest.refresh == family.newest:
                return

    def use(self, grant: Grant, asked: list[str] | None, resource: list[str], way: str, proved: bool) -> None:
        agent, family = grant.agent, grant.family
        secret = next((secret for secret in agent.secrets if secret.is_live(self.now)), None)
        proved = proved and secret is not None
        body = {"refresh_token": grant.refresh, **asking(asked, resource)}
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
            return
        agent.count(agent.refreshed, self.now)
        agent.tell("token.refreshed", agent.id)
        granted = asked or family.held_scopes(), resource or family.held_audiences()
        self.keep(family, response, *granted)

    def refused(self, agent: Agent, response: TestResponse, refusals: set[tuple[int, str]]) -> bool:
        """Whether it had to be refused; it was, for one of the reasons there are."""
        if not refusals and not agent.has_room(self.now):
            refusals.add((429, "too_many_requests"))
        if not refusals:
            assert response.status_code == 200, response.text
            return False
        assert_refused(response, *refusals.pop() if len(refusals) == 1 else (400, None))
        return True

    def keep(self, family: Family, response: TestResponse, scopes: list[str], audiences: list[str]) -> None:
        """Put the answer into the model, and see that it says what it should."""
        answer, agent, now = response.json, family.agent, self.now
        lives = agent.lifetime(now, timedelta(seconds=agent.fields["token_ttl"] or ACCESS_TTL))
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        if not family.newest:  # a refresh may narrow its access token, never the grant
            family.scopes, family.audiences = scopes, audiences
        family.newest, family.issued_at = answer["refresh_token"], now
        family.expires_at = min(now + agent.lifetime(now, REFRESH_TTL), family.ends_at)
        family.jti = claims["jti"].partition(".")[0]
        grant = Grant(
            family=family,
            access=answer["access_token"],
            refresh=answer["refresh_token"],
            scopes=scopes,
            audiences=audiences,
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

    @rule(which=picks, by=st.sampled_from(["operator", "owner", "other"]), refresh=st.booleans(), way=ways)
    def revoke(self, which: int, by: str, refresh: bool, way: str) -> None:
        grant = self.grant(which)
        others = [agent for agent in reversed(self.all_agents) if agent is not grant.agent]
        caller = {"operator": None, "owner": grant.agent, "other": (others or [None])[0]}[by]
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

    @rule(seconds=leaps, swept=st.booleans())
    def time_passes(self, seconds: int, swept: bool) -> None:
        self.clock.advance(seconds=seconds)
        if swept:
            self.sweep()

    @rule(which=picks, short_by=st.sampled_from([0, 1]))
    def time_comes_to_an_edge(self, which: int, short_by: int) -> None:
        """To the very second at which something ends, or the one before."""
        edges = {grant.expires_at for grant in self.all_grants}
        edges |= {end for grant in self.all_grants for end in (grant.family.expires_at, grant.family.ends_at)}
        edges |= {agent.expires_at for agent in self.all_agents if agent.expires_at}
        edges |= {secret.expires_at for a in self.all_agents for secret in a.secrets if secret.expires_at}
        ahead = sorted(edge for edge in edges if edge > self.now)
        if ahead:
            self.clock.moment = ahead[which % len(ahead)] - timedelta(seconds=short_by)

    @rule(who=picks, swept=st.booleans())
    def expire_and_come_back(self, who: int, swept: bool) -> None:
        agent = self.agent(who)
        self.patch_agent(agent, expires_in=1)
        self.clock.advance(seconds=1)
        if swept:
            self.sweep()
        self.all_is_as_it_should_be()
        self.patch_agent(agent, expires_in=None)

    def sweep(self) -> None:
        with self.workers[0].app_context():
            cleanup.delete_batch()


def test_two_workers_agree_with_the_model(first_start: Path) -> None:
    run_state_machine_as_test(lambda: Life(first_start))
