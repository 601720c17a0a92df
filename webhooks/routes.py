"""Webhooks: the operator's routes for webhooks and their deliveries."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

import credentials
import events
import schemas
from api import BY_OPERATOR, Blueprint, Problem
from config import settings
from database import newest_page, reading, writing
from models import EVENT_GROUPS, EVENT_TYPES, Delivery, EncryptedText, Event, Webhook, now
from webhooks import ssrf

MAX_RETRIES = 9  # the length of delivery.RETRY_DELAYS
# A secret is decrypted whenever it is read, which may fail.
WITHOUT_SECRETS = [
    column for column in Webhook.__table__.columns if not isinstance(column.type, EncryptedText)
]
_DELIVERIES = sa.select(Delivery, Event.id.label("event_id"), Event.type).join(Event)
_SWITCHED_OFF = "This webhook is switched off: PATCH it with is_active true first."

bp = Blueprint(
    "webhooks", __name__, url_prefix="/api", description="Webhooks (management)", security=BY_OPERATOR
)


@bp.get("/webhook-events")
@bp.response(200, schemas.EventTypes)
def list_event_types() -> dict[str, Sequence[str]]:
    """List the event types and groups that a webhook may subscribe to."""
    return {"events": EVENT_TYPES, "groups": EVENT_GROUPS}


@bp.post("/webhooks")
@bp.arguments(schemas.WebhookCreate)
@bp.response(201, schemas.WebhookCreated)
def create_webhook(fields: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Create a webhook.

    No other response holds its secret.
    """
    _check_url(fields)
    secret = credentials.new_webhook_secret()
    webhook_id = str(uuid.uuid4())
    row = {"id": webhook_id, "secret": secret, "created_at": now(), "updated_at": now()}
    row |= {"max_retries": MAX_RETRIES, **fields}
    with writing() as connection:
        # Recorded before the insert: a webhook is not notified of its own creation.
        record_event(connection, "webhook.created", webhook_id, fields["name"])
        webhook = connection.execute(sa.insert(Webhook).values(row).returning(*WITHOUT_SECRETS)).one()
    return (
        {"webhook": webhook, "secret": secret},
        201,
        {"Location": settings().path(f"/api/webhooks/{webhook.id}")},
    )


@bp.get("/webhooks")
@bp.response(200, schemas.WebhookList)
def list_webhooks() -> dict[str, Any]:
    """List all webhooks, newest first."""
    return list_all()


@bp.get("/webhooks/<webhook_id>")
@bp.response(200, schemas.WebhookResponse)
def show_webhook(webhook_id: str) -> dict[str, Any]:
    """Get a webhook."""
    with reading() as connection:
        return {"webhook": _find(connection, webhook_id)}


