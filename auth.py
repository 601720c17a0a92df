"""Who may call the management API: the admin token, access tokens (RFC 6750), and local mode."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from authlib.oauth2 import ResourceProtector
from authlib.oauth2.rfc6749 import MissingAuthorizationError, UnsupportedTokenTypeError
from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from authlib.oauth2.rfc9068.claims import JWTAccessTokenClaims
from flask import Flask, g, request
from joserfc import jwt
from joserfc.errors import JoseError
from sqlalchemy import bindparam
from werkzeug.middleware.proxy_fix import ProxyFix

import counters
import credentials
import events
import keys
from api import Problem, parse_authorization
from config import SettingError, Settings, check_admin_token, settings, state
from database import reading
from models import Agent, RevokedToken, SigningKey, is_active, now
from storage.files import copy_owner, sync_folder

log = logging.getLogger("lanyard")

ADMIN_SCOPE = "admin"
_INVALID = "The access token has expired, was revoked, is malformed or not for here, or its agent is off."
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_FORWARDING_HEADERS = re.compile(
    r"forwarded|via|x-forwarded.*|x-original-.*|x-real-ip|(x-)?(cluster-)?client-ip"
    r"|cf-connecting-ip|true-client-ip|fly-client-ip|x-envoy-external-address",
    re.IGNORECASE,
)


class ClaimsRegistry(JWTAccessTokenClaims.registry_cls):
    """joserfc's rules, but for `iat`."""

    def validate_iat(self, value: object) -> None:
        """Accept an `iat` in the future: the newest tokens have one after the clock was set back."""


class Claims(JWTAccessTokenClaims):
    """The claims of an access token."""

    registry_cls = ClaimsRegistry


class AccessTokenValidator(JWTBearerTokenValidator):
    """Validate a token as RFC 9068 §4 says, then that neither it nor its agent has been ended."""

    def __init__(self, issuer: str, resource_server: str | None) -> None:
        super().__init__(issuer, resource_server)
        # An agent sends the same token for an hour: a valid signature is remembered, an invalid one never.
        # All that can change about a token is read from the database each time, in validate_token.
        self._decode = lru_cache(maxsize=2048)(_decode)
        needed: Any = {name: {"essential": True} for name in ("exp", "iat", "sub", "jti", "client_id")}
        needed["iss"] = {"essential": True, "value": issuer}
        needed["aud"] = {"essential": True, "value": resource_server}
        self._needed = needed

    def authenticate_token(self, token_string: str) -> JWTAccessTokenClaims:
        """Return the claims of a token with a valid signature.

        :raises InvalidTokenError: when it is malformed or the signature is invalid.
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
        """Refuse a token that is expired, revoked, of another type or audience, or of an inactive agent."""
        # RFC 9068 §4: `typ` is required, which keeps other JWTs of this issuer out (RFC 8725 §3.11).
        if str(token.header.get("typ")).lower() not in ("at+jwt", "application/at+jwt"):
            raise InvalidTokenError()
        try:
            token.validate(now=int(now().timestamp()))
        except JoseError:
            raise InvalidTokenError() from None
        agent = _agent_of(token)
        if agent is None or not is_active(agent, now()):
            raise InvalidTokenError()
        # A scope that was taken from the agent no longer counts in tokens issued before.
        held = [scope for scope in token["scope"].split() if scope in agent.scopes]
        if self.scope_insufficient(held, scopes):
            raise InsufficientScopeError()
        token.agent, token.scopes = agent, held


def _decode(token_string: str) -> jwt.Token:
    # The key is ours by its `kid`; a `jwk` or `jku` in the header is never used (RFC 8725 §3.10).
    return jwt.decode(token_string, keys.find_key, registry=keys.SIGNING_ALGORITHMS)


# The agent of a token, unless the token, its grant, its version or its signing key has been ended.
_AGENT_OF_TOKEN = (
    sa.select(Agent)
    .join(SigningKey, SigningKey.kid == bindparam("kid"))
    .where(
        Agent.client_id == bindparam("client_id"),
        Agent.id == bindparam("agent_id"),
        Agent.token_version == bindparam("version"),
        ~sa.exists().where(RevokedToken.id.in_([bindparam("jti"), bindparam("grant")])),
    )
)


def _agent_of(token: JWTAccessTokenClaims) -> Any:
    jti = str(token["jti"])
    values = {"jti": jti, "grant": jti.partition(".")[0], "kid": token.header["kid"]}
    values |= {
        "client_id": token["client_id"],
        "agent_id": token.get("agent_id"),
        "version": token.get("ver"),
    }
    with reading() as connection:
        return connection.execute(_AGENT_OF_TOKEN, values).first()


@lru_cache(maxsize=16)
def _validator(issuer: str, audience: str | None) -> AccessTokenValidator:
    return AccessTokenValidator(issuer, audience)


@lru_cache(maxsize=16)
def _protector(issuer: str, audience: str) -> ResourceProtector:
    protector = ResourceProtector()
    protector.register_token_validator(_validator(issuer, audience))
    return protector


def require_agent() -> None:
    """Require an access token; put its agent in `g.agent`.

    :raises Problem: 401.
    """
    _require(None)
    events.set_caller(g.agent.id, g.agent.client_id)


def require_operator() -> None:
    """Require the admin token, or an access token with the scope `admin`.

    :raises Problem: 401 or 403.
    """
    if is_operator():
        events.set_caller(events.OPERATOR)
        return
    try:
        _require(ADMIN_SCOPE)
    except Problem as problem:
        if problem.status == 401 and "Authorization" in request.headers:
            events.record_failure(None)
        raise
    events.set_caller(g.agent.id, g.agent.client_id)


def inspect_token(token_string: str) -> tuple[dict[str, Any], Any] | None:
    """Return the claims of a valid access token, whatever its audience, and its agent; None for any other.

    `scope` in the claims holds what the agent still has of it.
    """
    validator = _validator(settings().issuer, None)
    try:
        token = validator.authenticate_token(token_string)
        validator.validate_token(token, None, None)
    except InvalidTokenError:
        return None
    return {**token, "scope": " ".join(token.scopes)}, token.agent


def is_admin() -> bool:
    """Whether the request's access token has the scope `admin`."""
    return ADMIN_SCOPE in g.scopes


