"""Agents: the operator's routes, the agent's own, and the changes that both make."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from flask import g, has_request_context, request

import credentials
import events
import schemas
from api import BY_AGENT, BY_OPERATOR, Blueprint, Problem
from config import settings
from database import newest_page, reading, writing
from models import Agent, ClientSecret, RefreshFamily, Rotation, UsageDay, has_word, now

USAGE_DAYS = 30
ROTATIONS_SHOWN = 100
REFUSAL_PAUSE = 0.05  # seconds; slows down an agent that tries again without waiting
ROTATIONS_A_MINUTE = 6  # by the agent itself: each costs a hash of tens of milliseconds
_turns = [threading.Lock() for _ in range(64)]
_NO_SECRET = "This agent has no client secret: PATCH its jwks to give it other keys."
_NEEDS_KEYS = "This agent signs in by its keys: give it other keys, not none."
_EXPIRED = "This agent has expired: give it a new expires_in first."
# An id is a UUID. `me` is shorter: a method that it lacks is a 405, not a management route.
_ONE = "/<string(minlength=3):agent_id>"

management = Blueprint(
    "agents", __name__, url_prefix="/api/agents", description="Agents (management)", security=BY_OPERATOR
)
self_service = Blueprint(
    "me", __name__, url_prefix="/api/agents/me", description="Self-service of an agent", security=BY_AGENT
)


@management.post("")
@management.arguments(schemas.AgentCreate)
@management.response(201, schemas.AgentCreated)
def create_agent(fields: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Register an agent.

    No other response holds its client secret.
    """
    created = create(fields)
    return created, 201, {"Location": settings().path(f"/api/agents/{created['agent'].id}")}


@management.get("")
@management.arguments(schemas.AgentQuery, location="query")
@management.response(200, schemas.AgentPage)
def list_agents(query: dict[str, Any]) -> dict[str, Any]:
    """List agents, newest first."""
    return page(query)


@management.get(_ONE)
@management.response(200, schemas.AgentResponse)
def show_agent(agent_id: str) -> dict[str, Any]:
    """Get an agent."""
    with reading() as connection:
        return {"agent": find(connection, agent_id)}


@management.route(_ONE, methods=["PATCH", "PUT"])
@management.arguments(schemas.AgentUpdate(partial=True))
@management.response(200, schemas.AgentResponse)
@management.errors(409, conflict=_NEEDS_KEYS)
def update_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Change an agent.

    Fields left out stay as they are.
    """
    with _changing(agent_id) as (connection, agent):
        if "jwks" in fields and not fields["jwks"] and agent.token_endpoint_auth_method == "private_key_jwt":
            raise Problem(409, "conflict", _NEEDS_KEYS)
        # As after a reactivation, tokens issued before the expiry stay invalid.
        if "expires_in" in fields and agent.expires_at is not None and agent.expires_at <= now():
            _end_tokens(connection, agent)
        agent = _set(connection, agent, **_columns(fields))
        events.record(connection, "agent.updated", agent, changed=sorted(fields))
    return {"agent": agent}


@management.delete(_ONE)
@management.response(204)
def delete_agent(agent_id: str) -> None:
    """Delete an agent and all its tokens."""
    delete(agent_id)


@management.post(_ONE)
@management.arguments(schemas.Action)
@management.response(200)
@management.alt_response(200, schema={"oneOf": [schemas.Rotated, schemas.AgentResponse]})
@management.errors(409, conflict=_EXPIRED)
def act_on_agent(fields: dict[str, Any], agent_id: str) -> Any:
    """Rotate, deactivate or reactivate an agent, by the name of the action."""
    action = fields.pop("action")
    if action == "rotate":
        return schemas.Rotated().dump(rotate(agent_id, **fields))
    act = deactivate if action == "deactivate" else reactivate
    return schemas.AgentResponse().dump(act(agent_id))


@management.post(_ONE + "/rotate")
@management.arguments(schemas.Rotate)
@management.response(200, schemas.Rotated)
@management.errors(409, conflict=_NO_SECRET)
def rotate_secret(fields: dict[str, Any], agent_id: str) -> dict[str, str]:
    """Give an agent a new client secret."""
    return rotate(agent_id, **fields)


@management.post(_ONE + "/deactivate")
@management.arguments(schemas.Empty)
@management.response(200, schemas.AgentResponse)
def deactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Deactivate an agent and end all its tokens."""
    return deactivate(agent_id)


