"""The OAuth endpoints on Authlib: token, refresh, introspection, revocation, server metadata, JWKS."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2 import OAuth2Error
from authlib.oauth2.rfc6749 import (
    InvalidGrantError,
    InvalidRequestError,
    InvalidScopeError,
    OAuth2Request,
    TokenMixin,
    UnsupportedGrantTypeError,
    grants,
)
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7662 import IntrospectionEndpoint
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from flask import Flask, Request, Response, g, jsonify, request

import auth
import client_auth
import credentials
import events
import keys
import oauth_schemas
import tokens
from api import BY_ANY, BY_CLIENT, Blueprint, cached_response, is_text, parse_json
from config import Settings, settings, state
from database import writing

METADATA_MAX_AGE = 3600  # seconds

# Read by Lanyard; any other parameter is ignored (RFC 6749 §3.2).
_PARAMETERS = (
    "grant_type",
    "client_id",
    "client_secret",
    "client_assertion",
    "client_assertion_type",
    "scope",
    "refresh_token",
    "token",
    "token_type_hint",
)
_NEVER_IN_QUERY = ("client_id", "client_secret", "client_assertion", "refresh_token", "token")

blueprint = Blueprint("oauth", __name__, description="Tokens", security=BY_CLIENT)

_BAD_GRANT = {
    "invalid_grant": "The refresh token is unknown, expired, revoked or already used.",
    "invalid_scope": "The scope asks for more than this agent has.",
    "invalid_target": "The resource is not one of this agent's audiences.",
    "unsupported_grant_type": "The grant types here are client_credentials and refresh_token.",
}
_BAD_CLIENT = {"invalid_client": "Client authentication failed: check client_id and client_secret."}
_BAD_CALLER = {**_BAD_CLIENT, "invalid_token": "The access token has expired, was revoked or is malformed."}


@blueprint.post("/oauth/token")
@blueprint.form(oauth_schemas.TokenRequest, oauth_schemas.Token)
@blueprint.errors(400, invalid_request="Send grant_type: client_credentials or refresh_token.", **_BAD_GRANT)
@blueprint.errors(401, **_BAD_CLIENT)
def token() -> Response:
    """Trade client credentials or a refresh token for an access token."""
    return _answer(TokenRequest())


@blueprint.post("/oauth/refresh")
@blueprint.form(oauth_schemas.RefreshRequest, oauth_schemas.Token)
@blueprint.errors(400, invalid_request="Send refresh_token.", **_BAD_GRANT)
@blueprint.errors(401, **_BAD_CLIENT)
def refresh() -> Response:
    """Trade a refresh token for new tokens, without naming the grant type."""
    return _answer(TokenRequest(only_grant_type="refresh_token"))


@blueprint.post("/oauth/introspect")
@blueprint.doc(security=BY_ANY)
@blueprint.form(oauth_schemas.TokenQuestion, oauth_schemas.Introspected)
@blueprint.errors(400, invalid_request="Send token.")
@blueprint.errors(401, **_BAD_CALLER)
def introspect() -> Response:
    """Introspect a token (RFC 7662)."""
    return _answer_at("introspection")


@blueprint.post("/oauth/revoke")
@blueprint.doc(security=BY_ANY)
@blueprint.form(oauth_schemas.TokenQuestion, oauth_schemas.Revoked)
@blueprint.errors(400, invalid_request="Send token.", invalid_grant="The token is another agent's.")
@blueprint.errors(401, **_BAD_CALLER)
def revoke() -> Response:
    """Revoke a token (RFC 7009)."""
    return _answer_at("revocation")


@blueprint.get("/oauth/authorize")
@blueprint.doc(security=[])
@blueprint.errors(400, unsupported_response_type="Lanyard has no authorization endpoint.")
def authorize() -> Response:
    """Refuse every authorization request: agents act for themselves, and nobody is asked."""
    raise UnsupportedResponseType()


def init_app(app: Flask, settings: Settings) -> None:
    """Set up the authorization server."""
    server = Server(app)
    server.register_token_generator("default", tokens.TokenGenerator(settings))
    server.register_grant(ClientCredentialsGrant)
    server.register_grant(RefreshTokenGrant)
    server.register_endpoint(Introspection)
    server.register_endpoint(Revocation)
    state(app).oauth_server = server
    _init_metadata(app, settings)


def _answer(token_request: TokenRequest) -> Response:
    response: Response = state().oauth_server.create_token_response(token_request)
    return response


def _answer_at(endpoint: str) -> Response:
    response: Response = state().oauth_server.create_endpoint_response(endpoint, TokenRequest())
    return response


class UnsupportedResponseType(OAuth2Error):
    """RFC 6749 §4.1.2.1, told to the caller: there is no address to redirect to."""

    error = "unsupported_response_type"
    description = "Lanyard has no authorization endpoint: use client_credentials at the token endpoint."


class InvalidTargetError(OAuth2Error):
    """RFC 8707 §2."""

    error = "invalid_target"
    description = "The resource is not one of this agent's audiences."


class TokenRequest(OAuth2Request):
    """The parameters of a request: JSON or form body alike, and never the query string."""

    def __init__(self, only_grant_type: str | None = None) -> None:
        # Not the proxy: it looks the request up at every use.
        flask_request: Request = request._get_current_object()  # type: ignore[attr-defined]
        # Authlib refuses plain http by this address; behind a proxy only the issuer tells the truth.
        super().__init__(flask_request.method, settings().issuer, headers=flask_request.headers)
        for name in _NEVER_IN_QUERY if flask_request.query_string else ():
            if name in flask_request.args:
                raise InvalidRequestError(f"Send {name} in the body, never in the URL.")
        parameters = _parameters(_pairs(flask_request))
        if only_grant_type:
            parameters.setdefault("grant_type", only_grant_type)
        self.only_grant_type = only_grant_type
        self.payload = BasicOAuth2Payload(parameters)

    @property
    def form(self) -> dict[str, Any]:
        """What Authlib's classes read parameters from."""
        parameters: dict[str, Any] = self.payload.data
        return parameters


