"""Webhooks: the operator's routes to make them, and to see what became of each delivery."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

import bearer
import clock
import credentials
import events
import schemas
import vault
import waiting
import wall
from api import OPERATOR, Blueprint
from config import settings
from database import newest_page, writing
from models import Delivery, Webhook, db
from wire import Problem, is_text

MAX_RETRIES = 9  # as many as the schedule has

_SWITCHED_OFF = "This webhook is switched off: PATCH it with is_active true first."

room = Blueprint(
    "webhooks", __name__, url_prefix="/api", description="Webhooks (management)", security=OPERATOR
)
room.before_request(bearer.require_operator)


@room.get("/webhook-events")
@room.response(200, schemas.EventTypes)
def list_event_types() -> dict[str, Sequence[str]]:
    """List the event types and groups that a webhook may subscribe to."""
    return {"events": events.TYPES, "groups": events.GROUPS}


@room.post("/webhooks")
@room.arguments(schemas.WebhookCreate)
@room.response(201, schemas.WebhookCreated)
def create_webhook(fields: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Create a webhook.

    The response is the only one that holds its secret.
    """
    _check_url(fields)
    secret = credentials.new_webhook_secret()
    now = clock.now()
    webhook = Webhook(id=str(uuid.uuid4()), secret=vault.seal(secret), created_at=now, updated_at=now)
    for name, value in {"max_retries": MAX_RETRIES, **fields}.items():
        setattr(webhook, name, value)
    with writing():
        _record("webhook.created", webhook)
        db.session.add(webhook)
    return {"webhook": webhook, "secret": secret}, 201, {"Location": f"/api/webhooks/{webhook.id}"}


@room.get("/webhooks")
@room.response(200, schemas.WebhookList)
def list_webhooks() -> dict[str, Any]:
    """List all webhooks, newest first."""
    return {"webhooks": everyone()}


@room.get("/webhooks/<webhook_id>")
@room.response(200, schemas.WebhookAnswer)
def show_webhook(webhook_id: str) -> dict[str, Webhook]:
    """Get a webhook."""
    return {"webhook": _find(webhook_id)}


@room.route("/webhooks/<webhook_id>", methods=["PATCH", "PUT"])
@room.arguments(schemas.WebhookUpdate)
@room.response(200, schemas.WebhookAnswer)
def update_webhook(fields: dict[str, Any], webhook_id: str) -> dict[str, Webhook]:
    """Change a webhook.

    Fields left out stay as they are.
    """
    _check_url(fields)
    with writing():
        webhook = _find(webhook_id)
        for name, value in fields.items():
            setattr(webhook, name, value)
        if fields.get("is_active"):
            webhook.disabled_reason = None
        if {"is_active", "url"} & set(fields):
            webhook.failing_since = None
        webhook.updated_at = clock.now()
        _record("webhook.updated", webhook, changed=sorted(fields))
    return {"webhook": webhook}


@room.delete("/webhooks/<webhook_id>")
@room.response(204)
def delete_webhook(webhook_id: str) -> None:
    """Delete a webhook and its deliveries."""
    with writing():
        webhook = _find(webhook_id)
        db.session.execute(sa.delete(Webhook).where(Webhook.pk == webhook.pk))
        _record("webhook.deleted", webhook)


@room.post("/webhooks/<webhook_id>/rotate")
@room.arguments(schemas.WebhookRotate)
@room.response(200, schemas.WebhookSecret)
def rotate_webhook_secret(fields: dict[str, Any], webhook_id: str) -> dict[str, str]:
    """Give a webhook a new secret. Both sign during the grace period."""
    secret = credentials.new_webhook_secret()
    with writing():
        webhook = _find(webhook_id)
        grace_period = timedelta(seconds=fields["grace_period"])
        webhook.old_secret = webhook.secret if grace_period else None
        webhook.old_secret_expires_at = clock.now() + grace_period if grace_period else None
        webhook.secret = vault.seal(secret)
        webhook.updated_at = clock.now()
        _record("webhook.updated", webhook, changed=["secret"])
    return {"secret": secret}