@management.post(_ONE + "/reactivate")
@management.arguments(schemas.Empty)
@management.response(200, schemas.AgentResponse)
@management.errors(409, conflict=_EXPIRED)
def reactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Reactivate an agent. Its old tokens stay invalid."""
    return reactivate(agent_id)


@management.get(_ONE + "/secrets")
@management.response(200, schemas.Secrets)
def list_secrets(agent_id: str) -> dict[str, Any]:
    """List an agent's valid client secrets, without their text."""
    with reading() as connection:
        secrets = sa.select(ClientSecret).where(*_valid_secrets(find(connection, agent_id)))
        return {"secrets": connection.execute(secrets.order_by(ClientSecret.pk.desc())).all()}


@management.delete(_ONE + "/secrets/<secret_id>")
@management.response(204)
def delete_secret(agent_id: str, secret_id: str) -> None:
    """Delete a client secret at once, and end the refresh tokens that it was used for."""
    with _changing(agent_id, reserve=1) as (connection, agent):
        deleted = sa.delete(ClientSecret).where(*_valid_secrets(agent), ClientSecret.id == secret_id)
        hint = connection.scalar(deleted.returning(ClientSecret.hint))
        if hint is None:
            raise Problem(404, "not_found", "This agent has no valid secret with this id.")
        # Whoever had the secret may have its refresh tokens too.
        of_secret = RefreshFamily.agent_pk == agent.pk, RefreshFamily.secret_hint == hint
        connection.execute(sa.delete(RefreshFamily).where(*of_secret))
        _set(connection, agent, updated_at=now())
        events.record(connection, "agent.updated", agent, changed=["secrets"])


@self_service.get("")
@self_service.response(200, schemas.AgentResponse)
def show_me() -> dict[str, Any]:
    """Get the calling agent."""
    return {"agent": g.agent}


@self_service.get("/usage")
@self_service.response(200, schemas.Usage)
def show_my_usage() -> dict[str, Any]:
    """Get the calling agent's usage: totals, rotations, and the last thirty days."""
    with reading() as connection:
        return {
            **g.agent._asdict(),
            "rotation_history": _rotations(connection, g.agent),
            "daily": _daily_usage(connection, g.agent),
        }


@self_service.post("/rotate")
@self_service.arguments(schemas.Rotate)
@self_service.response(200, schemas.Rotated)
@self_service.errors(409, conflict=_NO_SECRET)
def rotate_my_secret(fields: dict[str, Any]) -> dict[str, str]:
    """Give the calling agent a new client secret."""
    return _rotate_own(**fields)


@self_service.post("/deactivate")
@self_service.arguments(schemas.Empty)
@self_service.response(200, schemas.AgentDeactivated)
def deactivate_me(fields: dict[str, Any]) -> dict[str, Any]:
    """Deactivate the calling agent. Only an operator can reactivate it."""
    message = "This agent is deactivated. Only an operator can reactivate it."
    return {"message": message, **deactivate(g.agent.id)}


@self_service.delete("")
@self_service.response(204)
def delete_me() -> None:
    """Delete the calling agent and all its tokens."""
    delete(g.agent.id)


def create(fields: dict[str, Any]) -> dict[str, Any]:
    """Register an agent; return the fields of `schemas.AgentCreated`.

    :param fields: as `schemas.AgentCreate` loads them.
    """
    by_key = fields["token_endpoint_auth_method"] == "private_key_jwt"
    secret = None if by_key else credentials.new_client_secret(settings().bcrypt_cost)
    row = {"id": str(uuid.uuid4()), "client_id": credentials.new_client_id(), "created_at": now()}
    row |= {"scopes": [], "audiences": [], "metadata": {}, **_columns(fields)}
    with writing() as connection:
        agent = connection.execute(sa.insert(Agent).values(row).returning(Agent)).one()
        if secret:
            _add_secret(connection, agent, secret)
        events.record(connection, "agent.created", agent)
    created = {"agent": agent, "client_id": agent.client_id}
    return created | {"client_secret": secret.text} if secret else created


def page(query: dict[str, Any]) -> dict[str, Any]:
    """Return a page of agents; `query` as `schemas.AgentQuery` loads it."""
    with reading() as connection:
        agents, after = newest_page(connection, sa.select(Agent).where(*_filters(query)), Agent.pk, query)
    return {"agents": agents, "next": after}


def find(connection: sa.Connection, agent_id: str) -> Any:
    """Read an agent by its id or its client id.

    :raises Problem: 404.
    """
    column = Agent.client_id if credentials.is_client_id(agent_id) else Agent.id
    agent = connection.execute(sa.select(Agent).where(column == agent_id)).first()
    if agent is None:
        raise Problem(404, "not_found", "No agent has this id.")
    return agent


