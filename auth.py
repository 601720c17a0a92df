"""Guard the management API: the admin token, access tokens (RFC 6750), local mode."""

from __future__ import annotations

import logging
import re
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from authlib.oauth2 import ResourceProtector
from authlib.oauth2.rfc6749 import MissingAuthorizationError, UnsupportedTokenTypeError
from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from authlib.oauth2.rfc9068.claims import JWTAccessTokenClaims
from flask import Flask, g, request
from joserfc.errors import ExpiredTokenError, JoseError
from sqlalchemy import bindparam
from werkzeug.middleware.proxy_fix import ProxyFix

import credentials
import events
import keys
from api import Problem, canonical, parse_authorization
from config import SettingError, Settings, check_admin_token, settings
from database import reading
from models import Agent, RevokedToken, SigningKey, Timestamp, is_active, now
from storage.files import copy_owner, keep_private, make_folder, whole_file

log = logging.getLogger("lanyard")

ADMIN_SCOPE = "admin"
_NOT_OURS = "The access token is malformed or of another server."
_NO_ADMIN_TOKEN = "The token is neither the admin token nor an access token of this server."
_WRONG_BASIC = "The user or the admin token is wrong: Basic takes the user admin, with the token as password."
_NO_TOKEN = (
    "Send Authorization: Bearer with an access token; the management API takes the admin token,"
    " also as Basic with the user admin."
)
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.%]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")
_FORWARDING_HEADERS = re.compile(
    r"forwarded|via|x-forwarded.*|x-original-.*|x-real-ip|(x-)?(cluster-)?client-ip"
    r"|cf-connecting-ip|true-client-ip|fly-client-ip|x-envoy-external-address",
    re.IGNORECASE,
)


class Claims(JWTAccessTokenClaims):
    """The claims of an access token, by Authlib's rules but for `iat`."""

    class registry_cls(JWTAccessTokenClaims.registry_cls):
        def validate_iat(self, value: object) -> None:
            """Accept an `iat` in the future: the newest tokens have one after the clock was set back."""


class AccessTokenValidator(JWTBearerTokenValidator):
    """Validate a token as RFC 9068 §4 says, and refuse it once the token or its agent has been ended."""

    def authenticate_token(self, token_string: str) -> JWTAccessTokenClaims:
        """Return the claims of a token, after a check of its signature."""
        try:
            token = keys.verify(token_string)
        except (JoseError, ValueError, TypeError):
            # joserfc lets the latter two through for headers that no signer would write.
            raise InvalidTokenError(_NOT_OURS) from None
        options: Any = {name: {"essential": True} for name in ("exp", "iat", "sub", "jti", "client_id")}
        options["iss"] = {"essential": True, "value": self.issuer}
        options["aud"] = {"essential": True}
        return Claims(token.claims, token.header, options)

    def validate_token(
        self, token: JWTAccessTokenClaims, scopes: list[str] | None, request: Any, **kwargs: Any
    ) -> None:
        """Refuse a token that is expired, revoked, of another type or audience, or of an inactive agent."""
        # RFC 9068 §4: `typ` is required, which keeps other JWTs of this issuer out (RFC 8725 §3.11).
        if str(token.header.get("typ")).lower() not in ("at+jwt", "application/at+jwt"):
            raise InvalidTokenError("This is not an access token.")
        try:
            token.validate(now=int(now().timestamp()))
        except ExpiredTokenError:
            raise InvalidTokenError("The access token has expired.") from None
        except JoseError:
            raise InvalidTokenError("The access token is of another issuer.") from None
        aud = token["aud"] if isinstance(token["aud"], list) else [token["aud"]]
        if self.resource_server and canonical(self.resource_server) not in map(canonical, aud):
            raise InvalidTokenError("The access token is for another audience.")
        agent = _find_agent(token)
        if agent is None:
            raise InvalidTokenError(_why_ended(token))
        # A scope that was taken from the agent no longer counts in tokens issued before.
        valid_scopes = [scope for scope in token["scope"].split() if scope in agent.scopes]
        if self.scope_insufficient(valid_scopes, scopes):
            raise InsufficientScopeError()
        token.agent, token.scopes = agent, valid_scopes


_NOW: Any = bindparam("now", type_=Timestamp)
# The agent of a token, unless the agent, the token, its grant, its version or its signing key has ended.
_AGENT_OF_TOKEN = (
    sa.select(Agent)
    .join(SigningKey, SigningKey.kid == bindparam("kid"))
    .where(
        Agent.client_id == bindparam("client_id"),
        Agent.id == bindparam("agent_id"),
        Agent.token_version == bindparam("version"),
        Agent.active(_NOW),
        ~sa.exists().where(RevokedToken.id.in_([bindparam("jti"), bindparam("grant")])),
    )
)


