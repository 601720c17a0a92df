"""What may come in and what goes out: every body, query and answer as a Marshmallow schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, pre_load, validates_schema
from marshmallow.validate import Length, OneOf, Range

from config import DAY
from kinds import Flag, PublicKeys, Text, Timestamp, Whole, audience, no_repeats, scope
from models import EVENT_GROUPS, EVENT_TYPES, is_live, now

CENTURY = 36_525 * DAY
PAGE_SIZE_MAX = 200
DELIVERY_STATES = ("pending", "retrying", "delivered", "dead")


class AgentFields(Schema):
    """What an operator may say of an agent."""

    name = Text(max=128)
    description = Text(min=0, max=1024, lines=True, allow_none=True)
    owner = Text(min=0, max=256, allow_none=True)
    scopes = fields.List(scope(), validate=[Length(max=64), no_repeats])
    audiences = fields.List(audience(), validate=[Length(max=16), no_repeats])
    metadata = fields.Dict(
        keys=Text(max=64),
        values=Text(min=0, max=512, lines=True),
        validate=Length(max=32),
    )
    token_ttl = Whole(validate=Range(1, DAY), allow_none=True)
    rate_limit = Whole(validate=Range(1, 1_000_000), allow_none=True)
    expires_in = Whole(validate=Range(1, CENTURY), allow_none=True)
    jwks = PublicKeys(allow_none=True)


class AgentCreate(AgentFields):
    """A new agent."""

    name = Text(max=128, required=True)
    token_endpoint_auth_method = fields.String(
        load_default="client_secret_basic",
        validate=OneOf(["client_secret_basic", "client_secret_post", "private_key_jwt"]),
    )

    @validates_schema
    def _needs_keys(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if data["token_endpoint_auth_method"] == "private_key_jwt" and not data.get("jwks"):
            raise ValidationError("private_key_jwt needs the agent's public keys.", "jwks")


class AgentUpdate(AgentFields):
    """What to change of an agent: what is left out stays as it is."""


class PageQuery(Schema):
    """Which page is wanted."""

    limit = fields.Integer(load_default=50, validate=Range(1, PAGE_SIZE_MAX))
    after = fields.Integer(load_default=None, validate=Range(1, 2**63 - 1))

    @pre_load
    def _drop_empty(self, data: Mapping[str, str], **kwargs: Any) -> dict[str, str]:
        # An empty filter, as forms and templates send them, filters nothing.
        return {name: data[name] for name in data if data[name]}


class AgentQuery(PageQuery):
    """`GET /api/agents`: filters."""

    is_active = fields.Boolean(load_default=None)
    scope = Text(min=0, max=128, load_default=None)
    owner = Text(min=0, max=256, load_default=None)
    stale_days = fields.Integer(load_default=None, validate=Range(1, 36_525))
    q = Text(min=0, max=128, load_default=None)


class EventQuery(PageQuery):
    """`GET /api/events`: filters."""

    agent_id = Text(min=0, max=36, load_default=None)
    type = fields.String(load_default=None, validate=OneOf(EVENT_TYPES + EVENT_GROUPS))


class Nothing(Schema):
    """A call that takes no fields: an absent or an empty body."""


class Rotate(Schema):
    """How to rotate a client secret."""

    grace_period = Whole(load_default=0, validate=Range(0, DAY))
    revoke_tokens = Flag(load_default=False)


class Action(Schema):
    """An action by its name; the other fields belong to `rotate`."""

    action = fields.String(required=True, validate=OneOf(["rotate", "deactivate", "reactivate"]))
    grace_period = Whole(validate=Range(0, DAY))
    revoke_tokens = Flag()

    @validates_schema
    def _only_rotate_has_options(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        for name in set(data) - {"action"}:
            if data["action"] != "rotate":
                raise ValidationError("Only rotate takes this.", name)


class Answer(Schema):
    """What goes out. Every field is always there, unless its metadata says `optional`."""

    class Meta:
        """Fields may be added: clients have to bear them."""

        unknown = EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        """Marshmallow's hook. `required` changes nothing on the way out: it is what the document tells."""
        field_obj.required = not field_obj.metadata.get("optional")


class Agent(Answer):
    """An agent, as everybody who may see it sees it: never a hash."""

    id = fields.String()
    name = fields.String()
    description = fields.String(allow_none=True)
    owner = fields.String(allow_none=True)
    client_id = fields.String()
    scopes = fields.List(fields.String())
    audiences = fields.List(fields.String())
    metadata = fields.Dict(values=fields.String())
    # An agent past its time is treated as deactivated, so that is what it looks like.
    is_active = fields.Function(lambda agent: is_live(agent, now()), metadata={"type": "boolean"})
    token_ttl = fields.Integer(allow_none=True)
    rate_limit = fields.Integer(allow_none=True)
    token_endpoint_auth_method = fields.String()
    created_at = Timestamp()
    updated_at = Timestamp()
    expires_at = Timestamp(allow_none=True)
    token_count = fields.Integer()
    refresh_count = fields.Integer()
    last_activity_at = Timestamp(allow_none=True)
    last_token_issued_at = Timestamp(allow_none=True)


class AgentAnswer(Answer):
    """One agent."""

    agent = fields.Nested(Agent)


class AgentCreated(AgentAnswer):
    """The only answer, with a rotation's, that ever holds a client secret."""

    client_id = fields.String()
    client_secret = fields.String(metadata={"optional": True})  # an agent with keys has none


class AgentPage(Answer):
    """A page of agents; `next` is the `after` of the next page, or null."""

    agents = fields.List(fields.Nested(Agent))
    next = fields.String(allow_none=True)


