"""Tokens given out: how an access token is made, and what is kept of refresh tokens and usage."""

from __future__ import annotations

import hmac
import logging
from datetime import datetime, timedelta
from typing import Any, NoReturn

import sqlalchemy as sa
from authlib.oauth2.rfc6749 import InvalidGrantError, InvalidScopeError
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator
from joserfc import jwt
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # SQLite's compiler knows it too

import credentials
import events
import keys
import tally
from client_auth import COLUMNS, AuthenticationFailed, Client
from config import DAY, Settings, settings
from database import reading, writing
from models import Agent, ClientSecret, Moment, RefreshFamily, RevokedToken, UsageDay, now
from wire import Problem

log = logging.getLogger("lanyard")

FAMILY_TTL = 30 * DAY
MINUTE = 60  # seconds

_NOW: Any = bindparam("now", type_=Moment)
_LIVE_AGENT = sa.and_(
    Agent.pk == bindparam("agent"), Agent.token_version == bindparam("version"), Agent.live(_NOW)
)
_ACTIVITY = {"last_activity_at": _NOW, "last_token_issued_at": _NOW}
_COUNT_TOKEN = sa.update(Agent).where(_LIVE_AGENT).values(token_count=Agent.token_count + 1, **_ACTIVITY)
_COUNT_REFRESH = (
    sa.update(Agent).where(_LIVE_AGENT).values(refresh_count=Agent.refresh_count + 1, **_ACTIVITY)
)
_DAY = (UsageDay.agent_pk, UsageDay.day)
_TOKEN_DAY = (
    insert(UsageDay)
    .values(agent_pk=bindparam("agent"), day=bindparam("day"), tokens_issued=1, tokens_refreshed=0)
    .on_conflict_do_update(index_elements=_DAY, set_={"tokens_issued": UsageDay.tokens_issued + 1})
)
_REFRESH_DAY = (
    insert(UsageDay)
    .values(agent_pk=bindparam("agent"), day=bindparam("day"), tokens_issued=0, tokens_refreshed=1)
    .on_conflict_do_update(index_elements=_DAY, set_={"tokens_refreshed": UsageDay.tokens_refreshed + 1})
)
_MINUTE_IS_OVER = sa.or_(
    Agent.minute_began_at.is_(None),
    Agent.minute_began_at <= bindparam("minute_ago", type_=Moment),
    # Before the clock was set back; one that merely waited for the lock is a little behind.
    Agent.minute_began_at > bindparam("minute_ahead", type_=Moment),
)
_HAS_ROOM = sa.or_(_MINUTE_IS_OVER, Agent.minute_count < Agent.rate_limit)
_SEE_ROOM = sa.select(_HAS_ROOM.label("has_room"), Agent.minute_began_at).where(
    Agent.pk == bindparam("agent")
)
_TAKE_ROOM = (
    sa.update(Agent)
    .where(Agent.pk == bindparam("agent"), _HAS_ROOM)
    .values(
        minute_began_at=sa.case((_MINUTE_IS_OVER, _NOW), else_=Agent.minute_began_at),
        minute_count=sa.case((_MINUTE_IS_OVER, 1), else_=Agent.minute_count + 1),
    )
)
_USE_SECRET = sa.update(ClientSecret).where(ClientSecret.pk == bindparam("secret")).values(last_used_at=_NOW)
_NEW_FAMILY = sa.insert(RefreshFamily)
_BY_FAMILY = (
    sa.select(
        *COLUMNS, *(column.label(f"family_{column.name}") for column in RefreshFamily.__table__.columns)
    )
    .join(Agent, Agent.pk == RefreshFamily.agent_pk)
    .where(RefreshFamily.id == bindparam("family"))
)
_NEXT_TOKEN = (
    sa.update(RefreshFamily)
    .where(RefreshFamily.id == bindparam("family"), RefreshFamily.token_hash == bindparam("old_hash"))
    .values(
        {name: bindparam(name) for name in ("token_hash", "scopes", "audiences", "issued_at", "expires_at")}
    )
)
_REVOKE = insert(RevokedToken).on_conflict_do_nothing()
_END_FAMILY = sa.delete(RefreshFamily).where(RefreshFamily.id == bindparam("family"))


