"""Access and refresh tokens: issue, rotate, detect reuse, revoke; usage and the rate limit."""

from __future__ import annotations

import hmac
import logging
from datetime import datetime, timedelta
from typing import Any, NoReturn

import sqlalchemy as sa
from authlib.oauth2.rfc6749 import InvalidGrantError
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # compiles for SQLite too

import credentials
import events
import keys
from client_auth import COLUMNS, AuthenticationFailed, Client
from config import Settings, settings
from database import reading, writing
from models import Agent, ClientSecret, RefreshFamily, RevokedToken, Timestamp, UsageDay, is_active, now

log = logging.getLogger("lanyard")

FAMILY_TTL = timedelta(days=30)
_NEEDS_CREDENTIALS = "Send client credentials with the refresh token."

_NOW: Any = bindparam("now", type_=Timestamp)
_ISSUED, _REFRESHED = bindparam("issued", type_=sa.Integer), bindparam("refreshed", type_=sa.Integer)
_COUNT = (
    sa.update(Agent)
    .where(Agent.pk == bindparam("agent"), Agent.token_version == bindparam("version"), Agent.active(_NOW))
    .values(
        token_count=Agent.token_count + _ISSUED,
        refresh_count=Agent.refresh_count + _REFRESHED,
        last_activity_at=_NOW,
        last_token_issued_at=_NOW,
    )
)
_COUNT_IN_DAY = (
    insert(UsageDay)
    .values(
        agent_pk=bindparam("agent"), day=bindparam("day"), tokens_issued=_ISSUED, tokens_refreshed=_REFRESHED
    )
    .on_conflict_do_update(
        index_elements=(UsageDay.agent_pk, UsageDay.day),
        set_={
            "tokens_issued": UsageDay.tokens_issued + _ISSUED,
            "tokens_refreshed": UsageDay.tokens_refreshed + _REFRESHED,
        },
    )
)
_USE_SECRET = (
    sa.update(ClientSecret)
    .where(ClientSecret.pk == bindparam("secret"), ClientSecret.valid(_NOW))
    .values(last_used_at=_NOW)
)
_NEW_FAMILY = sa.insert(RefreshFamily)
_BY_FAMILY = (
    sa.select(
        *COLUMNS, *(column.label(f"family_{column.name}") for column in RefreshFamily.__table__.columns)
    )
    .join(Agent, Agent.pk == RefreshFamily.agent_pk)
    .where(RefreshFamily.id == bindparam("family"), RefreshFamily.token_version == Agent.token_version)
)
# The columns to set are those of the parameters.
_NEXT_TOKEN = sa.update(RefreshFamily).where(
    RefreshFamily.id == bindparam("family"), RefreshFamily.token_hash == bindparam("old_hash")
)
_REVOKE = insert(RevokedToken).on_conflict_do_nothing()
_END_FAMILY = sa.delete(RefreshFamily).where(RefreshFamily.id == bindparam("family"))