class AgentDeactivated(AgentAnswer):
    """An agent's farewell."""

    message = fields.String()
    agent = fields.Nested(Agent)


class Rotated(Answer):
    """The new client secret, shown this once."""

    client_secret = fields.String()


class Secret(Answer):
    """A client secret, without its text."""

    id = fields.String()
    hint = fields.String()
    created_at = Timestamp()
    expires_at = Timestamp(allow_none=True)
    last_used_at = Timestamp(allow_none=True)


class Secrets(Answer):
    """The live secrets of an agent, newest first."""

    secrets = fields.List(fields.Nested(Secret))


class RotationRecord(Answer):
    """When a secret was rotated, and by whom: `self` or `admin`."""

    rotated_at = Timestamp()
    rotated_by = fields.String(validate=OneOf(["self", "admin"]))


class DailyUsage(Answer):
    """An agent's day (UTC)."""

    date = fields.Date(attribute="day")
    tokens_issued = fields.Integer()
    tokens_refreshed = fields.Integer()


class Event(Answer):
    """Something that happened: what, when, who did it and from where."""

    id = fields.String()
    type = fields.String()
    timestamp = Timestamp(attribute="created_at")
    actor = fields.String()
    address = fields.String(allow_none=True)
    request_id = fields.String(allow_none=True)
    data = fields.Dict()


class EventPage(Answer):
    """A page of events; `next` is the `after` of the next page, or null."""

    events = fields.List(fields.Nested(Event))
    next = fields.String(allow_none=True)


def _subscriptions(**options: Any) -> fields.List[str]:
    known = fields.String(validate=OneOf(EVENT_TYPES + EVENT_GROUPS))
    return fields.List(known, validate=[Length(min=1, max=32), no_repeats], **options)


def _url(**options: Any) -> Text:
    # wall.parse says more of it: this is for the document.
    return Text(max=2048, metadata={"format": "uri", "pattern": r"^https?://[!$-;=?-\[\]_a-z~]+$"}, **options)


class WebhookFields(Schema):
    """What an operator may say of a webhook."""

    name = Text(max=128)
    url = _url()
    events = _subscriptions()
    max_retries = Whole(validate=Range(0, 9))


class WebhookCreate(WebhookFields):
    """A new webhook."""

    name = Text(max=128, required=True)
    url = _url(required=True)
    events = _subscriptions(required=True)


class WebhookUpdate(WebhookFields):
    """What to change of a webhook; `is_active`: true switches on again what was switched off."""

    is_active = Flag()


class WebhookRotate(Schema):
    """For how long the old secret goes on signing beside the new one."""

    grace_period = Whole(load_default=DAY, validate=Range(0, 7 * DAY))


class Webhook(Answer):
    """A webhook, without its secret."""

    id = fields.String()
    name = fields.String()
    url = fields.String()
    events = fields.List(fields.String())
    max_retries = fields.Integer()
    is_active = fields.Boolean()
    disabled_reason = fields.String(allow_none=True)
    created_at = Timestamp()
    updated_at = Timestamp()


class WebhookAnswer(Answer):
    """One webhook."""

    webhook = fields.Nested(Webhook)


class WebhookSecret(Answer):
    """The signing secret, shown this once."""

    secret = fields.String()


class WebhookCreated(WebhookAnswer, WebhookSecret):
    """The webhook and its secret."""


class WebhookList(Answer):
    """All webhooks, newest first."""

    webhooks = fields.List(fields.Nested(Webhook))


class DeliveryQuery(PageQuery):
    """`GET /api/webhooks/{id}/deliveries`: filters."""

    status = fields.String(load_default=None, validate=OneOf(DELIVERY_STATES))


class Delivery(Answer):
    """An event on its way to a webhook, and how the last attempt went."""

    id = fields.String(attribute="pk")
    event_id = fields.String()
    type = fields.String()
    status = fields.String(validate=OneOf(DELIVERY_STATES))
    attempts = fields.Integer()
    created_at = Timestamp()
    last_attempt_at = Timestamp(allow_none=True)
    next_attempt_at = Timestamp(allow_none=True)
    response_status = fields.Integer(allow_none=True)
    response_body = fields.String(allow_none=True)
    error = fields.String(allow_none=True)


class DeliveryAnswer(Answer):
    """One delivery."""

    delivery = fields.Nested(Delivery)


class DeliveryPage(Answer):
    """A page of deliveries, newest first."""

    deliveries = fields.List(fields.Nested(Delivery))
    next = fields.String(allow_none=True)


class EventTypes(Answer):
    """What a webhook may subscribe to."""

    events = fields.List(fields.String())
    groups = fields.List(fields.String())


class KeyRotation(Schema):
    """How to rotate the signing key."""

    now = Flag(load_default=False)


class SigningKey(Answer):
    """A signing key, without its text: where it is in its life."""

    kid = fields.String()
    alg = fields.String()
    state = fields.String(validate=OneOf(["published", "signing", "retired", "gone"]))
    created_at = Timestamp()
    signs_from = Timestamp()
    gone_at = Timestamp(allow_none=True)


class KeyAnswer(Answer):
    """One signing key."""

    key = fields.Nested(SigningKey)


class KeyList(Answer):
    """The signing keys, newest first."""

    keys = fields.List(fields.Nested(SigningKey))


class Usage(Answer):
    """What an agent did: totals, rotations newest first, thirty days oldest first."""

    token_count = fields.Integer()
    refresh_count = fields.Integer()
    last_activity_at = Timestamp(allow_none=True)
    last_token_issued_at = Timestamp(allow_none=True)
    rotation_history = fields.List(fields.Nested(RotationRecord))
    daily = fields.List(fields.Nested(DailyUsage))
