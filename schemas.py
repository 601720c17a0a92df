"""The bodies, queries and responses of the API as Marshmallow schemas, with descriptions and examples.

`examples` are whole bodies by name, `rules` the JSON Schema of checks over several fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, pre_load, validates_schema
from marshmallow.validate import Length, OneOf, Range

from api import PublicKeys, StrictBoolean, Text, Timestamp, audience, doc, no_repeats, scope
from config import DAY, VERSION
from models import EVENT_GROUPS, EVENT_TYPES, is_active, now

CENTURY = 36_525 * DAY
PAGE_SIZE_MAX = 200
_EVENT_NAMES = OneOf(EVENT_TYPES + EVENT_GROUPS)
_STATES = OneOf(["pending", "retrying", "delivered", "dead"])

AGENT_ID = "b5b0cd3b-a5d1-4b5f-8ed2-4f3a8d4f2f3b"
_EVENT_ID = "evt_EXAMPLEexampleEXAMPLE00"
CLIENT_ID = "cid_EXAMPLEexampleEXAMPLE00"
CLIENT_SECRET = "cs_EXAMPLE0-no-real-secret-only-the-length-of-one-here-00000"
_AUDIENCE = "https://reports.example.com"
_HOOK = "https://hooks.example.com/lanyard"
_TIME, _LATER = "2026-06-01T12:00:00Z", "2026-08-30T12:00:00Z"
KID = "EXAMPLE-thumbprint-of-a-public-key-00000000"
_EVENT_DATA = {"agent_id": AGENT_ID, "agent_name": "night-reporter", "client_id": CLIENT_ID}
_SUBSCRIBED = ["agent.*", "token.reuse_detected"]
JWK = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}

_NAME = doc("The display name.", "night-reporter")
_DESCRIPTION = doc("The purpose of the agent.", "Writes the nightly report.")
_OWNER = doc("The person or team responsible for the agent.", "data-team")
_SCOPES = doc("The scopes of its tokens (RFC 6749 §3.3). `admin` manages Lanyard.", ["read", "write"])
_AUDIENCES = doc("The audiences of its tokens (RFC 8707): URIs or plain names.", ["reports", _AUDIENCE])
_METADATA = doc("Names and strings of your own.", {"team": "reports"})
_TOKEN_TTL = doc("Lifetime of an access token in seconds. Null: the server's default.", None)
_RATE_LIMIT = doc("Tokens and rotations of its secret in any 60 seconds. Null: no limit.", None)
_REFRESH_AUTH = doc("Whether a refresh token needs client credentials beside it (RFC 6749 §6).", False)
_AUTH_METHOD = doc("How it authenticates. With `private_key_jwt` it has no secret.", "client_secret_basic")
_EXPIRES_IN = doc("Seconds until it expires. Null: never.", 7_776_000)
_JWKS = doc(
    "Its public keys (RFC 7517 §5): RSA to 6144 bits, P-256 or Ed25519.",
    {"keys": [JWK]},
    required=["keys"],
    properties={"keys": {"type": "array", "minItems": 1, "maxItems": 8, "items": {"type": "object"}}},
    additionalProperties=False,
)
_GRACE_PERIOD = doc("Seconds that the old secret still works.", 3600)
_REVOKE_TOKENS = doc("Revoke all tokens of the agent, after a leak.", False)
_STALE_DAYS = doc("Only agents without activity for so many days.")
_SEARCH = doc("Text in name, description or owner; or a client id, or its start: `cid_` and 4 characters.")
_ID = doc("The id. It never changes.", AGENT_ID)
_CREATED_AT = doc("When it was created.", _TIME)
_UPDATED_AT = doc("When it was last changed.", _TIME)
_NEXT = fields.String(allow_none=True, **doc("The `after` of the next page. Null: the last page.", None))
_CLIENT_ID = doc("The agent's public name at the token endpoint.", CLIENT_ID)
_TOKEN_COUNT = doc("Tokens issued for the agent's credentials.", 12)
_REFRESH_COUNT = doc("Tokens issued for a refresh token.", 3)
_ACTIVE_AT = doc("When the agent last got a token or changed itself.", _TIME)
_TOKEN_AT = doc("When the agent last got a token.", _TIME)


class AgentFields(Schema):
    """The fields of an agent that an operator sets."""

    name = Text(max=128, required=True, **_NAME)
    description = Text(min=0, max=1024, lines=True, allow_none=True, **_DESCRIPTION)
    owner = Text(min=0, max=256, allow_none=True, **_OWNER)
    scopes = fields.List(scope(), validate=[Length(max=64), no_repeats], **_SCOPES)
    audiences = fields.List(audience(), validate=[Length(max=16), no_repeats], **_AUDIENCES)
    metadata = fields.Dict(
        keys=Text(max=64), values=Text(min=0, max=512, lines=True), validate=Length(max=32), **_METADATA
    )
    token_ttl = fields.Integer(strict=True, validate=Range(1, DAY), allow_none=True, **_TOKEN_TTL)
    rate_limit = fields.Integer(strict=True, validate=Range(1, 1_000_000), allow_none=True, **_RATE_LIMIT)
    require_client_auth_for_refresh = StrictBoolean(**_REFRESH_AUTH)
    expires_in = fields.Integer(strict=True, validate=Range(1, CENTURY), allow_none=True, **_EXPIRES_IN)
    jwks = PublicKeys(allow_none=True, **_JWKS)


class AgentCreate(AgentFields):
    """A new agent."""

    examples = {
        "An agent": {"name": "night-reporter", "scopes": ["read", "write"], "expires_in": 7776000},
        "An agent with a key instead of a secret": {
            "name": "keyed",
            "scopes": ["read"],
            "token_endpoint_auth_method": "private_key_jwt",
            "jwks": {"keys": [JWK]},
        },
        "An agent for another service": {"name": "caller", "audiences": [_AUDIENCE]},
    }
    rules = {
        "if": {
            "required": ["token_endpoint_auth_method"],
            "properties": {"token_endpoint_auth_method": {"const": "private_key_jwt"}},
        },
        "then": {"required": ["jwks"], "properties": {"jwks": {"type": "object"}}},
    }

    token_endpoint_auth_method = fields.String(
        load_default="client_secret_basic",
        validate=OneOf(["client_secret_basic", "client_secret_post", "private_key_jwt"]),
        **_AUTH_METHOD,
    )

    @validates_schema
    def _needs_keys(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if data["token_endpoint_auth_method"] == "private_key_jwt" and not data.get("jwks"):
            raise ValidationError("private_key_jwt needs the agent's public keys.", "jwks")


class AgentUpdate(AgentFields):
    """Changes to an agent. Fields left out stay as they are."""

    examples = {
        "Change the scopes": {"scopes": ["read"]},
        "Never expire": {"expires_in": None},
        "Limit the tokens": {"rate_limit": 60, "token_ttl": 300},
    }


class PageQuery(Schema):
    """The page to return."""

    limit = fields.Integer(load_default=50, validate=Range(1, PAGE_SIZE_MAX), **doc("The size of a page."))
    after = fields.Integer(load_default=None, validate=Range(1, 2**63 - 1), **doc("The `next` of a page."))

    @pre_load
    def _drop_empty(self, data: Mapping[str, str], **kwargs: Any) -> dict[str, str]:
        # An empty filter, as forms and templates send them, filters nothing.
        return {name: data[name] for name in data if data[name]}


class AgentQuery(PageQuery):
    """`GET /api/agents`: filters."""

    is_active = fields.Boolean(load_default=None, **doc("Only active agents, or only inactive ones."))
    scope = Text(min=0, max=128, load_default=None, **doc("Only agents that have this scope."))
    owner = Text(min=0, max=256, load_default=None, **doc("Only agents of this owner."))
    stale_days = fields.Integer(load_default=None, validate=Range(1, 36_525), **_STALE_DAYS)
    q = Text(min=0, max=128, load_default=None, **_SEARCH)


class EventQuery(PageQuery):
    """`GET /api/events`: filters."""

    agent_id = Text(min=0, max=36, load_default=None, **doc("Only events of this agent."))
    type = fields.String(load_default=None, validate=_EVENT_NAMES, **doc("Only this type or group."))


class Empty(Schema):
    """An empty or absent body."""

    examples: Mapping[str, Any] = {"Empty": {}}


class Rotate(Schema):
    """How to rotate a client secret."""

    examples: Mapping[str, Any] = {
        "At once": {},
        "Without downtime": {"grace_period": 3600},
        "After a leak": {"revoke_tokens": True},
    }

    grace_period = fields.Integer(strict=True, load_default=0, validate=Range(0, DAY), **_GRACE_PERIOD)
    revoke_tokens = StrictBoolean(load_default=False, **_REVOKE_TOKENS)


class Action(Schema):
    """An action by its name. The other fields belong to `rotate`."""

    examples = {
        "Rotate the secret": {"action": "rotate", "grace_period": 3600},
        "Deactivate": {"action": "deactivate"},
    }
    rules = {
        "if": {"properties": {"action": {"enum": ["deactivate", "reactivate"]}}},
        "then": {"properties": {"grace_period": False, "revoke_tokens": False}},
    }

    action = fields.String(required=True, validate=OneOf(["rotate", "deactivate", "reactivate"]))
    grace_period = fields.Integer(strict=True, validate=Range(0, DAY), **_GRACE_PERIOD)
    revoke_tokens = StrictBoolean(**_REVOKE_TOKENS)

    @validates_schema
    def _only_rotate_has_options(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        for name in set(data) - {"action"}:
            if data["action"] != "rotate":
                raise ValidationError("Only rotate takes this.", name)


class Response(Schema):
    """A response. Every field is always present, unless its metadata says `optional`."""

    class Meta:
        unknown = EXCLUDE  # later versions may add fields

    def get_attribute(self, obj: Any, attr: str, default: Any) -> Any:
        # Marshmallow would index a database row by the name first, and raise, for each field.
        return obj.get(attr, default) if isinstance(obj, Mapping) else getattr(obj, attr, default)

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        # For the document: Marshmallow ignores `required` in output.
        field_obj.required = not field_obj.metadata.get("optional")


class Agent(Response):
    """An agent, without its secrets."""

    id = fields.String(**_ID)
    name = fields.String(**_NAME)
    description = fields.String(allow_none=True, **_DESCRIPTION)
    owner = fields.String(allow_none=True, **_OWNER)
    client_id = fields.String(**_CLIENT_ID)
    scopes = fields.List(fields.String(), **_SCOPES)
    audiences = fields.List(fields.String(), **_AUDIENCES)
    metadata = fields.Dict(values=fields.String(), **_METADATA)
    # An expired agent is treated as deactivated.
    is_active = fields.Function(
        lambda agent: is_active(agent, now()),
        **doc("False while it is deactivated or expired.", True, type="boolean", readOnly=False),
    )
    token_ttl = fields.Integer(allow_none=True, **_TOKEN_TTL)
    rate_limit = fields.Integer(allow_none=True, **_RATE_LIMIT)
    require_client_auth_for_refresh = fields.Boolean(**_REFRESH_AUTH)
    token_endpoint_auth_method = fields.String(**_AUTH_METHOD)
    created_at = Timestamp(**_CREATED_AT)
    updated_at = Timestamp(**_UPDATED_AT)
    expires_at = Timestamp(allow_none=True, **doc("When it expires. Null: never.", _LATER))
    token_count = fields.Integer(**_TOKEN_COUNT)
    refresh_count = fields.Integer(**_REFRESH_COUNT)
    last_activity_at = Timestamp(allow_none=True, **_ACTIVE_AT)
    last_token_issued_at = Timestamp(allow_none=True, **_TOKEN_AT)


class AgentCreated(Response):
    """The new agent and its client secret, shown once. An agent with keys has none."""

    agent = fields.Nested(Agent)
    client_id = fields.String(**_CLIENT_ID)
    client_secret = fields.String(**doc("The secret, shown once.", CLIENT_SECRET, optional=True))


class AgentDeactivated(Response):
    """The deactivated agent."""

    message = fields.String(**doc("A sentence for people.", "This agent is deactivated."))
    agent = fields.Nested(Agent)


class Rotated(Response):
    """The new client secret, shown once."""

    client_secret = fields.String(**doc("The secret, shown once.", CLIENT_SECRET))


class Secret(Response):
    """A client secret, without its text."""

    id = fields.String(**_ID)
    hint = fields.String(**doc("The eight characters after `cs_`.", "EXAMPLE0"))
    created_at = Timestamp(**_CREATED_AT)
    expires_at = Timestamp(allow_none=True, **doc("When it stops working. Null: never.", None))
    last_used_at = Timestamp(allow_none=True, **doc("When it last got a token.", _TIME))


class RotationRecord(Response):
    """A rotation of the client secret."""

    rotated_at = Timestamp(**doc("When it was rotated.", _TIME))
    rotated_by = fields.String(validate=OneOf(["self", "admin"]), **doc("The agent or an operator.", "self"))


class DailyUsage(Response):
    """An agent's tokens of one day (UTC)."""

    date = fields.Date(attribute="day", **doc("The day.", "2026-06-01"))
    tokens_issued = fields.Integer(**doc("Tokens issued for credentials.", 1))
    tokens_refreshed = fields.Integer(**doc("Tokens issued for a refresh token.", 2))


