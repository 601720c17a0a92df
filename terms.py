"""The terms of each operation, for the OpenAPI document: who may call it, what it reads, answers and refuses.

What a route's own decorators say is not said again here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import oauth_bodies as bodies
import schemas
from wire import MAX_BODY

ADMIN: list[dict[str, list[str]]] = [{"adminToken": []}, {"adminBasic": []}, {"accessToken": ["admin"]}]
_CLIENT: list[dict[str, list[str]]] = [{"clientBasic": []}, {}]  # or in the body
_ANY_PROOF = [*_CLIENT, {"accessToken": []}, *ADMIN[:2]]
# Who may call, by blueprint or by operation; anyone unless it is here.
SECURITY = {
    **dict.fromkeys(("agents", "webhooks", "keys", "events", "metrics"), ADMIN),
    "me": [{"accessToken": []}],
    **dict.fromkeys(("token", "refresh"), _CLIENT),
    **dict.fromkeys(("introspect", "revoke"), _ANY_PROOF),
}
SECURITY_SCHEMES = {
    "adminToken": ("bearer", "The operator's admin token."),
    "adminBasic": ("basic", "The user `admin` with the admin token for a password."),
    "accessToken": ("bearer", "An agent's access token. Management wants the scope `admin` in it."),
    "clientBasic": ("basic", "An agent's client id and secret, form-encoded first (RFC 6749 §2.3.1)."),
}

# What the routes of Authlib's endpoints and of plain documents read and answer.
READS = {
    "token": bodies.TokenRequest,
    "refresh": bodies.RefreshRequest,
    "introspect": bodies.TokenQuestion,
    "revoke": bodies.TokenQuestion,
}
ANSWERS: dict[str, Any] = {
    "token": bodies.Token,
    "refresh": bodies.Token,
    "introspect": bodies.Introspected,
    "revoke": bodies.Revoked,
    "authorization_server": bodies.ServerMetadata,
    "authorization_server_1": bodies.ServerMetadata,
    "protected_resource": bodies.ResourceMetadata,
    "jwks": bodies.KeySet,
    "about": bodies.About,
    "health": bodies.Status,
    "ready": bodies.Status,
    "act_on_agent": {"oneOf": [schemas.Rotated, schemas.AgentAnswer]},
    "openapi": {"type": "object"},
    "docs": {"type": "string"},
    "show_metrics": {"type": "string"},
}
CACHED = {"authorization_server", "authorization_server_1", "protected_resource", "jwks", "openapi", "docs"}
# They touch no database.
ALWAYS_THERE = {"about", "health", "authorize", *CACHED} - {"jwks"}
# Flask-smorest numbers the second address of a route.
OPERATION_IDS = {
    "authorization_server": "openid_configuration",
    "authorization_server_1": "authorization_server",
}

_KEYED = "The agent proves itself by its keys."
_OFF = "The webhook is switched off."
CONFLICTS = {
    "update_agent": f"{_KEYED} It cannot be left with none.",
    "act_on_agent": f"{_KEYED} It has no secret to rotate; or it has expired and cannot be reactivated.",
    "rotate_secret": f"{_KEYED} It has no secret to rotate.",
    "rotate_my_secret": f"{_KEYED} It has no secret to rotate.",
    "reactivate_agent": "The agent has expired.",
    "test_webhook": _OFF,
    "redeliver": _OFF,
}


class Refusal(NamedTuple):
    """A kind of error: its status, when it is answered, and an example."""

    status: int
    when: str
    error: str
    sentence: str
    header: str | None = None
    always: bool = True  # whether the header is


_LATER = "Try again shortly."
REFUSALS = {
    "BadRequest": Refusal(400, "The input will not do.", "invalid_request", "'name': Must not be blank."),
    "BadGrant": Refusal(400, "Refused (RFC 6749 §5.2).", "invalid_grant", "The refresh token is unknown."),
    "NoAuthorization": Refusal(400, "Always.", "unsupported_response_type", "Lanyard has no such endpoint."),
    "Unauthorized": Refusal(
        401, "The credentials are missing or no good.", "unauthorized", "Send a token.", "WWW-Authenticate"
    ),
    "BadClient": Refusal(
        401, "The client is not who it says.", "invalid_client", "Check client_secret.", "WWW-Authenticate"
    ),
    "Forbidden": Refusal(
        403,
        "The caller may not do this.",
        "insufficient_scope",
        "It needs the scope admin.",
        "WWW-Authenticate",
        False,
    ),
    "NotFound": Refusal(404, "There is no such thing.", "not_found", "No agent has this id."),
    "Conflict": Refusal(409, "Not as things are.", "conflict", "This agent has no client secret."),
    "TooLarge": Refusal(413, "The body is too large.", "payload_too_large", f"At most {MAX_BODY} bytes."),
    "NotJson": Refusal(415, "The body is no JSON.", "unsupported_media_type", "Send application/json."),
    "TooMany": Refusal(429, "Too many failures, or tokens.", "too_many_requests", _LATER, "Retry-After"),
    "Unavailable": Refusal(503, "The database is busy.", "temporarily_unavailable", _LATER, "Retry-After"),
}
HEADERS = {
    "X-Request-Id": ("Names the request: yours, or one that Lanyard made.", {"type": "string"}),
    "Location": ("Where the new thing is.", {"type": "string", "format": "uri-reference"}),
    "WWW-Authenticate": ("How to prove who you are (RFC 6750 §3, RFC 7617 §2).", {"type": "string"}),
    "Retry-After": ("Seconds to wait.", {"type": "integer", "minimum": 1}),
    "ETag": ("Changes with the document.", {"type": "string"}),
    "Cache-Control": ("How long the document may be kept.", {"type": "string"}),
}
_NUMBER = {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}  # base64url, RFC 7518 §6


def _jwk(kty: str, *numbers: str, **members: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"kty": {"const": kty}, **members, **dict.fromkeys(numbers, _NUMBER)}
    required = list(told)
    told |= {"use": {"const": "sig"}, "d": {"not": {}}}  # a `d` makes a private key
    return {"type": "object", "required": required, "properties": told}


_JWKS = [
    _jwk("RSA", "n", "e"),
    _jwk("EC", "x", "y", crv={"const": "P-256"}),
    _jwk("OKP", "x", crv={"const": "Ed25519"}),
]
JWK_SET = {
    "type": ["object", "null"],
    "required": ["keys"],
    "properties": {"keys": {"type": "array", "minItems": 1, "maxItems": 8, "items": {"oneOf": _JWKS}}},
    "additionalProperties": False,
}
# All others answer JSON.
ANSWER_TYPES = {"docs": "text/html", "show_metrics": "text/plain"}
# What the schemas check in Python, over several fields.
RULES: dict[str, dict[str, Any]] = {
    "AgentCreate": {
        "if": {
            "required": ["token_endpoint_auth_method"],
            "properties": {"token_endpoint_auth_method": {"const": "private_key_jwt"}},
        },
        "then": {"required": ["jwks"], "properties": {"jwks": {"type": "object"}}},
    },
    "Action": {
        "if": {"properties": {"action": {"enum": ["deactivate", "reactivate"]}}},
        "then": {"properties": {"grace_period": False, "revoke_tokens": False}},
    },
    "TokenRequest": {
        "if": {"properties": {"grant_type": {"const": "refresh_token"}}},
        "then": {"required": ["refresh_token"]},
    },
}
_UUID = {"type": "string", "format": "uuid"}
PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("agent_id", "secret_id", "webhook_id"), _UUID),
    "delivery_id": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}