def _find_agent(token: JWTAccessTokenClaims) -> Any:
    jti = str(token["jti"])
    values = {
        "jti": jti,
        "grant": jti.partition(".")[0],
        "kid": token.header["kid"],
        "client_id": token["client_id"],
        "agent_id": token.get("agent_id"),
        "version": token.get("ver"),
        "now": now(),
    }
    with reading() as connection:
        return connection.execute(_AGENT_OF_TOKEN, values).first()


def _why_ended(token: JWTAccessTokenClaims) -> str:
    with reading() as connection:
        agent = connection.execute(sa.select(Agent).where(Agent.id == token.get("agent_id"))).first()
    if agent is None:
        return "The agent of the access token was deleted."
    if not is_active(agent, now()):
        return "The agent of the access token is deactivated or expired."
    return "The access token was revoked."


def require_agent() -> None:
    """Require an access token; put its agent in `g.agent`.

    :raises Problem: 401.
    """
    _require(None)


def require_operator() -> None:
    """Require the admin token, an access token with the scope `admin`, or in local mode no credentials.

    :raises Problem: 401, 403 or 429.
    """
    is_open = settings().local and "Authorization" not in request.headers
    if is_open or carries_admin_token():
        events.set_caller(events.OPERATOR)
        return
    try:
        _require(ADMIN_SCOPE)
    except Problem as problem:
        if problem.status == 401 and "Authorization" in request.headers:
            events.record_failure("operator")
        raise


def inspect_token(token_string: str) -> tuple[dict[str, Any], Any] | None:
    """Return the claims of a valid access token, whatever its audience, and its agent; None for any other.

    `scope` in the claims leaves out what the agent has lost since.
    """
    validator = AccessTokenValidator(settings().issuer, None)
    try:
        token = validator.authenticate_token(token_string)
        validator.validate_token(token, None, None)
    except InvalidTokenError:
        return None
    return {**token, "scope": " ".join(token.scopes)}, token.agent


def _require(scope: str | None) -> None:
    protector = ResourceProtector()
    protector.register_token_validator(AccessTokenValidator(settings().issuer, settings().audience))
    try:
        token = protector.validate_request([scope] if scope else None, request)
        g.agent, g.scopes = token.agent, token.scopes
        events.set_caller(g.agent.id, g.agent.client_id)
    except InvalidTokenError as error:
        events.count_failure("access_token")
        text = _NO_ADMIN_TOKEN if scope and error.description == _NOT_OURS else error.description
        raise _challenge(401, "invalid_token", text) from None
    except InsufficientScopeError:
        text = f"This needs an access token with the scope {scope}."
        raise _challenge(403, "insufficient_scope", text, scope=str(scope)) from None
    except (MissingAuthorizationError, UnsupportedTokenTypeError) as error:
        scheme = request.headers.get("Authorization", "").strip().lower()
        if scheme == "bearer":
            raise _challenge(401, "invalid_token", _NOT_OURS) from error
        # RFC 6750 §3.1: the challenge to a request without a token has no error code.
        challenge = f"Bearer {_resource_metadata()}"
        if scope and scheme.startswith("basic "):
            challenges = {"WWW-Authenticate": f'{challenge}, Basic realm="lanyard"'}
            raise Problem(401, "unauthorized", _WRONG_BASIC, headers=challenges) from None
        raise Problem(401, "unauthorized", _NO_TOKEN, headers={"WWW-Authenticate": challenge}) from None


def _challenge(status: int, error: str, description: str, **attributes: str) -> Problem:
    """Return a refusal with the challenge of RFC 6750 §3."""
    attributes = {"error": error, "error_description": description, **attributes}
    parts = [*(f'{name}="{value}"' for name, value in attributes.items()), _resource_metadata()]
    return Problem(status, error, description, headers={"WWW-Authenticate": f"Bearer {', '.join(parts)}"})


def _resource_metadata() -> str:
    # RFC 9728 §5.1: this document names the authorization server.
    return f'resource_metadata="{settings().url("/.well-known/oauth-protected-resource")}"'


def init_app(app: Flask, settings: Settings) -> None:
    """Trust the configured proxies, and guard local mode."""
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        fixed = ProxyFix(partial(_with_address, app.wsgi_app), x_for=hops, x_proto=hops, x_host=hops)
        app.wsgi_app = fixed  # type: ignore[method-assign]
    if settings.local:
        app.before_request(_refuse_foreign_requests)