class TokenGenerator(JWTBearerTokenGenerator):
    """Makes the token answer: an RFC 9068 access token and a refresh token."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            issuer=settings.issuer,
            refresh_token_generator=self._refresh_token,
            expires_generator=lambda client, grant_type: client.token_lifetime,
        )

    def access_token_generator(self, client: Client, grant_type: str, user: None, scope: str) -> str:
        """Sign the claims of RFC 9068 §2.2.

        Authlib's own puts `typ` before `alg` in the header and reads a clock of its own; clients
        may rely on the order that Lanyard's contract shows.
        """
        issued_at = int(client.now.timestamp())
        audiences = client.audiences
        claims = {
            "iss": self.issuer,
            "sub": client.row.client_id,
            "aud": audiences[0] if len(audiences) == 1 else audiences,
            "exp": issued_at + client.token_lifetime,
            "iat": issued_at,
            "jti": credentials.new_jti(client.family_id),
            "client_id": client.row.client_id,
            "scope": scope,
            "agent_id": client.row.id,
            # Whole seconds cannot tell a token from just before a deactivation from one just after.
            "ver": client.row.token_version,
        }
        key = keys.signing_key(client.row.newest_key)
        header = {"alg": key.alg, "typ": "at+jwt", "kid": key.kid}
        return jwt.encode(header, claims, key, registry=keys.SIGNING_ALGORITHMS, default_type=None)

    def generate(self, grant_type: str, client: Client, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Authlib's answer, in the contract's order and with `scope` even when the agent has none.

        :raises Problem: 429, when the agent has had its tokens for this minute.
        """
        if client.row.rate_limit is not None:  # before a signature is spent on it
            with reading() as connection:
                _refuse_over_limit(connection, client)
        token = super().generate(grant_type, client, *args, **kwargs)
        names = ("access_token", "token_type", "expires_in", "scope", "refresh_token")
        return {name: token.get(name, "") for name in names}

    @staticmethod
    def get_allowed_scope(client: Client, scope: str | None) -> str:
        """Authlib's hook, with a sentence to act on."""
        allowed = client.get_allowed_scope(scope)
        if allowed is None:
            raise InvalidScopeError("The scope asks for more than this agent has.")
        return allowed

    @staticmethod
    def _refresh_token(client: Client, **kwargs: Any) -> str:
        return credentials.new_refresh_token(client.family_id)


def start_family(client: Client, token: dict[str, Any]) -> None:
    """Keep the first refresh token of a grant, and count the grant.

    A power cut may undo this, and then the agent, which holds its credentials, asks again: see
    README, Security.

    :raises AuthenticationFailed: when the agent died since it was authenticated.
    """
    with writing(durable=False, exclusive=False) as connection:
        if not _count(connection, client, _COUNT_TOKEN, _TOKEN_DAY):
            raise AuthenticationFailed()
        family = {
            **_newest(client, token),
            "id": client.family_id,
            "agent_pk": client.row.pk,
            "token_version": client.row.token_version,
            "ends_at": client.now + timedelta(seconds=FAMILY_TTL),
        }
        connection.execute(_NEW_FAMILY, family)
        if client.secret_pk is not None and client.row.last_used_at != client.now:
            connection.execute(_USE_SECRET, {"secret": client.secret_pk, "now": client.now})
        _record(connection, "token.issued", client, token)


def use_refresh_token(text: str) -> Client:
    """The client whose newest refresh token of a family this is, with the `family_*` columns in its row.

    A token that was used before ends its family: either the thief or the agent holds a copy
    (RFC 9700 §4.14.2).

    :raises InvalidGrantError: one text, whatever is wrong with the token.
    """
    client = find_by_refresh_token(text)
    if client is None:
        raise _no_good()
    if not _is_newest(client, text):
        _end_reused(client)
    if not _is_usable(client):
        raise _no_good()
    return client


def look_at_refresh_token(text: str) -> Client | None:
    """The same for one who only asks about the token: nothing happens to it."""
    client = find_by_refresh_token(text)
    if client is None or not _is_newest(client, text) or not _is_usable(client):
        return None
    return client


def find_by_refresh_token(text: str) -> Client | None:
    """The client of the family that a refresh token names, be the token used already or not."""
    family_id = credentials.refresh_token_family(text)
    if family_id is None:
        return None
    with reading() as connection:
        row = connection.execute(_BY_FAMILY, {"family": family_id}).first()
    return Client(row, now()) if row and row.family_expires_at > now() else None