@room.post("/webhooks/<webhook_id>/test")
@room.arguments(schemas.Nothing)
@room.response(202, schemas.DeliveryAnswer)
@room.errors(409, conflict=_SWITCHED_OFF)
def test_webhook(fields: dict[str, Any], webhook_id: str) -> dict[str, Delivery]:
    """Send a webhook a test event, whatever it subscribes to."""
    with writing():
        webhook = _switched_on(webhook_id)
        told: dict[str, Any] = {"webhook_id": webhook.id, "webhook_name": webhook.name}
        event_pk = events.record("webhook.test", only_webhook=webhook.pk, **told)
        db.session.flush()
        delivery = db.session.scalars(sa.select(Delivery).where(Delivery.event_pk == event_pk)).one()
    return {"delivery": delivery}


@room.get("/webhooks/<webhook_id>/deliveries")
@room.arguments(schemas.DeliveryQuery, location="query")
@room.response(200, schemas.DeliveryPage)
def list_deliveries(query: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """List a webhook's deliveries, newest first."""
    return page(webhook_id, query)


@room.get("/webhooks/<webhook_id>/deliveries/<delivery_id>")
@room.response(200, schemas.DeliveryAnswer)
def show_delivery(webhook_id: str, delivery_id: str) -> dict[str, Delivery]:
    """Get a delivery."""
    return {"delivery": _find_delivery(webhook_id, delivery_id)}


@room.post("/webhooks/<webhook_id>/deliveries/<delivery_id>/redeliver")
@room.arguments(schemas.Nothing)
@room.response(202, schemas.DeliveryAnswer)
@room.errors(409, conflict=_SWITCHED_OFF)
def redeliver(fields: dict[str, Any], webhook_id: str, delivery_id: str) -> dict[str, Delivery]:
    """Send a delivery again, under the same id."""
    return send_again(webhook_id, delivery_id)


def everyone() -> Sequence[Webhook]:
    """All webhooks, newest first."""
    return db.session.scalars(sa.select(Webhook).order_by(Webhook.pk.desc())).all()


def page(webhook_id: str, query: dict[str, Any]) -> dict[str, Any]:
    """A page of deliveries, as `schemas.DeliveryPage` tells it; `query` as `DeliveryQuery` loads it."""
    statement = sa.select(Delivery).where(Delivery.webhook_pk == _find(webhook_id).pk)
    if query["status"] is not None:
        statement = statement.where(Delivery.status == query["status"])
    found, following = newest_page(statement, Delivery.pk, query)
    return {"deliveries": found, "next": following}


def send_again(webhook_id: str, delivery_id: str) -> dict[str, Delivery]:
    """Make the delivery due now, as if it had never been tried.

    :raises Problem: 404; 409 when the webhook is switched off.
    """
    with writing():
        _switched_on(webhook_id)
        delivery = _find_delivery(webhook_id, delivery_id)
        delivery.status, delivery.attempts, delivery.next_attempt_at = "pending", 0, clock.now()
        delivery.response_status = delivery.response_body = delivery.error = None
    return {"delivery": delivery}


def _check_url(fields: dict[str, Any]) -> None:
    if "url" not in fields:
        return
    allow_private = settings().webhook_allow_private
    try:
        target = wall.parse(fields["url"], allow_private=allow_private)
        if not allow_private:
            waiting.step_aside()
            wall.resolve(target, allow_private=False)
    except wall.Refused as refusal:
        raise Problem(400, "invalid_request", f"'url': {refusal}", fields={"url": [str(refusal)]}) from None


def _find(webhook_id: str) -> Webhook:
    # PostgreSQL has no NUL in texts.
    known = is_text(webhook_id)
    webhook = db.session.scalar(sa.select(Webhook).where(Webhook.id == webhook_id)) if known else None
    if webhook is None:
        raise Problem(404, "not_found", "No webhook has this id.")
    return webhook


def _switched_on(webhook_id: str) -> Webhook:
    webhook = _find(webhook_id)
    if not webhook.is_active:
        raise Problem(409, "conflict", _SWITCHED_OFF)
    return webhook


def _find_delivery(webhook_id: str, delivery_id: str) -> Delivery:
    pk = int(delivery_id) if delivery_id.isascii() and delivery_id.isdigit() and len(delivery_id) < 19 else 0
    mine = sa.select(Delivery).where(Delivery.webhook_pk == _find(webhook_id).pk, Delivery.pk == pk)
    delivery = db.session.scalar(mine)
    if delivery is None:
        raise Problem(404, "not_found", "This webhook has no delivery with this id.")
    return delivery


def _record(event: str, webhook: Webhook, **told: Any) -> None:
    events.record(event, **{"webhook_id": webhook.id, "webhook_name": webhook.name, **told})