def rotate(
    agent_id: str, *, rotated_by: str = "admin", grace_period: int = 0, revoke_tokens: bool = False
) -> dict[str, str]:
    """Give an agent a new client secret, and return it.

    :param grace_period: seconds for which the old secrets stay valid.
    :param revoke_tokens: end every token of the agent, for a leak.
    :raises Problem: 404; 409 when the agent has no client secret; 429 when it rotates too often.
    """
    with reading() as connection:
        agent = g.agent if rotated_by == "self" else find(connection, agent_id)
        _check_rotation(connection, agent, rotated_by)
    # Before the transaction: bcrypt under the write lock would block every other writer.
    secret = credentials.new_client_secret(settings().bcrypt_cost)
    _rotate(agent_id, secret, rotated_by, grace_period, revoke_tokens)
    return {"client_secret": secret.text}


def _rotate_own(**fields: Any) -> dict[str, str]:
    """Rotate the calling agent's secret, one request at a time: refused ones must not cost a hash."""
    try:
        with _turns[hash(g.agent.id) % len(_turns)]:
            return rotate(g.agent.id, rotated_by="self", **fields)
    except Problem as problem:
        if problem.status == 429:
            time.sleep(REFUSAL_PAUSE)
        raise


def _rotate(
    agent_id: str, secret: credentials.NewSecret, rotated_by: str, grace_period: int, revoke_tokens: bool
) -> None:
    with _changing(agent_id, reserve=1 if revoke_tokens else None) as (connection, agent):
        _check_rotation(connection, agent, rotated_by)
        _end_secrets(connection, agent, grace_period)
        _add_secret(connection, agent, secret)
        _add_rotation(connection, agent, rotated_by)
        if rotated_by == "self":
            credentials.count_against_limit(connection, agent)
        if revoke_tokens:
            _end_tokens(connection, agent)
        activity = {"last_activity_at": now()} if rotated_by == "self" else {}
        _set(connection, agent, updated_at=now(), **activity)
        data: dict[str, Any] = {"grace_period": grace_period, "revoke_tokens": revoke_tokens}
        events.record(connection, "agent.credentials_rotated", agent, rotated_by=rotated_by, **data)


def _check_rotation(connection: sa.Connection, agent: Any, rotated_by: str) -> None:
    if agent.token_endpoint_auth_method == "private_key_jwt":
        raise Problem(409, "conflict", _NO_SECRET)
    if rotated_by == "self":
        credentials.refuse_over_limit(connection, agent)
        own = sa.select(Rotation.rotated_at).where(
            Rotation.agent_pk == agent.pk, Rotation.rotated_by == "self"
        )
        sixth = connection.scalar(own.order_by(Rotation.pk.desc()).offset(ROTATIONS_A_MINUTE - 1).limit(1))
        if sixth is not None and timedelta(0) <= (since := now() - sixth) < credentials.MINUTE:
            text = f"An agent may rotate its secret {ROTATIONS_A_MINUTE} times a minute."
            raise credentials.too_many_requests(text, credentials.MINUTE - since)


def deactivate(agent_id: str) -> dict[str, Any]:
    """Deactivate an agent and end its tokens."""
    with _changing(agent_id, reserve=1) as (connection, agent):
        if agent.is_active:
            _end_tokens(connection, agent)
            agent = _set(connection, agent, is_active=False, updated_at=now())
            events.record(connection, "agent.deactivated", agent)
        return {"agent": agent}


def reactivate(agent_id: str) -> dict[str, Any]:
    """Reactivate an agent.

    :raises Problem: 404; 409 when the agent has expired.
    """
    with _changing(agent_id) as (connection, agent):
        if agent.expires_at is not None and agent.expires_at <= now():
            raise Problem(409, "conflict", _EXPIRED)
        if not agent.is_active:
            agent = _set(connection, agent, is_active=True, updated_at=now())
            events.record(connection, "agent.reactivated", agent)
        return {"agent": agent}


def delete(agent_id: str) -> None:
    """Delete an agent and all its tokens."""
    with _changing(agent_id, reserve=1) as (connection, agent):
        events.record(connection, "agent.deleted", agent)
        connection.execute(sa.delete(Agent).where(Agent.pk == agent.pk))


@contextmanager
def _changing(agent_id: str, *, reserve: float | None = None) -> Iterator[tuple[sa.Connection, Any]]:
    """Begin a write transaction and read the agent in it."""
    is_own = has_request_context() and request.blueprint == self_service.name
    if reserve and is_own:
        reserve = 0.5  # the other half is the operator's
    with writing(reserve=reserve) as connection:
        # The calling agent may have been deactivated, or its token revoked, while it waited for the lock.
        if is_own:
            g.guard()
        yield connection, find(connection, agent_id)