def _is_newest(client: Client, text: str) -> bool:
    return hmac.compare_digest(client.row.family_token_hash, credentials.digest(text))


def _is_usable(client: Client) -> bool:
    return client.is_live and client.row.token_version == client.row.family_token_version


def next_of_family(client: Client, token: dict[str, Any]) -> None:
    """Put the new refresh token in the old one's place, and count the refresh.

    :raises InvalidGrantError: when the agent died, or the old token was used, since it was found.
    """
    old = client.row
    with writing(exclusive=False) as connection:
        values = {**_newest(client, token), "family": old.family_id, "old_hash": old.family_token_hash}
        values["expires_at"] = min(values["expires_at"], old.family_ends_at)
        won = connection.execute(_NEXT_TOKEN, values).rowcount == 1
        if won and not _count(connection, client, _COUNT_REFRESH, _REFRESH_DAY):
            raise _no_good()
        if won:
            _record(connection, "token.refreshed", client, token)
    if not won:
        _end_reused(client)


def _newest(client: Client, token: dict[str, Any]) -> dict[str, Any]:
    """The columns that every new refresh token of a family changes."""
    return {
        "token_hash": credentials.digest(token["refresh_token"]),
        "scopes": token["scope"].split(),
        "audiences": client.audiences,
        "issued_at": client.now,
        "expires_at": client.now + timedelta(seconds=client.seconds_left(settings().refresh_token_ttl)),
    }


def _count(connection: sa.Connection, client: Client, count: sa.Update, day: sa.Insert) -> bool:
    """Count a token; False when its agent is no longer the one that was authenticated."""
    values = {"agent": client.row.pk, "version": client.row.token_version, "now": client.now}
    if connection.execute(count, values).rowcount != 1:
        return False
    connection.execute(day, {"agent": client.row.pk, "day": client.now.date()})
    if client.row.rate_limit is not None and connection.execute(_TAKE_ROOM, _minute(client)).rowcount != 1:
        _refuse_over_limit(connection, client)
    return True


def _refuse_over_limit(connection: sa.Connection, client: Client) -> None:
    """Refuse an agent that has had its tokens for this minute.

    :raises Problem: 429.
    """
    room = connection.execute(_SEE_ROOM, _minute(client)).first()
    if room and not room.has_room:
        left = room.minute_began_at + timedelta(seconds=MINUTE) - client.now
        raise Problem(
            429,
            "too_many_requests",
            f"This agent may have {client.row.rate_limit} tokens a minute.",
            headers={"Retry-After": str(max(1, int(left.total_seconds())))},
        )


def _minute(client: Client) -> dict[str, Any]:
    return {
        "agent": client.row.pk,
        "now": client.now,
        "minute_ago": client.now - timedelta(seconds=MINUTE),
        "minute_ahead": client.now + timedelta(seconds=MINUTE),
    }


def end_family(client: Client, event: str) -> bool:
    """End a family's refresh tokens, and the access tokens given out with them (RFC 7009 §2.1).

    :param client: as found by one of the family's refresh tokens.
    :param event: what to record it as.

    Returns whether it was still there.
    """
    with writing(exclusive=False) as connection:
        ended = connection.execute(_END_FAMILY, {"family": client.family_id}).rowcount == 1
        if ended:
            longest = now() + timedelta(seconds=keys.LONGEST_TOKEN)
            revoke(connection, credentials.grant_id(client.family_id), longest)
            events.record(connection, event, client.row, token="refresh")
    return ended


def revoke(connection: sa.Connection, jti: str, expires_at: datetime) -> None:
    """Remember that a `jti`, or the part of one before its dot, is revoked, until `expires_at`."""
    connection.execute(_REVOKE, {"id": jti, "expires_at": expires_at})


def _end_reused(client: Client) -> NoReturn:
    if end_family(client, "token.reuse_detected"):
        tally.count_token("reused")
        log.warning("A refresh token of agent %s was used twice: its family is ended.", client.row.id)
    raise _no_good()


def _record(connection: sa.Connection, event: str, client: Client, token: dict[str, Any]) -> None:
    events.record(connection, event, client.row, scope=token["scope"], audience=client.audiences)


def _no_good() -> InvalidGrantError:
    return InvalidGrantError("The refresh token is unknown, expired, revoked or already used.")