class Event(Response):
    """An entry of the audit log."""

    id = fields.String(**doc("The event's id.", _EVENT_ID))
    type = fields.String(**doc("The event type.", "agent.created"))
    timestamp = Timestamp(attribute="created_at", **doc("When it happened.", _TIME))
    actor = fields.String(**doc("The caller: `admin`, an agent's id, or `anonymous`.", "admin"))
    address = fields.String(allow_none=True, **doc("The caller's IP address. Null: no caller.", "192.0.2.7"))
    request_id = fields.String(allow_none=True, **doc("The request's `X-Request-Id`.", "req_EXAMPLE00"))
    data = fields.Dict(**doc("Details of the event type. Never a secret.", _EVENT_DATA))


_SUBSCRIPTIONS = doc("Event types, or groups such as `agent.*`. `*` is every event.", _SUBSCRIBED)
_SIGNING_SECRET = doc("The secret.", "whsec_EXAMPLEnoRealSecretOnlyItsLengthHere0000000000")
_HOOK_NAME = doc("The display name.", "audit")
_HOOK_URL = doc(
    "Where events are sent: https and a public address, unless the server allows others.",
    _HOOK,
    format="uri",
    pattern=r"^https?://[!$-;=?-\[\]_a-z~]+$",  # for the document: ssrf.parse checks more
)
_MAX_RETRIES = doc("How often a failed delivery is retried.", 9)