def _require(scope: str | None) -> None:
    try:
        token = _protector(settings().issuer, settings().audience).validate_request(
            [scope] if scope else None, request
        )
        g.agent, g.scopes = token.agent, token.scopes
    except InvalidTokenError:
        counters.count_failure("access_token")
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
            headers={"WWW-Authenticate": f"Bearer {_resource_metadata()}"},
        ) from None


def _challenge(status: int, error: str, description: str, **attributes: str) -> Problem:
    """Return a refusal with the challenge of RFC 6750 §3."""
    parts = {"error": error, "error_description": description, **attributes}
    told = ", ".join(f'{name}="{value}"' for name, value in parts.items())
    return Problem(
        status, error, description, headers={"WWW-Authenticate": f"Bearer {told}, {_resource_metadata()}"}
    )


def _resource_metadata() -> str:
    # RFC 9728 §5.1: from there a client finds the authorization server by itself.
    return f'resource_metadata="{settings().url("/.well-known/oauth-protected-resource")}"'


def init_app(app: Flask, settings: Settings, *, serving: bool) -> None:
    """Read the admin token, trust the configured proxies, and guard local mode."""
    state(app).admin_token = (
        GivenToken(settings.admin_token) if settings.admin_token else KeptToken(settings, serving=serving)
    )
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    if settings.local:
        app.before_request(_refuse_foreign_requests)


def admin_token_file(settings: Settings) -> Path:
    """Return the file that holds the admin token when LANYARD_ADMIN_TOKEN is unset."""
    return settings.instance / "admin_token"


def is_operator() -> bool:
    """Whether the request has the admin token, or comes without credentials in local mode."""
    if "Authorization" not in request.headers:
        return settings().local
    return carries_admin_token()


