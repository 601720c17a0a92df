"""The operator's routes beside agents: signing keys."""

from __future__ import annotations

from typing import Any

import bearer
import keys
import schemas
from models import writing
from wire import Blueprint

blueprint = Blueprint("keys", __name__, url_prefix="/api/keys", description="Signing keys (management)")
blueprint.before_request(bearer.require_operator)


@blueprint.get("")
@blueprint.response(200, schemas.KeyList)
def list_keys() -> dict[str, Any]:
    """The signing keys, newest first, and where each is in its life."""
    return {"keys": keys.list_keys()}


@blueprint.post("/rotate")
@blueprint.arguments(schemas.KeyRotation)
@blueprint.response(200, schemas.KeyAnswer)
def rotate_key(fields: dict[str, Any]) -> dict[str, Any]:
    """Publish a new key, which signs once every verifier can know it; at once, for a leak, with `now`."""
    with writing():
        keys.rotate(at_once=fields["now"])
        newest = keys.list_keys()[0]
    return {"key": newest}