class WebhookCreate(Schema):
    """A new webhook."""

    examples: Mapping[str, Any] = {"Some events": {"name": "audit", "url": _HOOK, "events": _SUBSCRIBED}}

    name = Text(max=128, required=True, **_HOOK_NAME)
    url = Text(max=2048, required=True, **_HOOK_URL)
    events = fields.List(
        fields.String(validate=_EVENT_NAMES),
        required=True,
        validate=[Length(1, 32), no_repeats],
        **_SUBSCRIPTIONS,
    )
    max_retries = fields.Integer(strict=True, validate=Range(0, 9), **_MAX_RETRIES)


class WebhookUpdate(WebhookCreate):
    """Changes to a webhook. Fields left out stay as they are."""

    examples = {"Switch on": {"is_active": True}}

    is_active = StrictBoolean(**doc("True switches on a webhook that was switched off.", True))


class WebhookRotate(Schema):
    """How to rotate a signing secret."""

    examples = {"At once": {"grace_period": 0}}

    grace_period = fields.Integer(
        strict=True, load_default=DAY, validate=Range(0, 7 * DAY), **doc("Seconds that both secrets sign.")
    )


class Webhook(Response):
    """A webhook, without its secret."""

    id = fields.String(**_ID)
    name = fields.String(**_HOOK_NAME)
    url = fields.String(**doc("Where events are sent.", _HOOK))
    events = fields.List(fields.String(), **_SUBSCRIPTIONS)
    max_retries = fields.Integer(**_MAX_RETRIES)
    is_active = fields.Boolean(**doc("Whether events are sent.", True))
    disabled_reason = fields.String(allow_none=True, **doc("Why Lanyard switched it off, if it did.", None))
    created_at = Timestamp(**_CREATED_AT)
    updated_at = Timestamp(**_UPDATED_AT)