def _columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn the fields of a request into columns: `expires_in` becomes `expires_at`."""
    columns = {**fields, "updated_at": now()}
    if "expires_in" in columns:
        seconds = columns.pop("expires_in")
        columns["expires_at"] = None if seconds is None else now() + timedelta(seconds=seconds)
    return columns


def _set(connection: sa.Connection, agent: Any, **columns: Any) -> Any:
    changed = sa.update(Agent).where(Agent.pk == agent.pk).values(columns).returning(Agent)
    return connection.execute(changed).one()


def _add_secret(connection: sa.Connection, agent: Any, secret: credentials.NewSecret) -> None:
    row = {"id": str(uuid.uuid4()), "agent_pk": agent.pk, "hint": secret.hint, "hash": secret.hash}
    connection.execute(sa.insert(ClientSecret), {**row, "created_at": now()})


def _end_secrets(connection: sa.Connection, agent: Any, grace_period: int) -> None:
    if not grace_period:
        connection.execute(sa.delete(ClientSecret).where(ClientSecret.agent_pk == agent.pk))
        return
    ends_at = now() + timedelta(seconds=grace_period)
    ends_later = sa.or_(ClientSecret.expires_at.is_(None), ClientSecret.expires_at > ends_at)
    connection.execute(
        sa.update(ClientSecret).where(*_valid_secrets(agent), ends_later).values(expires_at=ends_at)
    )


def _valid_secrets(agent: Any) -> tuple[sa.ColumnElement[bool], ...]:
    return ClientSecret.agent_pk == agent.pk, ClientSecret.valid(now())


def _add_rotation(connection: sa.Connection, agent: Any, rotated_by: str) -> None:
    of_agent = Rotation.agent_pk == agent.pk
    shown = sa.select(Rotation.pk).where(of_agent).order_by(Rotation.pk.desc()).limit(ROTATIONS_SHOWN - 1)
    connection.execute(sa.delete(Rotation).where(of_agent, Rotation.pk.not_in(shown)))
    row = {"agent_pk": agent.pk, "rotated_at": now(), "rotated_by": rotated_by}
    connection.execute(sa.insert(Rotation), row)


def _end_tokens(connection: sa.Connection, agent: Any) -> None:
    # The rows of its refresh tokens, of which there may be thousands, are left to the clean-up.
    _set(connection, agent, token_version=Agent.token_version + 1)


def _filters(query: dict[str, Any]) -> list[sa.ColumnElement[bool]]:
    moment = now()
    filters: list[sa.ColumnElement[bool]] = []
    if query["is_active"] is not None:
        filters.append(Agent.active(moment) if query["is_active"] else sa.not_(Agent.active(moment)))
    if query["scope"] is not None:
        filters.append(has_word(Agent.scopes, query["scope"]))
    if query["owner"] is not None:
        filters.append(Agent.owner == query["owner"])
    if query["stale_days"] is not None:
        since = moment - timedelta(days=query["stale_days"])
        filters.append(sa.func.coalesce(Agent.last_activity_at, Agent.created_at) < since)
    if query["q"] is not None:
        columns = (Agent.name, Agent.description, Agent.owner)
        matches = [column.icontains(query["q"], autoescape=True) for column in columns]
        if query["q"].startswith("cid_") and len(query["q"]) >= 8:  # four random characters
            matches.append(Agent.client_id.startswith(query["q"], autoescape=True))
        filters.append(sa.or_(*matches))
    return filters


def _rotations(connection: sa.Connection, agent: Any) -> Sequence[Any]:
    statement = sa.select(Rotation).where(Rotation.agent_pk == agent.pk).order_by(Rotation.pk.desc())
    return connection.execute(statement.limit(ROTATIONS_SHOWN)).all()


def _daily_usage(connection: sa.Connection, agent: Any) -> list[Any]:
    """Return a row for each of the last thirty days, today last; days without tokens have zeros."""
    today = now().date()
    days = [today - timedelta(days=back) for back in range(USAGE_DAYS - 1, -1, -1)]
    statement = sa.select(UsageDay).where(UsageDay.agent_pk == agent.pk, UsageDay.day >= days[0])
    used = {row.day: row for row in connection.execute(statement)}
    return [used.get(day) or {"day": day, "tokens_issued": 0, "tokens_refreshed": 0} for day in days]