class Server(AuthorizationServer):
    """Authlib's server with its differences from the contract put right."""

    def create_oauth2_request(self, request: TokenRequest) -> TokenRequest:
        """The routes have parsed it already."""
        return request

    def get_token_grant(self, request: TokenRequest) -> Any:
        """Authlib's choice; its refusal repeats what the caller sent, ours does not."""
        grant_type = request.payload.grant_type
        if not grant_type:
            raise InvalidRequestError("Send grant_type: client_credentials or refresh_token.")
        if request.only_grant_type not in (None, grant_type):
            raise UnsupportedGrantType(grant_type)
        try:
            return super().get_token_grant(request)
        except UnsupportedGrantTypeError:
            raise UnsupportedGrantType(grant_type) from None

    def authenticate_client(
        self, request: OAuth2Request, methods: list[str], endpoint: str = "token"
    ) -> client_auth.Client:
        """One answer for an unknown client and a wrong secret; Authlib's would tell them apart."""
        return client_auth.authenticate(request)

    def handle_response(self, status: int, body: Any, headers: list[tuple[str, str]]) -> Response:
        """Answer as every other route does."""
        response = jsonify(body)
        response.status_code = status
        response.headers.extend((name, value) for name, value in headers if name != "Content-Type")
        return response

    def handle_error_response(self, request: OAuth2Request, error: OAuth2Error) -> Response:
        """Errors are raised: the app's one handler answers them."""
        raise error


class UnsupportedGrantType(UnsupportedGrantTypeError):
    """RFC 6749 §5.2, without repeating the caller's text."""

    def get_error_description(self) -> str:
        """The sentence."""
        return "The grant types here are client_credentials and refresh_token."


class ClientCredentialsGrant(grants.ClientCredentialsGrant):
    """RFC 6749 §4.4; a refresh token comes with the access token."""

    TOKEN_ENDPOINT_AUTH_METHODS = client_auth.AUTH_METHODS

    def validate_token_request(self) -> None:
        """Authlib's checks, and RFC 8707's."""
        super().validate_token_request()
        wanted = _resources(self.request) or [settings().audience]
        if not set(wanted) <= self.client.allowed_audiences:
            raise InvalidTargetError()
        self.client.audiences = wanted

    def create_token_response(self) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Issue and keep the tokens. Authlib's own would write them to its debug log."""
        token = self.generate_token(scope=self.request.payload.scope)
        tokens.start_family(self.client, token)
        events.TOKENS_ISSUED.inc()
        return 200, token, self.TOKEN_RESPONSE_HEADER


