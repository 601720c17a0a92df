"""The OAuth endpoints on Authlib: token, refresh, introspection, revocation, server metadata, JWKS."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2 import OAuth2Error
from authlib.oauth2.rfc6749 import (
    InvalidGrantError,
    InvalidRequestError,
    InvalidScopeError,
    OAuth2Request,
    UnsupportedGrantTypeError,
    grants,
)
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7662 import IntrospectionEndpoint
from flask import Flask, Response, g, request

import auth
import client_auth
import credentials
import events
import keys
import oauth_schemas
import tokens
from api import BY_ANY, BY_CLIENT, Blueprint, cached_response, canonical, read_parameters
from config import Settings, settings, state
from database import writing

METADATA_MAX_AGE = 3600  # seconds

# The parameters to read; others are ignored (RFC 6749 §3.2).
_PARAMETERS = {*oauth_schemas.TokenRequest().fields, *oauth_schemas.TokenParameter().fields}
_NEVER_IN_QUERY = ("client_id", "client_secret", "client_assertion", "refresh_token", "token")

bp = Blueprint("oauth", __name__, description="Tokens", security=BY_CLIENT)

_BAD_TARGET = "The resource is not one of this agent's audiences."
_GRANT_ERRORS_TYPE = "The grant types here are client_credentials and refresh_token."
# Examples for the OpenAPI document.
_GRANT_ERRORS = {
    "invalid_grant": "The refresh token is unknown, expired, revoked or already used.",
    "invalid_scope": "The scope asks for more than this agent has.",
    "invalid_target": _BAD_TARGET,
    "unsupported_grant_type": _GRANT_ERRORS_TYPE,
}
_CLIENT_ERRORS = {"invalid_client": "Client authentication failed: check client_id and client_secret."}
_CALLER_ERRORS = {
    **_CLIENT_ERRORS,
    "invalid_token": "The access token has expired, was revoked or is malformed.",
}


@bp.post("/oauth/token")
@bp.form(oauth_schemas.TokenRequest, oauth_schemas.Token)
@bp.errors(400, invalid_request="Send grant_type: client_credentials or refresh_token.", **_GRANT_ERRORS)
@bp.errors(401, **_CLIENT_ERRORS)
def token() -> Any:
    """Exchange client credentials or a refresh token for an access token.

    ---
    The steps of a token request:

    1. `TokenRequest` reads the parameters (`api.read_parameters`).
    2. `Server.get_token_grant` chooses `ClientCredentialsGrant` or `RefreshTokenGrant` by `grant_type`.
    3. The grant's `validate_token_request` authenticates the client (`client_auth.authenticate`) or finds
       it by its refresh token (`tokens.use_refresh_token`), then checks scope and audiences.
    4. The grant's `create_token_response` makes the tokens (`tokens.TokenGenerator`, `keys.signing_key`).
    5. `tokens.start_family` or `tokens.rotate_family` writes the refresh token, the usage and the event in
       one transaction, before the response.
    """
    return state().oauth_server.create_token_response(TokenRequest())


@bp.post("/oauth/refresh")
@bp.form(oauth_schemas.RefreshRequest, oauth_schemas.Token)
@bp.errors(400, invalid_request="Send refresh_token.", **_GRANT_ERRORS)
@bp.errors(401, **_CLIENT_ERRORS)
def refresh() -> Any:
    """Exchange a refresh token for new tokens, without naming the grant type."""
    token_request = TokenRequest()
    if token_request.form.setdefault("grant_type", "refresh_token") != "refresh_token":
        raise OAuth2Error(_GRANT_ERRORS_TYPE, error="unsupported_grant_type")
    return state().oauth_server.create_token_response(token_request)


@bp.post("/oauth/introspect")
@bp.doc(security=BY_ANY)
@bp.form(oauth_schemas.TokenParameter, oauth_schemas.Introspected)
@bp.errors(400, invalid_request="Send token.")
@bp.errors(401, **_CALLER_ERRORS)
def introspect() -> Any:
    """Introspect a token (RFC 7662)."""
    return state().oauth_server.create_endpoint_response("introspection", TokenRequest())


@bp.post("/oauth/revoke")
@bp.doc(security=BY_ANY)
@bp.form(oauth_schemas.TokenParameter, oauth_schemas.Revoked)
@bp.errors(400, invalid_request="Send token.", invalid_grant="The token is another agent's.")
@bp.errors(401, **_CALLER_ERRORS)
def revoke() -> Any:
    """Revoke a token (RFC 7009)."""
    return state().oauth_server.create_endpoint_response("revocation", TokenRequest())


@bp.get("/oauth/authorize")
@bp.doc(security=[])
@bp.errors(400, unsupported_response_type="Lanyard has no authorization endpoint.")
def authorize() -> Response:
    """Refuse every authorization request: agents act for themselves."""
    text = "Lanyard has no authorization endpoint: use client_credentials at the token endpoint."
    raise OAuth2Error(text, error="unsupported_response_type")


def init_app(app: Flask, settings: Settings) -> None:
    """Set up the authorization server."""
    server = Server(app)
    server.register_token_generator("default", tokens.TokenGenerator(settings))
    server.register_grant(ClientCredentialsGrant)
    server.register_grant(RefreshTokenGrant)
    server.register_endpoint(Introspection)
    server.register_endpoint(Revocation)
    state(app).oauth_server = server
    issuer_path = urlsplit(settings.issuer).path.rstrip("/")
    if issuer_path:  # RFC 8414 §3.1: such an issuer has its metadata at another path
        for name, view in (
            ("oauth-authorization-server", authorization_server),
            ("openid-configuration", authorization_server),
            ("oauth-protected-resource", protected_resource),
        ):
            path = name + issuer_path
            app.add_url_rule(f"/.well-known/{path}", path, view)


class TokenRequest(OAuth2Request):
    """Authlib's request, with the parameters of a form or JSON body."""

    def __init__(self) -> None:
        # Authlib refuses plain http by this address; behind a proxy only the issuer has the right scheme.
        super().__init__(request.method, settings().issuer, headers=request.headers)
        for name in _NEVER_IN_QUERY if request.query_string else ():
            if name in request.args:
                raise InvalidRequestError(f"Send {name} in the body, never in the URL.")
        parameters = read_parameters(_PARAMETERS)
        # RFC 6749 §3.3 separates scopes by one space, clients and people by more.
        scope = " ".join(parameters.pop("scope", "").split())
        self.payload = BasicOAuth2Payload(parameters | ({"scope": scope} if scope else {}))

    @property
    def form(self) -> Any:
        """The parameters, as Authlib's classes read them."""
        return self.payload.data


