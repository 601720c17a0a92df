"""What the server says of itself at `/.well-known/*`: RFC 8414, RFC 9728, and the key set."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from functools import lru_cache
from hashlib import sha256
from typing import Any

from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from flask import Flask, Response, request

import keys
import oauth_schemas
from api import Blueprint
from bearer import ADMIN_SCOPE
from clients import ASSERTION_ALGORITHMS, AUTH_METHODS
from config import Settings, settings

MAX_AGE = 3600  # seconds

blueprint = Blueprint("well_known", __name__, description="Discovery")


class Metadata(AuthorizationServerMetadata):
    """RFC 8414 §2, checked by Authlib."""

    def validate_response_types_supported(self) -> None:
        """Required and empty: there is no authorization endpoint to speak of.

        Clients in use, the MCP SDKs among them, reject a document without it.
        """


@blueprint.get("/.well-known/oauth-authorization-server")
@blueprint.get("/.well-known/openid-configuration", endpoint="openid_configuration")
@blueprint.cached(oauth_schemas.ServerMetadata)
def authorization_server() -> Response:
    """Get the authorization server's metadata (RFC 8414).

    Many clients look for it only at the path of OpenID Connect.
    """
    return answer(document(_metadata, settings()), MAX_AGE)


@blueprint.get("/.well-known/oauth-protected-resource")
@blueprint.cached(oauth_schemas.ResourceMetadata)
def protected_resource() -> Response:
    """Get the metadata of Lanyard's own API (RFC 9728): which server issues its tokens."""
    return answer(document(_resource_metadata, settings()), MAX_AGE)


@blueprint.get("/.well-known/jwks.json")
@blueprint.cached(oauth_schemas.KeySet)
@blueprint.errors(503)
def jwks() -> Response:
    """Get the public keys that verify access tokens (RFC 7517 §5)."""
    return answer(document(_key_set, keys.published()), keys.JWKS_MAX_AGE)


def init_app(app: Flask, settings: Settings) -> None:
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
    """True to what is offered; the authorization endpoint is named because clients want one named."""
    algorithms = list(ASSERTION_ALGORITHMS.allowed or ())
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
        document[f"{endpoint}_endpoint_auth_methods_supported"] = list(AUTH_METHODS)
        document[f"{endpoint}_endpoint_auth_signing_alg_values_supported"] = algorithms
    document["introspection_endpoint_auth_methods_supported"].append("Bearer")
    return document


def _resource_metadata(settings: Settings) -> dict[str, Any]:
    return {
        "resource": settings.issuer,
        "resource_name": "Lanyard",
        "authorization_servers": [settings.issuer],
        "jwks_uri": settings.url("/.well-known/jwks.json"),
        "scopes_supported": [ADMIN_SCOPE],
        "bearer_methods_supported": ["header"],
    }


def _key_set(published: tuple[str, ...]) -> dict[str, Any]:
    return {"keys": [json.loads(key) for key in published]}


@lru_cache(maxsize=16)
def document(make: Callable[[Any], dict[str, Any]], of: Hashable) -> tuple[bytes, str]:
    """The document and its ETag, made once for what it tells of."""
    return stamped(json.dumps(make(of)).encode() + b"\n")


def stamped(body: bytes) -> tuple[bytes, str]:
    """A body and its ETag."""
    return body, sha256(body).hexdigest()[:32]


def answer(document: tuple[bytes, str], max_age: int, mimetype: str = "application/json") -> Response:
    """Answer a document, or 304 to who has it already; `max_age` is in seconds."""
    body, etag = document
    response = Response(body, mimetype=mimetype)
    response.headers["Cache-Control"] = f"public, max-age={max_age}"
    response.set_etag(etag)
    if request.if_none_match:
        response.make_conditional(request)
    return response
