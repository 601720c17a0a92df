"""Access tokens shown to Lanyard's own API: Authlib's resource protector, and whose token it is."""

from __future__ import annotations

from typing import Any

from authlib.integrations.flask_oauth2 import ResourceProtector
from authlib.oauth2.rfc6749 import MissingAuthorizationError, UnsupportedTokenTypeError
from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from authlib.oauth2.rfc9068.claims import JWTAccessTokenClaims
from flask import Flask, current_app, g, request
from joserfc import jwt
from joserfc.errors import JoseError
from sqlalchemy import select

import access
import clock
import keys
from config import Settings
from models import Agent, db
from wire import Problem

_EXTENSION = "lanyard.bearer"
ADMIN_SCOPE = "admin"


class AccessTokenValidator(JWTBearerTokenValidator):
    """Checks a token as RFC 9068 §4 says, then that its agent still stands behind it."""

    def get_jwks(self) -> Any:
        """The keys whose signatures count; a header's own `jwk` or `jku` never does (RFC 8725 §3.10)."""
        return keys.verification_keys()

    def authenticate_token(self, token_string: str) -> JWTAccessTokenClaims:
        """The claims of a token with a good signature.

        :raises InvalidTokenError: whatever is wrong with it.
        """
        try:
            token = jwt.decode(token_string, self.get_jwks(), registry=keys.SIGNING_ALGORITHMS)
        except (JoseError, ValueError, TypeError):
            # joserfc lets the latter two through for headers that no signer would write.
            raise InvalidTokenError() from None
        required = {name: {"essential": True} for name in ("exp", "iat", "sub", "jti", "client_id")}
        issuer = {"essential": True, "value": self.issuer}
        audience = {"essential": True, "value": self.resource_server}
        return JWTAccessTokenClaims(token.claims, token.header, {**required, "iss": issuer, "aud": audience})

    def validate_token(
        self, token: JWTAccessTokenClaims, scopes: list[str] | None, request: Any, **kwargs: Any
    ) -> None:
        """Refuse a token past its time, of another kind, issuer or audience, or of a dead agent."""
        # RFC 9068 §4: `typ` is required, which keeps other JWTs of this issuer out (RFC 8725 §3.11).
        if str(token.header.get("typ")).lower() not in ("at+jwt", "application/at+jwt"):
            raise InvalidTokenError()
        try:
            token.validate(now=int(clock.now().timestamp()))
        except JoseError:
            raise InvalidTokenError() from None
        agent = db.session.scalar(select(Agent).where(Agent.client_id == token["client_id"]))
        if agent is None or not _stands_behind(agent, token):
            raise InvalidTokenError()
        self._check_scope(agent, token, scopes)
        g.agent = agent

    def _check_scope(self, agent: Agent, token: JWTAccessTokenClaims, scopes: list[str] | None) -> None:
        # A scope taken from the agent is gone from its older tokens too.
        held = [scope for scope in token["scope"].split() if scope in agent.scopes]
        if self.scope_insufficient(held, scopes):
            raise InsufficientScopeError()


def init_app(app: Flask, settings: Settings) -> None:
    """Set up the protector for the app's issuer and audience."""
    protector = ResourceProtector()
    protector.register_token_validator(
        AccessTokenValidator(issuer=settings.issuer, resource_server=settings.audience)
    )
    app.extensions[_EXTENSION] = protector


def require_agent() -> None:
    """Let an agent with a good access token through; `current_agent()` is then that agent."""
    _require(None)


def require_operator() -> None:
    """Let the operator through, and an agent whose token carries the `admin` scope."""
    if not access.is_operator():
        _require(ADMIN_SCOPE)


def current_agent() -> Agent:
    """The agent whose token the request carries."""
    agent: Agent = g.agent
    return agent


def _require(scope: str | None) -> None:
    protector: ResourceProtector = current_app.extensions[_EXTENSION]
    try:
        protector.acquire_token([scope] if scope else None)
    except InvalidTokenError as error:
        raise _challenge(401, "invalid_token", error.description) from None
    except InsufficientScopeError:
        text = f"This needs an access token with the scope {scope}."
        raise _challenge(403, "insufficient_scope", text, scope=str(scope)) from None
    except (MissingAuthorizationError, UnsupportedTokenTypeError) as error:
        if request.headers.get("Authorization", "").strip().lower() == "bearer":
            raise _challenge(401, "invalid_token", InvalidTokenError.description) from error
        # RFC 6750 §3.1: a request without a token is told the scheme and no error.
        raise Problem(
            401,
            "unauthorized",
            "Send an access token, or for the management API the admin token, as Authorization: Bearer.",
            headers={"WWW-Authenticate": "Bearer"},
        ) from None


def _stands_behind(agent: Agent, token: JWTAccessTokenClaims) -> bool:
    return (
        agent.is_live(clock.now())
        and agent.id == token.get("agent_id")
        and agent.token_version == token.get("ver")
    )


def _challenge(status: int, error: str, description: str, **attributes: str) -> Problem:
    """A refusal as RFC 6750 §3 writes it."""
    parts = {"error": error, "error_description": description, **attributes}
    challenge = ", ".join(f'{name}="{value}"' for name, value in parts.items())
    return Problem(status, error, description, headers={"WWW-Authenticate": f"Bearer {challenge}"})
