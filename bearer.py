"""Access tokens shown to Lanyard's own API: Authlib's resource protector, and whose token it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from authlib.oauth2 import ResourceProtector
from authlib.oauth2.rfc6749 import MissingAuthorizationError, UnsupportedTokenTypeError
from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from authlib.oauth2.rfc9068.claims import JWTAccessTokenClaims
from flask import g, request
from joserfc import jwt
from joserfc.errors import JoseError
from sqlalchemy import bindparam

import access
import events
import keys
import tally
from config import settings
from database import reading
from models import Agent, RevokedToken, SigningKey, is_live, now
from wire import Problem

ADMIN_SCOPE = "admin"
_INVALID = "The access token has expired, was revoked, is malformed or not for here, or its agent is off."


class ClaimsRegistry(JWTAccessTokenClaims.registry_cls):
    """joserfc's rules, but for one."""

    def validate_iat(self, value: object) -> None:
        """A clock that was set back makes our own newest tokens come from the future: they stay good."""


class Claims(JWTAccessTokenClaims):
    """The claims of an access token."""

    registry_cls = ClaimsRegistry


class AccessTokenValidator(JWTBearerTokenValidator):
    """Checks a token as RFC 9068 §4 says, then that its agent still stands behind it."""

    def __init__(self, issuer: str, resource_server: str | None) -> None:
        super().__init__(issuer, resource_server)
        # An agent shows the same token for an hour: a good signature stays good, and a bad one is
        # never remembered. All that can change about a token is looked up each time, in validate_token.
        self._decode = lru_cache(maxsize=2048)(_decode)
        needed: Any = {name: {"essential": True} for name in ("exp", "iat", "sub", "jti", "client_id")}
        needed["iss"] = {"essential": True, "value": issuer}
        needed["aud"] = {"essential": True, "value": resource_server}
        self._needed = needed

    def authenticate_token(self, token_string: str) -> JWTAccessTokenClaims:
        """The claims of a token with a good signature.

        :raises InvalidTokenError: whatever is wrong with it.
        """
        try:
            token = self._decode(token_string)
        except (JoseError, ValueError, TypeError):
            # joserfc lets the latter two through for headers that no signer would write.
            raise InvalidTokenError() from None
        return Claims(token.claims, token.header, self._needed)

    def validate_token(
        self, token: JWTAccessTokenClaims, scopes: list[str] | None, request: Any, **kwargs: Any
    ) -> None:
        """Refuse a token past its time, of another kind, issuer or audience, revoked, or of a dead agent."""
        # RFC 9068 §4: `typ` is required, which keeps other JWTs of this issuer out (RFC 8725 §3.11).
        if str(token.header.get("typ")).lower() not in ("at+jwt", "application/at+jwt"):
            raise InvalidTokenError()
        try:
            token.validate(now=int(now().timestamp()))
        except JoseError:
            raise InvalidTokenError() from None
        agent = _standing_agent(token)
        if agent is None or not is_live(agent, now()):
            raise InvalidTokenError()
        # A scope taken from the agent is gone from its older tokens too.
        held = [scope for scope in token["scope"].split() if scope in agent.scopes]
        if self.scope_insufficient(held, scopes):
            raise InsufficientScopeError()
        token.agent, token.scopes = agent, held


def _decode(token_string: str) -> jwt.Token:
    # The key is ours by its `kid`; a `jwk` or `jku` in the header is never used (RFC 8725 §3.10).
    return jwt.decode(token_string, keys.find_key, registry=keys.SIGNING_ALGORITHMS)


# The agent of a token, unless the token, its grant, its version or its key has been ended since.
_STANDING_AGENT = (
    sa.select(Agent)
    .join(SigningKey, SigningKey.kid == bindparam("kid"))
    .where(
        Agent.client_id == bindparam("client_id"),
        Agent.id == bindparam("agent_id"),
        Agent.token_version == bindparam("version"),
        ~sa.exists().where(RevokedToken.id.in_([bindparam("jti"), bindparam("grant")])),
    )
)