@bp.route("/webhooks/<webhook_id>", methods=["PATCH", "PUT"])
@bp.arguments(schemas.WebhookUpdate(partial=True))
@bp.response(200, schemas.WebhookResponse)
def update_webhook(fields: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """Change a webhook.

    Fields left out stay as they are.
    """
    _check_url(fields)
    changes = {**fields, "updated_at": now()}
    if fields.get("is_active"):
        changes["disabled_reason"] = None
    if {"is_active", "url"} & set(fields):
        changes["failing_since"] = None
    return {"webhook": _change(webhook_id, sorted(fields), **changes)}


@bp.delete("/webhooks/<webhook_id>")
@bp.response(204)
def delete_webhook(webhook_id: str) -> None:
    """Delete a webhook and its deliveries."""
    with writing() as connection:
        webhook = _find(connection, webhook_id)
        connection.execute(sa.delete(Webhook).where(Webhook.pk == webhook.pk))
        record_event(connection, "webhook.deleted", webhook.id, webhook.name)


@bp.post("/webhooks/<webhook_id>/rotate")
@bp.arguments(schemas.WebhookRotate)
@bp.response(200, schemas.WebhookSecret)
def rotate_webhook_secret(fields: dict[str, Any], webhook_id: str) -> dict[str, str]:
    """Give a webhook a new secret. Both sign during the grace period."""
    secret = credentials.new_webhook_secret()
    grace_period = timedelta(seconds=fields["grace_period"])
    old: dict[str, Any] = {"old_secret": None, "old_secret_expires_at": None}
    if grace_period:
        old = {"old_secret": Webhook.secret, "old_secret_expires_at": now() + grace_period}
    _change(webhook_id, ["secret"], secret=secret, updated_at=now(), **old)
    return {"secret": secret}


@bp.post("/webhooks/<webhook_id>/test")
@bp.arguments(schemas.Empty)
@bp.response(202, schemas.DeliveryResponse)
@bp.errors(409, conflict=_SWITCHED_OFF)
def test_webhook(fields: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """Send a webhook a test event, whatever it subscribes to."""
    with writing() as connection:
        webhook = _find_active(connection, webhook_id)
        event_pk = record_event(connection, "webhook.test", webhook.id, webhook.name, only_webhook=webhook.pk)
        delivery = connection.execute(_DELIVERIES.where(Delivery.event_pk == event_pk)).one()
    return {"delivery": delivery}


@bp.get("/webhooks/<webhook_id>/deliveries")
@bp.arguments(schemas.DeliveryQuery, location="query")
@bp.response(200, schemas.DeliveryPage)
def list_deliveries(query: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """List a webhook's deliveries, newest first."""
    return page(webhook_id, query)


@bp.get("/webhooks/<webhook_id>/deliveries/<delivery_id>")
@bp.response(200, schemas.DeliveryResponse)
def show_delivery(webhook_id: str, delivery_id: str) -> dict[str, Any]:
    """Get a delivery."""
    with reading() as connection:
        return {"delivery": _find_delivery(connection, webhook_id, delivery_id)}


@bp.post("/webhooks/<webhook_id>/deliveries/<delivery_id>/redeliver")
@bp.arguments(schemas.Empty)
@bp.response(202, schemas.DeliveryResponse)
@bp.errors(409, conflict=_SWITCHED_OFF)
def redeliver(fields: dict[str, Any], webhook_id: str, delivery_id: str) -> dict[str, Any]:
    """Send a delivery again, under the same id."""
    return make_due(webhook_id, delivery_id)


def list_all() -> dict[str, Any]:
    """Return all webhooks, newest first."""
    with reading() as connection:
        return {"webhooks": connection.execute(sa.select(*WITHOUT_SECRETS).order_by(Webhook.pk.desc())).all()}


def page(webhook_id: str, query: dict[str, Any]) -> dict[str, Any]:
    """Return a page of a webhook's deliveries; `query` as `schemas.DeliveryQuery` loads it."""
    with reading() as connection:
        statement = _DELIVERIES.where(Delivery.webhook_pk == _find(connection, webhook_id).pk)
        if query["status"] is not None:
            statement = statement.where(Delivery.status == query["status"])
        deliveries, after = newest_page(connection, statement, Delivery.pk, query)
    return {"deliveries": deliveries, "next": after}


def make_due(webhook_id: str, delivery_id: str) -> dict[str, Any]:
    """Make a delivery due now, with no attempts made.

    :raises Problem: 404; 409 when the webhook is switched off.
    """
    columns = {"status": "pending", "attempts": 0, "next_attempt_at": now()}
    columns |= dict.fromkeys(("response_status", "response_body", "error"))
    with writing() as connection:
        _find_active(connection, webhook_id)
        pk = _find_delivery(connection, webhook_id, delivery_id).pk
        connection.execute(sa.update(Delivery).where(Delivery.pk == pk).values(columns))
        return {"delivery": _find_delivery(connection, webhook_id, delivery_id)}


def _check_url(fields: dict[str, Any]) -> None:
    if "url" not in fields:
        return
    allow_private = settings().webhook_allow_private
    try:
        target = ssrf.parse(fields["url"], allow_private=allow_private)
        if not allow_private:
            ssrf.resolve(target, ssrf.deadline(), allow_private=False)
    except ssrf.Refused as refusal:
        raise Problem(400, "invalid_request", f"'url': {refusal}", fields={"url": [str(refusal)]}) from None


def _find(connection: sa.Connection, webhook_id: str) -> Any:
    webhook = connection.execute(sa.select(*WITHOUT_SECRETS).where(Webhook.id == webhook_id)).first()
    if webhook is None:
        raise Problem(404, "not_found", "No webhook has this id.")
    return webhook


def _find_active(connection: sa.Connection, webhook_id: str) -> Any:
    webhook = _find(connection, webhook_id)
    if not webhook.is_active:
        raise Problem(409, "conflict", _SWITCHED_OFF)
    return webhook


def _find_delivery(connection: sa.Connection, webhook_id: str, delivery_id: str) -> Any:
    pk = int(delivery_id) if delivery_id.isascii() and delivery_id.isdigit() and len(delivery_id) < 19 else 0
    of_webhook = _DELIVERIES.where(Delivery.webhook_pk == _find(connection, webhook_id).pk)
    delivery = connection.execute(of_webhook.where(Delivery.pk == pk)).first()
    if delivery is None:
        raise Problem(404, "not_found", "This webhook has no delivery with this id.")
    return delivery


def _change(webhook_id: str, changed: list[str], **columns: Any) -> Any:
    with writing() as connection:
        pk = _find(connection, webhook_id).pk
        statement = sa.update(Webhook).where(Webhook.pk == pk).values(columns).returning(*WITHOUT_SECRETS)
        webhook = connection.execute(statement).one()
        record_event(connection, "webhook.updated", webhook.id, webhook.name, changed=changed)
    return webhook


def record_event(connection: sa.Connection, event: str, webhook_id: str, name: str, **data: Any) -> int:
    """Record an event about a webhook; return its number."""
    return events.record(connection, event, webhook_id=webhook_id, webhook_name=name, **data)