class RefreshTokenGrant(grants.RefreshTokenGrant):
    """RFC 6749 §6 with rotation; the refresh token is proof enough, credentials are checked when sent."""

    TOKEN_ENDPOINT_AUTH_METHODS = client_auth.AUTH_METHODS

    def validate_token_request(self) -> None:
        """Find the family, and narrow what it may be asked for."""
        text = self.request.form.get("refresh_token")
        if not text:
            raise InvalidRequestError("Send refresh_token.")
        caller = (
            client_auth.authenticate(self.request) if client_auth.carries_credentials(self.request) else None
        )
        client = tokens.use_refresh_token(text)
        named = caller.get_client_id() if caller else self.request.form.get("client_id")
        if named not in (None, client.get_client_id()):
            raise InvalidGrantError("The refresh token belongs to another client.")
        events.set_caller(client.row.id, client.row.client_id)
        self.request.client = client
        self.scope = self._narrowed_scope()
        client.audiences = self._narrowed_audiences()

    def create_token_response(self) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Issue the tokens, and put the new refresh token in the old one's place."""
        token = self.generate_token(scope=self.scope)
        tokens.rotate_family(self.client, token)
        events.TOKENS_REFRESHED.inc()
        return 200, token, self.TOKEN_RESPONSE_HEADER

    def _narrowed_scope(self) -> str:
        held = self.client.granted_scopes
        asked = self.request.payload.scope
        wanted = asked.split(" ") if asked else held
        if not set(wanted) <= set(held) or (self.client.row.family_scopes and not held):
            raise InvalidScopeError("The scope asks for more than this refresh token was given.")
        return " ".join(dict.fromkeys(wanted))

    def _narrowed_audiences(self) -> list[str]:
        # RFC 8707 §2.2: the audiences granted, or fewer.
        held = self.client.granted_audiences
        wanted = _resources(self.request) or held
        if not wanted or not set(wanted) <= set(held):
            raise InvalidTargetError()
        return wanted


def _resources(request: OAuth2Request) -> list[str]:
    """The audiences asked for; the issuer, which RFC 9728 calls this server, stands for its audience."""
    named = request.form.get("resource")
    if not named:
        return []
    own = {settings().issuer: settings().audience}
    return list(dict.fromkeys(own.get(name, name) for name in named))


def _pairs(flask_request: Request) -> list[tuple[str, Any]]:
    """The body as names and values, from either content type."""
    raw = flask_request.get_data()
    try:
        if flask_request.mimetype == "application/x-www-form-urlencoded":
            return parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
        if flask_request.mimetype == "application/json":
            body = parse_json(raw)
            if not isinstance(body, dict):
                raise InvalidRequestError("The body must be a JSON object.")
            return list(body.items())
    except UnicodeDecodeError:
        raise InvalidRequestError("The body is not valid UTF-8.") from None
    except ValueError:
        raise InvalidRequestError("The body cannot be parsed.") from None
    raise InvalidRequestError("Send the body as application/x-www-form-urlencoded or application/json.")


