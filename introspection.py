"""Ask about a token, or end it: RFC 7662 and RFC 7009 on Authlib's endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from authlib.oauth2.rfc6749 import InvalidGrantError, InvalidRequestError, OAuth2Request, TokenMixin
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7662 import IntrospectionEndpoint
from flask import g

import auth
import client_auth
import counters
import credentials
import events
import tokens
from config import settings
from database import writing


@dataclass(frozen=True)
class Caller:
    """Who asks: an agent by its client id, or the operator."""

    client_id: str | None


@dataclass(frozen=True)
class KnownToken(TokenMixin):
    """A token that is good now, and what introspection answers about it (RFC 7662 §2.2)."""

    facts: dict[str, Any]
    # The agent, as an event tells of it, or the client that its family was found by.
    agent: Any

    def check_client(self, client: Caller) -> bool:
        """Whether the caller may end it: its own agent, or the operator."""
        return client.client_id in (None, self.facts["client_id"])

    def is_expired(self) -> bool:
        """Not when it was found."""
        return False

    def is_revoked(self) -> bool:
        """Not when it was found."""
        return False


class _TokenEndpoint:
    """What both endpoints share: who may call, and how a token is found."""

    def authenticate_endpoint_client(self, request: OAuth2Request) -> Caller:
        """An agent by any of its methods or by an access token, or the operator.

        :raises AuthenticationFailed: for anyone else.
        """
        if auth.carries_admin_token():
            events.set_caller(events.OPERATOR)
            caller = Caller(None)
        elif request.headers.get("Authorization", "")[:7].lower() == "bearer ":
            auth.require_agent()
            caller = Caller(None if auth.is_admin() else g.agent.client_id)
        else:
            return Caller(client_auth.authenticate(request).get_client_id())
        if {"client_secret", "client_assertion"} & set(request.form):
            raise InvalidRequestError("Send credentials one way: in the header or in the body.")
        return caller

    def check_params(self, request: OAuth2Request, client: Caller) -> None:
        """`token` is needed; a hint is a hint: what a token is shows in the token (RFC 7009 §2.1)."""
        if not request.form.get("token"):
            raise InvalidRequestError("Send token.")

    def query_token(self, token_string: str, token_type_hint: str | None) -> KnownToken | None:
        """The token, if it is good."""
        if token_string.startswith("rt_"):
            return _refresh_token(token_string)
        return _access_token(token_string)


class Introspection(_TokenEndpoint, IntrospectionEndpoint):
    """RFC 7662. Any caller may ask about any token: an agent may be a resource server."""

    def check_permission(self, token: KnownToken, client: Caller, request: OAuth2Request) -> bool:
        """Whoever is let in may ask."""
        return True

    def introspect_token(self, token: KnownToken) -> dict[str, Any]:
        """The answer about a good token; about any other it is `{"active": false}` and no more."""
        return {"active": True, **token.facts}


class Revocation(_TokenEndpoint, RevocationEndpoint):
    """RFC 7009. A refresh token takes its family with it."""

    def authenticate_token(self, request: OAuth2Request, client: Caller) -> KnownToken | None:
        """Authlib's check, with a sentence to act on.

        :raises InvalidGrantError: when the token is another agent's.
        """
        try:
            token: KnownToken | None = super().authenticate_token(request, client)
        except InvalidGrantError:
            raise InvalidGrantError("The token is another agent's: only its own may be revoked.") from None
        return token

    def query_token(self, token_string: str, token_type_hint: str | None) -> KnownToken | None:
        """The token; a refresh token of a family that lives will do, be it the newest or a used one."""
        client = tokens.find_by_refresh_token(token_string)
        if client is not None:
            return KnownToken({"client_id": client.get_client_id()}, client)
        return super().query_token(token_string, token_type_hint)

    def revoke_token(self, token: KnownToken, request: OAuth2Request) -> None:
        """End it, in every worker, before the answer."""
        if isinstance(token.agent, client_auth.Client):
            if tokens.end_family(token.agent, "token.revoked"):
                counters.count_token("revoked")
            return
        with writing(exclusive=False) as connection:
            expires_at = datetime.fromtimestamp(token.facts["exp"], UTC)
            tokens.revoke(connection, token.facts["jti"], expires_at)
            events.record(connection, "token.revoked", token.agent, token="access")
        counters.count_token("revoked")


def _access_token(text: str) -> KnownToken | None:
    found = auth.inspect_token(text)
    if found is None:
        return None
    claims, agent = found
    names = ("scope", "client_id", "sub", "aud", "iss", "exp", "iat", "jti", "agent_id")
    return KnownToken({name: claims[name] for name in names} | {"token_type": "Bearer"}, agent)


def _refresh_token(text: str) -> KnownToken | None:
    client = tokens.inspect_refresh_token(text)
    if client is None:
        return None
    row = client.row
    scopes, audiences = client.held_scopes, client.held_audiences
    if not audiences or (row.family_scopes and not scopes):
        return None
    return KnownToken(
        {
            "scope": " ".join(scopes),
            "client_id": row.client_id,
            "sub": row.client_id,
            "aud": audiences[0] if len(audiences) == 1 else audiences,
            "iss": settings().issuer,
            "exp": int(row.family_expires_at.timestamp()),
            "iat": int(row.family_issued_at.timestamp()),
            "jti": credentials.grant_id(row.family_id),
            "agent_id": row.id,
            "token_type": "refresh_token",
        },
        client,
    )