class TokenGenerator(JWTBearerTokenGenerator):
    """Generate the token response: an RFC 9068 access token and a refresh token."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            issuer=settings.issuer,
            refresh_token_generator=lambda client, **_: credentials.new_refresh_token(client.family_id),
            expires_generator=lambda client, grant_type: client.token_lifetime,
        )

    def access_token_generator(self, client: Client, grant_type: str, user: None, scope: str) -> str:
        """Sign the claims of RFC 9068 §2.2. (Authlib's own method reads the clock once more.)"""
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
            # `iat` in whole seconds cannot separate tokens just before and just after a deactivation.
            "ver": client.row.token_version,
        }
        return keys.sign(claims, client.row.newest_key)

    def generate(self, grant_type: str, client: Client, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return Authlib's response in a fixed order, with `scope` even when it is empty.

        :raises Problem: 429, when the agent has used up its rate limit.
        """
        if client.row.rate_limit is not None:  # refuse before signing
            with reading() as connection:
                credentials.refuse_over_limit(connection, client.row)
        token = super().generate(grant_type, client, *args, **kwargs)
        names = ("access_token", "token_type", "expires_in", "scope", "refresh_token")
        return {name: token.get(name, "") for name in names}


def start_family(client: Client, token: dict[str, Any]) -> None:
    """Store the first refresh token of a grant, and count the grant.

    A power cut may undo this: the agent still has its credentials and asks again (SECURITY.md).

    :raises AuthenticationFailed: when the agent or its secret has ended since it was authenticated.
    """
    with writing(durable=False, exclusive=False) as connection:
        if not _count_token(connection, client, issued=1):
            raise AuthenticationFailed(reason="inactive_agent")
        if not _use_secret(connection, client):
            raise AuthenticationFailed(reason="wrong_secret")
        family = {
            **_token_columns(client, token),
            "scopes": token["scope"].split(),
            "audiences": client.audiences,
            "id": client.family_id,
            "agent_pk": client.row.pk,
            "secret_hint": getattr(client.row, "hint", None),
            "token_version": client.row.token_version,
            "ends_at": client.now + FAMILY_TTL,
        }
        connection.execute(_NEW_FAMILY, family)
        events.record(connection, "token.issued", client.row, scope=token["scope"], audience=client.audiences)


def _use_secret(connection: sa.Connection, client: Client) -> bool:
    """Store the use of the secret; return False when it has ended since it was checked."""
    secret_pk = getattr(client.row, "secret_pk", None)
    if secret_pk is None:
        return True  # an assertion
    return connection.execute(_USE_SECRET, {"secret": secret_pk, "now": now()}).rowcount == 1


def use_refresh_token(text: str, is_authenticated: bool) -> Client:
    """Return the client of a family's newest refresh token, with the `family_*` columns in its row.

    Reuse of an older token ends the family: either a thief or the agent has a copy (RFC 9700 §4.14.2).

    :param is_authenticated: whether the request carries valid client credentials.
    :raises InvalidGrantError: with one text, whatever is wrong with the token.
    :raises AuthenticationFailed: when the agent needs credentials; the family stays as it is.
    """
    client = find_by_refresh_token(text)
    is_required = settings().require_client_auth_for_refresh or (
        client is not None and client.row.require_client_auth_for_refresh
    )
    if is_required and not is_authenticated:
        raise AuthenticationFailed(_NEEDS_CREDENTIALS, reason="malformed")
    if client is not None and not _is_newest(client, text):
        _end_reused_family(client)
    if client is None or not is_active(client.row, client.now):
        raise _invalid_refresh_token()
    return client


def inspect_refresh_token(text: str) -> Client | None:
    """Return the client of a family's newest refresh token, or None; change nothing."""
    client = find_by_refresh_token(text)
    return client if client and _is_newest(client, text) and is_active(client.row, client.now) else None


def find_by_refresh_token(text: str) -> Client | None:
    """Return the client of the family that a refresh token, newest or used, belongs to."""
    family_id = credentials.refresh_token_family(text)
    if family_id is None:
        return None
    with reading() as connection:
        row = connection.execute(_BY_FAMILY, {"family": family_id}).first()
    return Client(row, now(), family_id) if row and row.family_expires_at > now() else None


def _is_newest(client: Client, text: str) -> bool:
    return hmac.compare_digest(client.row.family_token_hash, credentials.digest(text))


def rotate_family(client: Client, token: dict[str, Any]) -> None:
    """Replace the family's refresh token by the new one, and count the refresh.

    :raises InvalidGrantError: when the agent was deactivated, or the old token used, since it was read.
    """
    old = client.row
    with writing(exclusive=False) as connection:
        values = {**_token_columns(client, token), "family": old.family_id, "old_hash": old.family_token_hash}
        values["expires_at"] = min(values["expires_at"], old.family_ends_at)
        if connection.execute(_NEXT_TOKEN, values).rowcount == 1:
            if not _count_token(connection, client, refreshed=1):
                raise _invalid_refresh_token()
            events.record(
                connection, "token.refreshed", client.row, scope=token["scope"], audience=client.audiences
            )
            return
    _end_reused_family(client)


def _token_columns(client: Client, token: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that every new refresh token of a family changes."""
    return {
        "token_hash": credentials.digest(token["refresh_token"]),
        "issued_at": client.now,
        "expires_at": client.now + timedelta(seconds=client.seconds_left(settings().refresh_token_ttl)),
    }


def _count_token(connection: sa.Connection, client: Client, *, issued: int = 0, refreshed: int = 0) -> bool:
    """Count a token; return False when its agent was deactivated, or its tokens ended, meanwhile."""
    counts = {"agent": client.row.pk, "issued": issued, "refreshed": refreshed}
    version = {"version": client.row.token_version, "now": client.now}
    if connection.execute(_COUNT, counts | version).rowcount != 1:
        return False
    connection.execute(_COUNT_IN_DAY, counts | {"day": client.now.date()})
    credentials.count_against_limit(connection, client.row)
    return True


def end_family(client: Client, event: str) -> bool:
    """End a family's refresh tokens, and the access tokens issued with them (RFC 7009 §2.1).

    :param event: the type of the event to record.
    :returns: False when the family had ended before.
    """
    with writing(exclusive=False, reserve=events.reserve_share()) as connection:
        ended = connection.execute(_END_FAMILY, {"family": client.family_id}).rowcount == 1
        if ended:
            longest = now() + timedelta(seconds=keys.LONGEST_TOKEN)
            revoke(connection, credentials.grant_id(client.family_id), longest)
            events.record(connection, event, client.row, token="refresh")
    return ended


def revoke(connection: sa.Connection, jti: str, expires_at: datetime) -> None:
    """Revoke a `jti`, or all of one grant id, until `expires_at`."""
    connection.execute(_REVOKE, {"id": jti, "expires_at": expires_at})


def _end_reused_family(client: Client) -> NoReturn:
    if end_family(client, "token.reuse_detected"):
        events.TOKENS_REUSED.inc()
        # In the message itself: reuse by another agent is another kind to the log's filter.
        log.warning(f"A refresh token of agent {client.row.id} was used twice: its family has been ended.")
    raise _invalid_refresh_token()


def _invalid_refresh_token() -> InvalidGrantError:
    return InvalidGrantError("The refresh token is unknown, expired, revoked or already used.")