def _parameters(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One string for each parameter, a list for `resource`, which alone may repeat (RFC 8707 §2)."""
    resources: list[str] = []
    parameters: dict[str, Any] = {}
    for name, value in pairs:
        if name == "resource":
            resources += value if isinstance(value, list) else [value]
        elif name in parameters:
            raise InvalidRequestError("A parameter is repeated.")
        else:
            parameters[name] = value
    known = {name: parameters[name] for name in _PARAMETERS if name in parameters}
    for name, value in [*known.items(), *(("resource", resource) for resource in resources)]:
        if not is_text(value):
            raise InvalidRequestError(f"{name} must be a string.")
    # RFC 6749 §3.2: a parameter without a value counts as left out.
    parameters = {name: value for name, value in known.items() if value}
    if any(resources):
        parameters["resource"] = list(dict.fromkeys(filter(None, resources)))
    return parameters


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
            caller = Caller(None if auth.ADMIN_SCOPE in g.scopes else g.agent.client_id)
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
                events.TOKENS_REVOKED.inc()
            return
        with writing(exclusive=False) as connection:
            expires_at = datetime.fromtimestamp(token.facts["exp"], UTC)
            tokens.revoke(connection, token.facts["jti"], expires_at)
            events.record(connection, "token.revoked", token.agent, token="access")
        events.TOKENS_REVOKED.inc()


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
    scopes, audiences = client.granted_scopes, client.granted_audiences
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


well_known = Blueprint("well_known", __name__, description="Discovery")


class Metadata(AuthorizationServerMetadata):
    """RFC 8414 §2, checked by Authlib."""

    def validate_response_types_supported(self) -> None:
        """Accept an empty list: no response type is offered, but clients require the member."""


@well_known.get("/.well-known/oauth-authorization-server")
@well_known.get("/.well-known/openid-configuration", endpoint="openid_configuration")
@well_known.cached(oauth_schemas.ServerMetadata)
def authorization_server() -> Response:
    """Get the authorization server's metadata (RFC 8414).

    Many clients look for it only at the path of OpenID Connect.
    """
    return cached_response(_metadata_body(settings()), METADATA_MAX_AGE)


@well_known.get("/.well-known/oauth-protected-resource")
@well_known.cached(oauth_schemas.ResourceMetadata)
def protected_resource() -> Response:
    """Get the metadata of Lanyard's own API (RFC 9728): which server issues its tokens."""
    return cached_response(_resource_metadata_body(settings()), METADATA_MAX_AGE)


@well_known.get("/.well-known/jwks.json")
@well_known.cached(oauth_schemas.KeySet)
@well_known.errors(503)
def jwks() -> Response:
    """Get the public keys that verify access tokens (RFC 7517 §5)."""
    return cached_response(keys.published(), keys.JWKS_MAX_AGE)


def _init_metadata(app: Flask, settings: Settings) -> None:
    """Check the metadata, and answer it where an issuer with a path has it (RFC 8414 §3.1)."""
    Metadata(_metadata(settings)).validate()
    path = settings.issuer_path
    if path:
        for name, view in (
            ("oauth-authorization-server", authorization_server),
            ("openid-configuration", authorization_server),
            ("oauth-protected-resource", protected_resource),
        ):
            app.add_url_rule(f"/.well-known/{name}{path}", f"{name}{path}", view)


def _metadata(settings: Settings) -> dict[str, Any]:
    """Return what is offered; clients reject a document that names no authorization endpoint."""
    algorithms = list(client_auth.ASSERTION_ALGORITHMS.allowed or ())
    document: dict[str, Any] = {
        "issuer": settings.issuer,
        "authorization_endpoint": settings.url("/oauth/authorize"),
        "token_endpoint": settings.url("/oauth/token"),
        "jwks_uri": settings.url("/.well-known/jwks.json"),
        "introspection_endpoint": settings.url("/oauth/introspect"),
        "revocation_endpoint": settings.url("/oauth/revoke"),
        "response_types_supported": [],
        "grant_types_supported": ["client_credentials", "refresh_token"],
    }
    for endpoint in ("token", "introspection", "revocation"):
        document[f"{endpoint}_endpoint_auth_methods_supported"] = list(client_auth.AUTH_METHODS)
        document[f"{endpoint}_endpoint_auth_signing_alg_values_supported"] = algorithms
    document["introspection_endpoint_auth_methods_supported"].append("Bearer")
    return document


@lru_cache(maxsize=16)
def _metadata_body(settings: Settings) -> bytes:
    return json.dumps(_metadata(settings)).encode()


@lru_cache(maxsize=16)
def _resource_metadata_body(settings: Settings) -> bytes:
    document = {
        "resource": settings.issuer,
        "resource_name": "Lanyard",
        "authorization_servers": [settings.issuer],
        "jwks_uri": settings.url("/.well-known/jwks.json"),
        "scopes_supported": [auth.ADMIN_SCOPE],
        "bearer_methods_supported": ["header"],
    }
    return json.dumps(document).encode()