class Server(AuthorizationServer):
    """Authlib's server with Lanyard's client authentication and error texts."""

    def create_oauth2_request(self, request: TokenRequest) -> TokenRequest:
        return request

    def get_token_grant(self, request: TokenRequest) -> Any:
        if not request.payload.grant_type:
            raise InvalidRequestError("Send grant_type: client_credentials or refresh_token.")
        try:
            return super().get_token_grant(request)
        except UnsupportedGrantTypeError:  # its text repeats the caller's
            raise OAuth2Error(_GRANT_ERRORS_TYPE, error="unsupported_grant_type") from None

    def authenticate_client(
        self, request: OAuth2Request, methods: list[str], endpoint: str = "token"
    ) -> client_auth.Client:
        return client_auth.authenticate(request)

    def handle_response(self, status: int, body: Any, headers: list[tuple[str, str]]) -> Any:
        return body, status, headers

    def handle_error_response(self, request: OAuth2Request, error: OAuth2Error) -> Response:
        raise error  # to the app's error handler


class ClientCredentialsGrant(grants.ClientCredentialsGrant):
    """RFC 6749 §4.4; a refresh token comes with the access token."""

    def validate_token_request(self) -> None:
        """Authenticate the client and check scope and audiences (RFC 8707)."""
        super().validate_token_request()
        requested = _requested_audiences(self.request)
        if not set(map(canonical, requested)) <= client_auth.allowed_audiences(self.client.row):
            raise OAuth2Error(_BAD_TARGET, error="invalid_target")
        self.client.audiences = requested or [settings().audience]

    def create_token_response(self) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Issue and store the tokens. (Authlib's method would write them to its debug log.)"""
        token = self.generate_token(scope=self.request.payload.scope)
        tokens.start_family(self.client, token)
        events.TOKENS_ISSUED.inc()
        return 200, token, self.TOKEN_RESPONSE_HEADER


class RefreshTokenGrant(grants.RefreshTokenGrant):
    """RFC 6749 §6 with rotation. Client credentials are optional, and checked when sent."""

    def validate_token_request(self) -> None:
        """Find the client by its refresh token and check scope and audiences."""
        text = self.request.form.get("refresh_token")
        if not text:
            raise InvalidRequestError("Send refresh_token.")
        client_id = self.request.form.get("client_id")
        is_authenticated = client_auth.carries_credentials(self.request)
        if is_authenticated:
            client_id = client_auth.authenticate(self.request).get_client_id()
        client = tokens.use_refresh_token(text, is_authenticated)
        if client_id not in (None, client.get_client_id()):
            raise InvalidGrantError("The refresh token belongs to another client.")
        events.set_caller(client.row.id, client.row.client_id)
        self.request.client = client
        self.scope = self._narrowed_scope()
        client.audiences = self._narrowed_audiences()

    def create_token_response(self) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Issue the tokens and replace the refresh token."""
        token = self.generate_token(scope=self.scope)
        tokens.rotate_family(self.client, token)
        events.TOKENS_REFRESHED.inc()
        return 200, token, self.TOKEN_RESPONSE_HEADER

    def _narrowed_scope(self) -> str:
        granted = self.client.granted_scopes
        scope = self.request.payload.scope
        requested = list(dict.fromkeys(scope.split() if scope else granted))
        if self.client.row.family_scopes and not granted:
            raise InvalidScopeError("This agent has lost every scope that the refresh token was given.")
        if missing := [name for name in requested if name not in granted]:
            text = f"The refresh token was not given the scope: {client_auth.quotable(missing)}."
            raise InvalidScopeError(text)
        return " ".join(requested)

    def _narrowed_audiences(self) -> list[str]:
        # RFC 8707 §2.2: the granted audiences, or fewer.
        granted = self.client.granted_audiences
        requested = _requested_audiences(self.request) or granted
        if not requested or not set(map(canonical, requested)) <= set(map(canonical, granted)):
            text = "The resource is not one that the refresh token was given and the agent still has."
            raise OAuth2Error(text, error="invalid_target")
        return requested


def _requested_audiences(request: OAuth2Request) -> list[str]:
    """Return the audiences in the spelling that was asked for, without repeats."""
    issuer, audience = canonical(settings().issuer), canonical(settings().audience)
    asked: dict[str, str] = {}
    for name in request.form.get("resource", ()):
        # The issuer, which identifies this server in RFC 9728, is accepted in place of its audience.
        if canonical(name) == issuer != audience:
            name = settings().audience
        asked.setdefault(canonical(name), name)
    return list(asked.values())


class ValidToken(NamedTuple):
    """A token that is valid now."""

    claims: dict[str, Any]  # RFC 7662 §2.2
    agent: Any  # the agent's row, or the Client of a refresh token


class _TokenEndpoint:
    query_token: Any

    def authenticate_endpoint_client(self, request: OAuth2Request) -> str | None:
        """Return the calling agent's client id, or None for the operator.

        :raises AuthenticationFailed: for any other caller.
        """
        if auth.carries_admin_token():
            events.set_caller(events.OPERATOR)
            client_id = None
        elif request.headers.get("Authorization", "")[:7].lower() == "bearer ":
            auth.require_agent()
            client_id = None if auth.ADMIN_SCOPE in g.scopes else g.agent.client_id
        else:
            return client_auth.authenticate(request).get_client_id()
        if {"client_secret", "client_assertion"} & set(request.form):
            raise InvalidRequestError("Send credentials one way: in the header or in the body.")
        return client_id

    def authenticate_token(self, request: OAuth2Request, client_id: str | None) -> ValidToken | None:
        """Return the token if it is valid. Its type shows in its text: no hint is needed (RFC 7009 §2.1)."""
        if not request.form.get("token"):
            raise InvalidRequestError("Send token.")
        token: ValidToken | None = self.query_token(request.form["token"])
        return token


class Introspection(_TokenEndpoint, IntrospectionEndpoint):
    """RFC 7662. Any agent may introspect any token: it may be a resource server."""

    def query_token(self, text: str) -> ValidToken | None:
        """Return the token without the audiences that its agent has lost, or None when none is left."""
        if text.startswith("rt_"):
            return _refresh_token(text)
        token = _access_token(text)
        if token is None:
            return None
        aud = token.claims["aud"]
        allowed = client_auth.allowed_audiences(token.agent)
        left = [name for name in ([aud] if isinstance(aud, str) else aud) if canonical(name) in allowed]
        return token._replace(claims={**token.claims, "aud": _aud(left)}) if left else None

    def create_introspection_payload(self, token: ValidToken | None) -> dict[str, Any]:
        return {"active": True, **token.claims} if token else {"active": False}


class Revocation(_TokenEndpoint, RevocationEndpoint):
    """RFC 7009. A refresh token's family is revoked with it."""

    def authenticate_token(self, request: OAuth2Request, client_id: str | None) -> ValidToken | None:
        """Return the token if it is valid.

        :raises InvalidGrantError: when it is another agent's.
        """
        token = super().authenticate_token(request, client_id)
        if token and client_id not in (None, token.claims["client_id"]):
            raise InvalidGrantError("The token is another agent's: only its own may be revoked.")
        return token

    def query_token(self, text: str) -> ValidToken | None:
        """Return the token; any refresh token of a valid family will do, used ones too."""
        client = tokens.find_by_refresh_token(text)
        return ValidToken({"client_id": client.get_client_id()}, client) if client else _access_token(text)

    def revoke_token(self, token: ValidToken, request: OAuth2Request) -> None:
        """Revoke the token, in every worker, before the response."""
        if isinstance(token.agent, client_auth.Client):
            if tokens.end_family(token.agent, "token.revoked"):
                events.TOKENS_REVOKED.inc()
            return
        with writing(exclusive=False, reserve=events.reserve_share()) as connection:
            expires_at = datetime.fromtimestamp(token.claims["exp"], UTC)
            tokens.revoke(connection, token.claims["jti"], expires_at)
            events.record(connection, "token.revoked", token.agent, token="access")
        events.TOKENS_REVOKED.inc()


def _aud(audiences: list[str]) -> str | list[str]:
    """Return the claim `aud` (RFC 7519 §4.1.3)."""
    return audiences[0] if len(audiences) == 1 else audiences


def _access_token(text: str) -> ValidToken | None:
    verified = auth.inspect_token(text)
    if verified is None:
        return None
    claims, agent = verified
    names = ("scope", "client_id", "sub", "aud", "iss", "exp", "iat", "jti", "agent_id")
    return ValidToken({name: claims[name] for name in names} | {"token_type": "Bearer"}, agent)


def _refresh_token(text: str) -> ValidToken | None:
    client = tokens.inspect_refresh_token(text)
    if client is None:
        return None
    row = client.row
    scopes, audiences = client.granted_scopes, client.granted_audiences
    if not audiences or (row.family_scopes and not scopes):
        return None
    return ValidToken(
        {
            "scope": " ".join(scopes),
            "client_id": row.client_id,
            "sub": row.client_id,
            "aud": _aud(audiences),
            "iss": settings().issuer,
            "exp": int(row.family_expires_at.timestamp()),
            "iat": int(row.family_issued_at.timestamp()),
            "jti": credentials.grant_id(row.family_id),
            "agent_id": row.id,
            "token_type": "refresh_token",
        },
        client,
    )


well_known_bp = Blueprint("well_known", __name__, description="Discovery")


@well_known_bp.get("/.well-known/oauth-authorization-server")
@well_known_bp.get("/.well-known/openid-configuration", endpoint="openid_configuration")
@well_known_bp.cached({"type": "object", "description": "RFC 8414 §2"})
def authorization_server() -> Response:
    """Get the authorization server's metadata (RFC 8414).

    Many clients look for it only at the path of OpenID Connect.
    """
    document = _metadata(settings())
    if request.url_rule and "openid-configuration" in request.url_rule.rule:
        # OpenID Connect Discovery §3: strict clients refuse the document without these.
        signing = {"id_token_signing_alg_values_supported": [settings().signing_alg]}
        document |= {"subject_types_supported": ["public"], **signing}
    return cached_response(json.dumps(document).encode(), METADATA_MAX_AGE)


@well_known_bp.get("/.well-known/oauth-protected-resource")
@well_known_bp.cached({"type": "object", "description": "RFC 9728 §2"})
def protected_resource() -> Response:
    """Get the metadata of Lanyard's own API (RFC 9728): which server issues its tokens."""
    document = {
        "resource": settings().issuer,
        "resource_name": "Lanyard",
        "authorization_servers": [settings().issuer],
        "jwks_uri": settings().url("/.well-known/jwks.json"),
        "scopes_supported": [auth.ADMIN_SCOPE],
        "bearer_methods_supported": ["header"],
    }
    return cached_response(json.dumps(document).encode(), METADATA_MAX_AGE)


@well_known_bp.get("/.well-known/jwks.json")
@well_known_bp.cached({"type": "object", "description": "RFC 7517 §5"})
@well_known_bp.errors(503)
def jwks() -> Response:
    """Get the public keys that verify access tokens (RFC 7517 §5)."""
    return cached_response(keys.published(), keys.JWKS_MAX_AGE)


def _metadata(settings: Settings) -> dict[str, Any]:
    algorithms = list(client_auth.ASSERTION_ALGORITHMS.allowed or ())
    document: dict[str, Any] = {
        "issuer": settings.issuer,
        # Refuses every request, but clients reject metadata without it.
        "authorization_endpoint": settings.url("/oauth/authorize"),
        "token_endpoint": settings.url("/oauth/token"),
        "jwks_uri": settings.url("/.well-known/jwks.json"),
        "introspection_endpoint": settings.url("/oauth/introspect"),
        "revocation_endpoint": settings.url("/oauth/revoke"),
        "response_types_supported": ["none"],  # RFC 8414 §2 requires it, §3.2 forbids an empty list
        "grant_types_supported": ["client_credentials", "refresh_token"],
    }
    for endpoint in ("token", "introspection", "revocation"):
        document[f"{endpoint}_endpoint_auth_methods_supported"] = list(client_auth.AUTH_METHODS)
        document[f"{endpoint}_endpoint_auth_signing_alg_values_supported"] = algorithms
    document["introspection_endpoint_auth_methods_supported"].append("Bearer")
    return document
