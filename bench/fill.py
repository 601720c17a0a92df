"""Fill a database with agents and refresh tokens, as if a large site had used it for a week."""

from __future__ import annotations

import secrets
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sqlalchemy as sa

import credentials
from app import create_app
from config import Settings, settings
from database import writing
from models import Agent, ClientSecret, RefreshFamily, now

BATCH = 10_000


def fill(instance: Path, agents: int, refresh_tokens: int) -> tuple[list[str], str]:
    """Make an instance with that many agents and refresh tokens.

    :returns: client ids of up to a thousand agents, and the secret that all share: to hash one for each
        would take hours.
    """
    app = create_app(Settings.from_env({"LANYARD_INSTANCE": str(instance)}), serving=True)
    with app.app_context():
        secret = credentials.new_client_secret(settings().bcrypt_cost)
        _insert(sa.insert(Agent), map(_agent, range(1, agents + 1)))
        _insert(sa.insert(ClientSecret), (_secret(pk, secret) for pk in range(1, agents + 1)))
        _insert(sa.insert(RefreshFamily), (_family(1 + n % agents, n) for n in range(refresh_tokens)))
        with writing() as connection:
            some = sa.select(Agent.client_id).order_by(sa.func.random()).limit(1000)
            return list(connection.scalars(some)), secret.text


def _insert(statement: sa.Insert, rows: Iterator[dict[str, Any]]) -> None:
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        with writing(durable=False) as connection:
            connection.execute(statement, batch)


def _agent(pk: int) -> dict[str, Any]:
    moment = now()
    return {
        "pk": pk,
        "id": str(uuid.uuid4()),
        "client_id": credentials.new_client_id(),
        "name": f"agent {pk}",
        "scopes": ["read", "write"],
        "audiences": [],
        "metadata": {"team": f"team {pk % 50}"},
        "token_endpoint_auth_method": "client_secret_basic",
        "created_at": moment,
        "updated_at": moment,
    }


def _secret(agent_pk: int, secret: credentials.NewSecret) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "agent_pk": agent_pk,
        "hint": secret.hint,
        "hash": secret.hash,
        "created_at": now(),
    }


def _family(agent_pk: int, number: int) -> dict[str, Any]:
    moment = now()
    return {
        "id": credentials.new_family_id(),
        "agent_pk": agent_pk,
        "token_hash": secrets.token_bytes(32),
        "token_version": 1,
        "scopes": ["read"],
        "audiences": ["http://localhost:8080"],
        "issued_at": moment,
        # Expire over the next week.
        "expires_at": moment + timedelta(seconds=3600 + number % 600_000),
        "ends_at": moment + timedelta(days=30),
    }
