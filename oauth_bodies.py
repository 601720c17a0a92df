"""What the OAuth endpoints and the documents read and answer, as schemas: for the OpenAPI document only.

Authlib reads and writes the real thing; tests/test_openapi.py holds the two together.
"""

from __future__ import annotations

from typing import Any

from authlib.oauth2.rfc7523.client import ASSERTION_TYPE
from marshmallow import EXCLUDE, Schema, fields
from marshmallow.validate import Equal, Length, OneOf

from schemas import Answer

_OPTIONAL = {"optional": True}


class Parameters(Schema):
    """What the OAuth endpoints share: parameters that are not known are ignored (RFC 6749 §3.2)."""

    class Meta:
        """As the RFC has it."""

        unknown = EXCLUDE

    client_id = fields.String()
    client_secret = fields.String()
    client_assertion_type = fields.String(validate=Equal(ASSERTION_TYPE))
    client_assertion = fields.String()


class _Grant(Parameters):
    """What a token may be asked to be for."""

    scope = fields.String()
    resource = fields.List(fields.String(), metadata={"type": ["array", "string"]})


class TokenRequest(_Grant):
    """Asks for a token, with client credentials or a refresh token."""

    grant_type = fields.String(required=True, validate=OneOf(["client_credentials", "refresh_token"]))
    refresh_token = fields.String(validate=Length(min=1))


class RefreshRequest(_Grant):
    """Trades a refresh token for new tokens; client credentials are checked when sent."""

    grant_type = fields.String(validate=Equal("refresh_token"))
    refresh_token = fields.String(required=True, validate=Length(min=1))


class TokenQuestion(Parameters):
    """Names a token, to ask about it or to end it."""

    token = fields.String(required=True, validate=Length(min=1))
    token_type_hint = fields.String()


class Token(Answer):
    """The tokens given out (RFC 6749 §5.1)."""

    access_token = fields.String()
    token_type = fields.String(validate=Equal("Bearer"))
    expires_in = fields.Integer()
    scope = fields.String()
    refresh_token = fields.String()


class Introspected(Answer):
    """What a token is (RFC 7662 §2.2); of one that is not good, no more than `active`: false."""

    active = fields.Boolean()
    scope = fields.String(metadata=_OPTIONAL)
    client_id = fields.String(metadata=_OPTIONAL)
    sub = fields.String(metadata=_OPTIONAL)
    aud = fields.Raw(
        metadata={"type": ["string", "array"], "items": {"type": "string"}, **_OPTIONAL},
    )
    iss = fields.String(metadata=_OPTIONAL)
    exp = fields.Integer(metadata=_OPTIONAL)
    iat = fields.Integer(metadata=_OPTIONAL)
    jti = fields.String(metadata=_OPTIONAL)
    token_type = fields.String(validate=OneOf(["Bearer", "refresh_token"]), metadata=_OPTIONAL)
    agent_id = fields.String(metadata=_OPTIONAL)


class Revoked(Answer):
    """Nothing: the token is gone, or never was."""


class PublicKey(Answer):
    """A public key as a JWK (RFC 7517); which members it has depends on `kty`."""

    kty = fields.String()
    kid = fields.String()
    alg = fields.String()
    use = fields.String(validate=Equal("sig"))
    n = fields.String(metadata=_OPTIONAL)
    e = fields.String(metadata=_OPTIONAL)
    crv = fields.String(metadata=_OPTIONAL)
    x = fields.String(metadata=_OPTIONAL)
    y = fields.String(metadata=_OPTIONAL)


class KeySet(Answer):
    """The keys that sign access tokens, or will, or did."""

    keys = fields.List(fields.Nested(PublicKey))


def _words() -> Any:
    return fields.List(fields.String())


class ServerMetadata(Answer):
    """What the authorization server offers (RFC 8414 §2)."""

    issuer = fields.String()
    authorization_endpoint = fields.String()
    token_endpoint = fields.String()
    jwks_uri = fields.String()
    introspection_endpoint = fields.String()
    revocation_endpoint = fields.String()
    response_types_supported = _words()
    grant_types_supported = _words()
    token_endpoint_auth_methods_supported = _words()
    token_endpoint_auth_signing_alg_values_supported = _words()
    introspection_endpoint_auth_methods_supported = _words()
    introspection_endpoint_auth_signing_alg_values_supported = _words()
    revocation_endpoint_auth_methods_supported = _words()
    revocation_endpoint_auth_signing_alg_values_supported = _words()


class ResourceMetadata(Answer):
    """Who gives out the tokens that Lanyard's own API takes (RFC 9728 §2)."""

    resource = fields.String()
    resource_name = fields.String()
    authorization_servers = _words()
    jwks_uri = fields.String()
    scopes_supported = _words()
    bearer_methods_supported = _words()


class About(Answer):
    """Name, version, and where things are."""

    name = fields.String()
    version = fields.String()
    links = fields.Dict(values=fields.String())


class Status(Answer):
    """How the service is."""

    status = fields.String(validate=OneOf(["ok", "ready"]))


class Error(Answer):
    """The one shape of every error."""

    error = fields.String()
    error_description = fields.String()
    fields_ = fields.Dict(data_key="fields", values=_words(), metadata=_OPTIONAL)