def _standing_agent(token: JWTAccessTokenClaims) -> Any:
    jti = str(token["jti"])
    values = {"jti": jti, "grant": jti.partition(".")[0], "kid": token.header["kid"]}
    values |= {
        "client_id": token["client_id"],
        "agent_id": token.get("agent_id"),
        "version": token.get("ver"),
    }
    with reading() as connection:
        return connection.execute(_STANDING_AGENT, values).first()


@lru_cache(maxsize=16)
def _validator(issuer: str, audience: str | None) -> AccessTokenValidator:
    return AccessTokenValidator(issuer, audience)


@lru_cache(maxsize=16)
def _protector(issuer: str, audience: str) -> ResourceProtector:
    protector = ResourceProtector()
    protector.register_token_validator(_validator(issuer, audience))
    return protector


def require_agent() -> None:
    """Let an agent with a good access token through; `current_agent()` is then that agent."""
    _require(None)
    events.caller_is(current_agent().id, current_agent().client_id)


def require_operator() -> None:
    """Let the operator through, and an agent whose token carries the `admin` scope."""
    if access.is_operator():
        events.caller_is(events.OPERATOR)
        return
    try:
        _require(ADMIN_SCOPE)
    except Problem as problem:
        if problem.status == 401 and "Authorization" in request.headers:
            events.record_failure(None)
        raise
    events.caller_is(current_agent().id, current_agent().client_id)


def look_at(token_string: str) -> tuple[dict[str, Any], Any] | None:
    """The claims of a good access token, whatever its audience, and its agent's row.

    `scope` in the claims is what the token still holds.
    """
    validator = _validator(settings().issuer, None)
    try:
        token = validator.authenticate_token(token_string)
        validator.validate_token(token, None, None)
    except InvalidTokenError:
        return None
    return {**token, "scope": " ".join(token.scopes)}, token.agent


def current_agent() -> Any:
    """The agent whose token the request carries: a row with what an Agent has, read when it was checked."""
    return g.agent


def is_admin() -> bool:
    """Whether the access token of the request lets its agent do what the operator may."""
    return ADMIN_SCOPE in g.scopes


def _require(scope: str | None) -> None:
    try:
        token = _protector(settings().issuer, settings().audience).validate_request(
            [scope] if scope else None, request
        )
        g.agent, g.scopes = token.agent, token.scopes
    except InvalidTokenError:
        tally.count_failure("access_token")
        raise _challenge(401, "invalid_token", _INVALID) from None
    except InsufficientScopeError:
        text = f"This needs an access token with the scope {scope}."
        raise _challenge(403, "insufficient_scope", text, scope=str(scope)) from None
    except (MissingAuthorizationError, UnsupportedTokenTypeError) as error:
        if request.headers.get("Authorization", "").strip().lower() == "bearer":
            raise _challenge(401, "invalid_token", _INVALID) from error
        # RFC 6750 §3.1: a request without a token is told the scheme and no error.
        raise Problem(
            401,
            "unauthorized",
            "Send Authorization: Bearer with an access token; the management API takes the admin token,"
            " also as Basic with the user admin.",
            headers={"WWW-Authenticate": f"Bearer {_where_to_ask()}"},
        ) from None


def _challenge(status: int, error: str, description: str, **attributes: str) -> Problem:
    """A refusal as RFC 6750 §3 writes it."""
    parts = {"error": error, "error_description": description, **attributes}
    told = ", ".join(f'{name}="{value}"' for name, value in parts.items())
    return Problem(
        status, error, description, headers={"WWW-Authenticate": f"Bearer {told}, {_where_to_ask()}"}
    )


def _where_to_ask() -> str:
    # RFC 9728 §5.1: from there a client finds the authorization server by itself.
    return f'resource_metadata="{settings().url("/.well-known/oauth-protected-resource")}"'