def _with_address(wsgi_app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """Reduce what a proxy forwarded to an IP address: some append a port (Azure, IIS)."""
    forwarded = environ["REMOTE_ADDR"].strip()
    if match := _WITH_PORT.fullmatch(forwarded):
        forwarded = match[1] or match[2]
    # What is no address counts as the proxy's.
    proxy = environ["werkzeug.proxy_fix.orig"]["REMOTE_ADDR"]
    environ["REMOTE_ADDR"] = str(credentials.parse_address(forwarded) or proxy)
    return wsgi_app(environ, start_response)


def carries_admin_token() -> bool:
    """Whether the request carries the admin token, as Bearer or as the password of `admin`.

    :raises Throttled: when too many wrong ones have come from the caller's address.
    """
    sent = parse_authorization(request.headers.get("Authorization", ""))
    if sent is not None and sent.type == "bearer":
        return _check_admin_token(sent.token or "")
    if sent is not None and sent.type == "basic" and sent.username == "admin":
        return _check_admin_token(sent.password or "")
    return False


def is_admin_token(text: str) -> bool:
    """Whether the text is the admin token; counts no guess."""
    expected = _admin_token()
    return expected is not None and credentials.same(text, expected)


def _check_admin_token(text: str) -> bool:
    is_right = is_admin_token(text)
    is_token = text.startswith("eyJ")
    if is_token and not is_right and _is_signed(text):
        return False  # no guess, even if it has expired
    # Apart, so that an agent with a token of a deleted key does not lock out the operator.
    name = "token" if is_token else "admin"
    try:
        credentials.throttle(lambda: is_right, name, known=True)
    except credentials.Throttled as error:
        events.count_failure(error.reason)
        raise
    if not is_right:
        events.count_failure("access_token" if is_token else "admin_token")
    return is_right


def _is_signed(text: str) -> bool:
    """Whether one of the keys has signed this text."""
    with suppress(InvalidTokenError):
        AccessTokenValidator(settings().issuer, None).authenticate_token(text)
        return True
    return False


def admin_token_file(settings: Settings) -> Path:
    """Return the file that holds the admin token when LANYARD_ADMIN_TOKEN is unset."""
    return settings.instance / "admin_token"


def read_admin_token(path: Path) -> str:
    """Return the admin token in the file.

    :raises SettingError: when it is not valid.
    """
    return check_admin_token(path.read_text().strip(), f"The admin token in {path}")


def _admin_token() -> str | None:
    """Return the admin token, or None (matches nothing) while its file is missing or invalid."""
    if settings().admin_token:
        return settings().admin_token
    try:
        return read_admin_token(admin_token_file(settings()))
    except (OSError, ValueError, SettingError) as error:
        log.warning("Every admin token is refused until the file can be read: %s", error)
        return None


def write_admin_token(path: Path) -> None:
    """Write a new admin token into the file; the old one is refused from the next request on."""
    with whole_file(path) as draft:
        copy_owner(path if path.exists() else path.parent, draft)
        draft.write_text(secrets.token_urlsafe(32) + "\n")


def ensure_admin_token(settings: Settings) -> None:
    """Make the admin token on the first start, while no other process starts.

    :raises SettingError: when its file holds no valid token.
    """
    if settings.admin_token:
        return
    path = admin_token_file(settings)
    make_folder(path.parent)
    if not path.exists() and not path.is_symlink():
        write_admin_token(path)
    keep_private(path)
    read_admin_token(path)


def _refuse_foreign_requests() -> None:
    """Refuse requests of other machines and sites: local mode asks for no credentials.

    A page of another site, open in the operator's browser, sends its Origin, a Host that it has resolved
    to this machine (DNS rebinding), or a body type that needs no preflight.

    :raises Problem: 403.
    """
    address = credentials.parse_address(request.environ.get("REMOTE_ADDR", ""))
    host = request.environ.get("HTTP_HOST", "")
    same_origin = request.headers.get("Origin", f"http://{host}").lower() == f"http://{host}".lower()
    same_site = request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    has_body = bool(request.content_length) or "Transfer-Encoding" in request.headers
    is_typed = request.mimetype == "application/json" or not request.path.startswith("/api/")
    for is_refused, what in (
        (address is None or not address.is_loopback, "a request from another machine"),
        (not _LOCAL_HOST.fullmatch(host), "a Host other than localhost"),
        (any(_FORWARDING_HEADERS.fullmatch(name) for name, _ in request.headers), "a forwarded request"),
        (not same_origin or not same_site, "a page of another site"),
        (has_body and not is_typed, "a body without Content-Type: application/json"),
    ):
        if is_refused:
            raise Problem(403, "forbidden", f"Local mode does not answer {what}.")