def carries_admin_token() -> bool:
    """Whether the request carries the admin token, as Bearer or as the password of `admin`."""
    authorization = parse_authorization(request.headers.get("Authorization", ""))
    if authorization is None:
        return False
    if authorization.type == "bearer":
        return _is_admin_token(authorization.token or "")
    if authorization.type == "basic":
        return authorization.username == "admin" and _is_admin_token(authorization.password or "")
    return False


def _is_admin_token(text: str) -> bool:
    right = state().admin_token.now()
    is_right = right is not None and credentials.same(text, right)
    # An agent's access token that has expired is no guess at the admin token.
    if text.startswith("eyJ"):
        return is_right
    guess = credentials.Guess("admin", known=True)
    guess.refuse_if_throttled()
    if not is_right:
        counters.count_failure("admin_token")
        guess.failed()
    return is_right


class GivenToken:
    """The admin token of LANYARD_ADMIN_TOKEN."""

    def __init__(self, token: str) -> None:
        self._token = token

    def now(self) -> str:
        return self._token


class KeptToken:
    """The admin token in the instance's file, read again in every process when the file changes.

    :raises SettingError: at the start, when the file holds no valid token.
    """

    def __init__(self, settings: Settings, *, serving: bool) -> None:
        self._path = admin_token_file(settings)
        # A command may have another folder than the server, when the database is not in it.
        self._read: tuple[object, str | None] = (None, None)
        if serving:
            _ensure_admin_token(self._path)
            self._read = (self._stamp(), read_admin_token(self._path))

    def now(self) -> str | None:
        """Return the admin token, or None (matches nothing) while the file is missing or invalid."""
        stamp = self._stamp()
        # The stamp is older than what is read: a change between the two is read the next time.
        if stamp != self._read[0]:
            self._read = (stamp, self._read_again())
        return self._read[1]

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read_again(self) -> str | None:
        try:
            return read_admin_token(self._path)
        except (OSError, ValueError, SettingError) as error:
            log.warning("Nobody is the operator until the admin token can be read: %s", error)
            return None


def rotate_admin_token(path: Path) -> None:
    """Write a new admin token into the file; the old one is refused from the next request on."""
    draft = _draft_admin_token(path)
    copy_owner(path, draft)
    os.replace(draft, path)
    sync_folder(path.parent)


def read_admin_token(path: Path) -> str:
    """Return the admin token in the file.

    :raises SettingError: when it is not valid.
    """
    return check_admin_token(path.read_text().strip(), f"The admin token in {path}")


def _ensure_admin_token(path: Path) -> None:
    """Make the admin token on the first start; no other process sees the file half written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        draft = _draft_admin_token(path)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was first: its token counts
        finally:
            os.unlink(draft)
    os.chmod(path, 0o600)


def _draft_admin_token(path: Path) -> Path:
    draft = path.with_name(f".admin_token.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(credentials.new_admin_token() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return draft


def _refuse_foreign_requests() -> None:
    """Refuse what does not come from this machine's own clients: local mode asks for no credentials.

    A web page that the operator visits must be refused too: it sends its Origin, the Host that it had
    resolved to this machine (DNS rebinding), or a body type that needs no preflight.

    :raises Problem: 403.
    """
    if not _is_loopback(request.environ.get("REMOTE_ADDR", "")):
        _refuse("a request from another machine")
    host = request.environ.get("HTTP_HOST", "")
    if not _LOCAL_HOST.fullmatch(host):
        _refuse("a Host other than localhost")
    if any(_FORWARDING_HEADERS.fullmatch(name) for name, _ in request.headers):
        _refuse("a forwarded request")
    origin = request.headers.get("Origin")
    same_site = request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    if not same_site or (origin is not None and origin.lower() != f"http://{host}".lower()):
        _refuse("a page of another site")
    if request.path.startswith("/api/") and _has_body() and request.mimetype != "application/json":
        _refuse("a body other than application/json: send it with that Content-Type")


def _refuse(what: str) -> None:
    raise Problem(403, "forbidden", f"Local mode does not answer {what}.")


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _has_body() -> bool:
    return bool(request.content_length) or "Transfer-Encoding" in request.headers
