"""What ought to be: agents, their secrets and tokens, and how they die, as plain Python without a server."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

ISSUER = "http://localhost:8080"
ACCESS_TTL = 3600  # seconds, unless the agent's token_ttl says otherwise
REFRESH_TTL = timedelta(days=7)
FAMILY_TTL = timedelta(days=30)
MINUTE = timedelta(minutes=1)


def written(moment: datetime | None) -> str | None:
    """A moment as every answer writes it."""
    return moment and moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(eq=False)
class Secret:
    """A client secret; `deleted` once it is taken away for good."""

    text: str
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    deleted: bool = False

    def is_live(self, now: datetime) -> bool:
        return not self.deleted and (self.expires_at is None or self.expires_at > now)


@dataclass(eq=False)
class Agent:
    """An agent with all that happened to it."""

    id: str
    client_id: str
    fields: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    is_active: bool = True
    deleted: bool = False
    version: int = 1  # goes up when all tokens die
    secrets: list[Secret] = field(default_factory=list)
    rotations: list[dict[str, Any]] = field(default_factory=list)
    issued: Counter[str] = field(default_factory=Counter)  # tokens by day
    refreshed: Counter[str] = field(default_factory=Counter)
    last_activity_at: datetime | None = None
    last_token_issued_at: datetime | None = None
    counted: list[datetime] = field(default_factory=list)  # what counts against its rate limit
    own_rotations: list[datetime] = field(default_factory=list)
    events: list[tuple[str, str, str]] = field(default_factory=list)  # type, actor, the agent's name then

    def is_live(self, now: datetime) -> bool:
        return self.is_active and not self.is_expired(now) and not self.deleted

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def has_room(self, now: datetime) -> bool:
        """Whether `rate_limit` leaves a token or a rotation."""
        limit = self.fields["rate_limit"]
        return limit is None or sum(moment >= now - MINUTE for moment in self.counted) < limit

    def may_rotate(self, now: datetime) -> bool:
        return self.has_room(now) and sum(moment > now - MINUTE for moment in self.own_rotations) < 6

    def tell(self, event: str, actor: str) -> None:
        self.events.append((event, actor, self.fields["name"]))

    def count(self, days: Counter[str], now: datetime) -> None:
        """A token was given."""
        days[str(now.date())] += 1
        self.last_activity_at = self.last_token_issued_at = now
        self.count_against_limit(now)

    def count_against_limit(self, now: datetime) -> None:
        if self.fields["rate_limit"] is not None:
            self.counted.append(now)

    def lifetime(self, now: datetime, wanted: timedelta) -> timedelta:
        """`wanted`, or less: nothing outlives its agent."""
        return wanted if self.expires_at is None else min(wanted, self.expires_at - now)

    def shown(self, now: datetime) -> dict[str, Any]:
        """The `agent` of every answer."""
        return {
            "id": self.id,
            "client_id": self.client_id,
            "is_active": self.is_live(now),
            "token_endpoint_auth_method": "client_secret_basic",
            "created_at": written(self.created_at),
            "updated_at": written(self.updated_at),
            "expires_at": written(self.expires_at),
            "token_count": self.issued.total(),
            "refresh_count": self.refreshed.total(),
            "last_activity_at": written(self.last_activity_at),
            "last_token_issued_at": written(self.last_token_issued_at),
            **self.fields,
        }

    def usage(self, now: datetime) -> dict[str, Any]:
        """What the agent is told of itself."""
        days = [str(now.date() - timedelta(days=back)) for back in range(29, -1, -1)]
        return {
            "token_count": self.issued.total(),
            "refresh_count": self.refreshed.total(),
            "last_activity_at": written(self.last_activity_at),
            "last_token_issued_at": written(self.last_token_issued_at),
            "rotation_history": self.rotations[::-1],
            "daily": [
                {"date": day, "tokens_issued": self.issued[day], "tokens_refreshed": self.refreshed[day]}
                for day in days
            ],
        }

    def rotate(self, secret: str, now: datetime, by: str, grace_period: int, revoke_tokens: bool) -> None:
        for old in self.secrets:
            if grace_period and old.is_live(now):
                ends_at = now + timedelta(seconds=grace_period)
                old.expires_at = min(ends_at, old.expires_at or ends_at)
            elif not grace_period:
                old.deleted = True
        self.secrets.append(Secret(secret, now))
        self.rotations.append({"rotated_at": written(now), "rotated_by": by})
        self.updated_at = now
        self.version += revoke_tokens
        if by == "self":
            self.last_activity_at = now
            self.own_rotations.append(now)
            self.count_against_limit(now)
        self.tell("agent.credentials_rotated", self.id if by == "self" else "admin")

    def deactivate(self, now: datetime, actor: str) -> None:
        if self.is_active:
            self.is_active, self.updated_at = False, now
            self.version += 1
            self.tell("agent.deactivated", actor)

    def reactivate(self, now: datetime) -> None:
        if not self.is_active:
            self.is_active, self.updated_at = True, now
            self.tell("agent.reactivated", "admin")

    def delete(self, actor: str) -> None:
        self.deleted = True
        self.tell("agent.deleted", actor)

    def patch(self, changes: dict[str, Any], now: datetime, actor: str) -> None:
        changes = dict(changes)
        if "expires_in" in changes:
            # One that comes back from its expiry brings no old tokens along.
            self.version += self.is_expired(now)
            seconds = changes.pop("expires_in")
            self.expires_at = None if seconds is None else now + timedelta(seconds=seconds)
        self.fields |= changes
        self.updated_at = now
        self.tell("agent.updated", actor)


@dataclass(eq=False)
class Family:
    """All tokens that descend from one sign-in."""

    agent: Agent
    version: int
    ends_at: datetime
    scopes: list[str]
    audiences: list[str]
    newest: str = ""
    issued_at: datetime = datetime.min
    expires_at: datetime = datetime.min
    jti: str = ""
    ended: bool = False
    secret: Secret | None = None
    secret_deleted: bool = False  # by the operator: its access tokens live on

    def is_there(self, now: datetime) -> bool:
        """Whether a used token of it is still known for what it is."""
        there = (
            not self.ended
            and not self.secret_deleted
            and not self.agent.deleted
            and self.version == self.agent.version
        )
        return there and self.expires_at > now

    def held_scopes(self) -> list[str]:
        return [scope for scope in self.scopes if scope in self.agent.fields["scopes"]]

    def held_audiences(self) -> list[str]:
        allowed = {ISSUER, *self.agent.fields["audiences"]}
        return [audience for audience in self.audiences if audience in allowed]

    def lost_all(self) -> bool:
        """Whether the agent has lost every scope, or every audience, that the family was granted."""
        return not self.held_audiences() or (bool(self.scopes) and not self.held_scopes())


@dataclass(eq=False)
class Grant:
    """One answer of the token endpoint: an access token and a refresh token."""

    family: Family
    access: str
    refresh: str
    scopes: list[str]
    audiences: list[str]
    issued_at: datetime
    expires_at: datetime
    version: int
    key_era: int
    jti: str
    revoked: bool = False

    @property
    def agent(self) -> Agent:
        return self.family.agent

    def access_is_live(self, now: datetime, key_era: int) -> bool:
        stands = self.agent.is_live(now) and self.version == self.agent.version
        ended = self.revoked or self.family.ended or self.key_era != key_era
        return stands and not ended and self.expires_at > now

    def held(self) -> list[str]:
        """A scope taken from the agent is gone from its older tokens too."""
        return [scope for scope in self.scopes if scope in self.agent.fields["scopes"]]

    def held_audiences(self) -> list[str]:
        allowed = {ISSUER, *self.agent.fields["audiences"]}
        return [audience for audience in self.audiences if audience in allowed]

    def refresh_is_live(self, now: datetime) -> bool:
        family = self.family
        return self.agent.is_live(now) and family.is_there(now) and family.newest == self.refresh

    def access_facts(self) -> dict[str, Any]:
        """What introspection says of the access token while it lives."""
        return {
            **self._facts(self.held(), self.held_audiences()),
            "exp": int(self.expires_at.timestamp()),
            "iat": int(self.issued_at.timestamp()),
            "jti": self.jti,
            "token_type": "Bearer",
        }

    def refresh_facts(self) -> dict[str, Any]:
        """The same of the refresh token."""
        family = self.family
        return {
            **self._facts(family.held_scopes(), family.held_audiences()),
            "exp": int(family.expires_at.timestamp()),
            "iat": int(family.issued_at.timestamp()),
            "jti": family.jti,
            "token_type": "refresh_token",
        }

    def _facts(self, scopes: list[str], audiences: list[str]) -> dict[str, Any]:
        return {
            "active": True,
            "scope": " ".join(scopes),
            "client_id": self.agent.client_id,
            "sub": self.agent.client_id,
            "agent_id": self.agent.id,
            "iss": ISSUER,
            "aud": audiences[0] if len(audiences) == 1 else audiences,
        }
