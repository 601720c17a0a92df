"""The bodies of the OAuth endpoints and the discovery documents, for the OpenAPI document."""

from __future__ import annotations

from authlib.oauth2.rfc7523.client import ASSERTION_TYPE
from marshmallow import EXCLUDE, Schema, fields
from marshmallow.validate import Equal, Length, OneOf

from api import doc
from schemas import AGENT_ID, CLIENT_ID, CLIENT_SECRET, Response

_ISSUER = "https://id.example.com"
_ACCESS_TOKEN = "eyJhbGciOiJSUzI1NiIsInR5cCI6ImF0K2p3dCJ9.EXAMPLE.EXAMPLE"
_REFRESH_TOKEN = "rt_EXAMPLE-no-real-token-only-the-length-of-one-here-000000000000000"
_CREDENTIALS = {"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}
_GRANT = {"grant_type": "client_credentials"}
_STRING = {"type": "string"}


def _parameter(description: str) -> fields.String:
    # Without an example Swagger UI fills its form with "string". Empty counts as left out.
    return fields.String(**doc(description, ""))


class Parameters(Schema):
    """The parameters of every OAuth endpoint. Unknown ones are ignored (RFC 6749 §3.2)."""

    class Meta:
        unknown = EXCLUDE

    client_id = _parameter("The agent's client id, unless it is in the header.")
    client_secret = _parameter("The agent's secret, unless it is in the header.")
    client_assertion_type = fields.String(validate=Equal(ASSERTION_TYPE))
    client_assertion = _parameter("A JWT signed with the agent's own key (RFC 7523).")


class _Grant(Parameters):
    scope = _parameter("Scopes, separated by spaces. Left out: all that are allowed.")
    resource = fields.List(fields.String(), **doc("Audiences (RFC 8707). Left out: Lanyard itself.", []))
    audience = fields.List(fields.String(), **doc("Another name for `resource` (RFC 8693).", []))


class TokenRequest(_Grant):
    """A request for tokens, with client credentials or a refresh token."""

    examples = {
        "With a secret": {**_GRANT, **_CREDENTIALS, "scope": "read"},
        "With a signed assertion": {
            **_GRANT,
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": "eyJhbGciOiJFUzI1NiJ9.EXAMPLE.EXAMPLE",
        },
        "With a refresh token": {"grant_type": "refresh_token", "refresh_token": _REFRESH_TOKEN},
    }
    rules = {
        "if": {"properties": {"grant_type": {"const": "refresh_token"}}},
        "then": {"required": ["refresh_token"], "properties": {"refresh_token": {"minLength": 1}}},
    }

    grant_type = fields.String(required=True, validate=OneOf(["client_credentials", "refresh_token"]))
    refresh_token = _parameter("With `grant_type=refresh_token`.")


class RefreshRequest(_Grant):
    """A request to trade a refresh token for new tokens. Client credentials are checked if present."""

    examples = {"A refresh token": {"refresh_token": _REFRESH_TOKEN}}

    grant_type = fields.String(validate=Equal("refresh_token"))
    refresh_token = fields.String(required=True, validate=Length(min=1), **doc("The token.", _REFRESH_TOKEN))


class TokenParameter(Parameters):
    """A token to introspect or to revoke."""

    examples = {
        "An access token": {"token": _ACCESS_TOKEN, **_CREDENTIALS},
        "A refresh token": {"token": _REFRESH_TOKEN, **_CREDENTIALS},
    }

    token = fields.String(required=True, validate=Length(min=1), **doc("The token.", _ACCESS_TOKEN))
    token_type_hint = _parameter("Accepted and not needed.")


class Token(Response):
    """The new tokens (RFC 6749 §5.1)."""

    access_token = fields.String(**doc("A JWT (RFC 9068) to send as `Authorization: Bearer`.", _ACCESS_TOKEN))
    token_type = fields.String(validate=Equal("Bearer"))
    expires_in = fields.Integer(**doc("Seconds until the access token expires.", 3600))
    scope = fields.String(**doc("The scopes of the access token.", "read"))
    refresh_token = fields.String(**doc("Valid once; its use returns the next one.", _REFRESH_TOKEN))


class Introspected(Response):
    """The state of a token (RFC 7662 §2.2). An invalid token has `active`: false and nothing else."""

    active = fields.Boolean(**doc("Whether the token is valid now.", True))
    scope = fields.String(**doc("The token's scopes, separated by spaces.", "read", optional=True))
    client_id = fields.String(**doc("The agent's client id.", CLIENT_ID, optional=True))
    sub = fields.String(**doc("The subject: the client id.", CLIENT_ID, optional=True))
    aud = fields.Raw(**doc("The audience.", _ISSUER, type=["string", "array"], items=_STRING, optional=True))
    iss = fields.String(**doc("The issuer.", _ISSUER, optional=True))
    exp = fields.Integer(**doc("When it expires, in seconds since 1970.", 1780318800, optional=True))
    iat = fields.Integer(**doc("When it was issued, in seconds since 1970.", 1780315200, optional=True))
    jti = fields.String(**doc("The token's id.", "EXAMPLEexample00.EXAMPLEexampleEXAMPLE0", optional=True))
    token_type = fields.String(
        validate=OneOf(["Bearer", "refresh_token"]), **doc("The type of token.", optional=True)
    )
    agent_id = fields.String(**doc("The agent's id.", AGENT_ID, optional=True))


class Revoked(Response):
    """Empty: the token is revoked or unknown."""