class WebhookSecret(Response):
    """The signing secret, shown once."""

    secret = fields.String(**_SIGNING_SECRET)


class WebhookCreated(Response):
    """The new webhook and its signing secret, shown once."""

    webhook = fields.Nested(Webhook)
    secret = fields.String(**_SIGNING_SECRET)


class DeliveryQuery(PageQuery):
    """`GET /api/webhooks/{id}/deliveries`: filters."""

    status = fields.String(load_default=None, validate=_STATES, **doc("Only deliveries in this state."))


class Delivery(Response):
    """The delivery of an event to a webhook, with the result of the last attempt."""

    id = fields.String(attribute="pk", **doc("The delivery's id.", "17"))
    event_id = fields.String(**doc("The event's id; the receiver gets it as `webhook-id`.", _EVENT_ID))
    type = fields.String(**doc("The event type.", "agent.created"))
    status = fields.String(validate=_STATES, **doc("The state.", "delivered"))
    attempts = fields.Integer(**doc("How often it was sent.", 1))
    created_at = Timestamp(**_CREATED_AT)
    last_attempt_at = Timestamp(allow_none=True, **doc("When it was last sent.", _TIME))
    next_attempt_at = Timestamp(allow_none=True, **doc("When it is sent next. Null: never.", None))
    response_status = fields.Integer(allow_none=True, **doc("The receiver's status.", 200))
    response_body = fields.String(allow_none=True, **doc("The first kilobyte of its response.", "ok"))
    error = fields.String(allow_none=True, **doc("Why the last attempt got no response.", None))


class EventTypes(Response):
    """What a webhook may subscribe to."""

    events = fields.List(fields.String(), **doc("The event types.", ["agent.created", "token.issued"]))
    groups = fields.List(fields.String(), **doc("Names for several types.", ["*", "agent.*"]))


class KeyRotation(Schema):
    """How to rotate the signing key."""

    examples: Mapping[str, Any] = {"Without downtime": {}, "After a leak": {"now": True}}

    now = StrictBoolean(load_default=False, **doc("After a leak: sign now, end every access token.", False))


class SigningKey(Response):
    """A signing key, without its private part."""

    kid = fields.String(**doc("The key's id: its thumbprint (RFC 7638).", KID))
    alg = fields.String(**doc("The signature algorithm.", "RS256"))
    state = fields.String(validate=OneOf(["published", "signing", "retired", "gone"]))
    created_at = Timestamp(**_CREATED_AT)
    signs_from = Timestamp(**doc("When it starts to sign.", _TIME))
    gone_at = Timestamp(allow_none=True, **doc("When its publication ends. Null: it is the newest.", None))


class Usage(Response):
    """An agent's tokens and rotations."""

    token_count = fields.Integer(**_TOKEN_COUNT)
    refresh_count = fields.Integer(**_REFRESH_COUNT)
    last_activity_at = Timestamp(allow_none=True, **_ACTIVE_AT)
    last_token_issued_at = Timestamp(allow_none=True, **_TOKEN_AT)
    rotation_history = fields.List(fields.Nested(RotationRecord), **doc("Newest first."))
    daily = fields.List(fields.Nested(DailyUsage), **doc("The last thirty days (UTC), today last."))


class About(Response):
    """Name, version and paths."""

    name = fields.String(**doc("The name.", "Lanyard"))
    version = fields.String(**doc("The version.", VERSION))
    links = fields.Dict(values=fields.String(), **doc("Paths by name.", {"token": "/oauth/token"}))


class Status(Response):
    """The state of the service."""

    status = fields.String(validate=OneOf(["ok", "ready"]))


def _wrap(name: str, description: str, **members: fields.Field[Any]) -> type[Response]:
    return type(name, (Response,), {"__doc__": description, **members})


def _list_of(schema: type[Schema]) -> fields.List[Any]:
    return fields.List(fields.Nested(schema))


# Responses that only wrap the schemas above.
AgentResponse = _wrap("AgentResponse", "One agent.", agent=fields.Nested(Agent))
AgentPage = _wrap("AgentPage", "Agents, newest first.", agents=_list_of(Agent), next=_NEXT)
Secrets = _wrap("Secrets", "The valid secrets of an agent, newest first.", secrets=_list_of(Secret))
EventPage = _wrap("EventPage", "Events, newest first.", events=_list_of(Event), next=_NEXT)
WebhookResponse = _wrap("WebhookResponse", "One webhook.", webhook=fields.Nested(Webhook))
WebhookList = _wrap("WebhookList", "All webhooks, newest first.", webhooks=_list_of(Webhook))
DeliveryResponse = _wrap("DeliveryResponse", "One delivery.", delivery=fields.Nested(Delivery))
DeliveryPage = _wrap("DeliveryPage", "Deliveries, newest first.", deliveries=_list_of(Delivery), next=_NEXT)
KeyResponse = _wrap("KeyResponse", "One signing key.", key=fields.Nested(SigningKey))
KeyList = _wrap("KeyList", "The signing keys, newest first.", keys=_list_of(SigningKey))
