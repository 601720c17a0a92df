"""Agents: the operator's routes, the agent's own, and what happens to an agent."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from flask import g

import credentials
import events
import schemas
from api import BY_AGENT, BY_OPERATOR, Blueprint, Problem
from config import settings
from database import newest_page, reading, writing
from models import Agent, ClientSecret, RefreshFamily, Rotation, UsageDay, has_word, now

USAGE_DAYS = 30
ROTATIONS_SHOWN = 100
_NO_SECRET = "This agent has no client secret: PATCH its jwks to give it other keys."
_EXPIRED = "This agent has expired: give it a new expires_in first."
# An id is a UUID. `me` is shorter: what it does not answer is a 405, and not the operator's business.
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

    The response is the only one that holds its client secret.
    """
    created = create(fields)
    return created, 201, {"Location": f"/api/agents/{created['agent'].id}"}


@management.get("")
@management.arguments(schemas.AgentQuery, location="query")
@management.response(200, schemas.AgentPage)
def list_agents(query: dict[str, Any]) -> dict[str, Any]:
    """List agents, newest first."""
    return page(query)


@management.get(_ONE)
@management.response(200, schemas.AgentAnswer)
def show_agent(agent_id: str) -> dict[str, Any]:
    """Get an agent."""
    with reading() as connection:
        return {"agent": find(connection, agent_id)}


@management.route(_ONE, methods=["PATCH", "PUT"])
@management.arguments(schemas.AgentUpdate)
@management.response(200, schemas.AgentAnswer)
@management.errors(409, conflict="This agent proves itself by its keys: give it others, not none.")
def update_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Change an agent.

    Fields left out stay as they are.
    """
    with writing() as connection:
        agent = update(connection, find(connection, agent_id), fields)
    return {"agent": agent}


@management.delete(_ONE)
@management.response(204)
def delete_agent(agent_id: str) -> None:
    """Delete an agent and all its tokens."""
    delete_by_operator(agent_id)


@management.post(_ONE)
@management.arguments(schemas.Action)
@management.response(200)
@management.alt_response(200, schema={"oneOf": [schemas.Rotated, schemas.AgentAnswer]})
@management.errors(409, conflict=_EXPIRED)
def act_on_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Rotate, deactivate or reactivate an agent, by the name of the action."""
    action = fields.pop("action")
    if action == "rotate":
        rotated: dict[str, Any] = schemas.Rotated().dump(rotate_by_operator(agent_id, fields))
        return rotated
    act = deactivate if action == "deactivate" else reactivate
    changed: dict[str, Any] = schemas.AgentAnswer().dump(change(agent_id, act))
    return changed


@management.post(_ONE + "/rotate")
@management.arguments(schemas.Rotate)
@management.response(200, schemas.Rotated)
@management.errors(409, conflict=_NO_SECRET)
def rotate_secret(fields: dict[str, Any], agent_id: str) -> dict[str, str]:
    """Give an agent a new client secret."""
    return rotate_by_operator(agent_id, fields)


@management.post(_ONE + "/deactivate")
@management.arguments(schemas.Nothing)
@management.response(200, schemas.AgentAnswer)
def deactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Deactivate an agent and end all its tokens."""
    return change(agent_id, deactivate)


@management.post(_ONE + "/reactivate")
@management.arguments(schemas.Nothing)
@management.response(200, schemas.AgentAnswer)
@management.errors(409, conflict=_EXPIRED)
def reactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Reactivate an agent. Its old tokens stay dead."""
    return change(agent_id, reactivate)


@management.get(_ONE + "/secrets")
@management.response(200, schemas.Secrets)
def list_secrets(agent_id: str) -> dict[str, Any]:
    """List an agent's live client secrets, without their text."""
    with reading() as connection:
        mine = _live_secrets(find(connection, agent_id))
        secrets = sa.select(ClientSecret).where(*mine).order_by(ClientSecret.pk.desc())
        return {"secrets": connection.execute(secrets).all()}


@management.delete(_ONE + "/secrets/<secret_id>")
@management.response(204)
def delete_secret(agent_id: str, secret_id: str) -> None:
    """Delete a client secret at once."""
    with writing() as connection:
        agent = find(connection, agent_id)
        mine = _live_secrets(agent)
        if not connection.execute(
            sa.delete(ClientSecret).where(*mine, ClientSecret.id == secret_id)
        ).rowcount:
            raise Problem(404, "not_found", "This agent has no live secret with this id.")
        _set(connection, agent, updated_at=now())
        events.record(connection, "agent.updated", agent, changed=["secrets"])


@self_service.get("")
@self_service.response(200, schemas.AgentAnswer)
def show_me() -> dict[str, Any]:
    """Get the calling agent."""
    return {"agent": g.agent}


@self_service.get("/usage")
@self_service.response(200, schemas.Usage)
def show_my_usage() -> dict[str, Any]:
    """Get the calling agent's usage: totals, rotations, and the last thirty days."""
    with reading() as connection:
        return usage(connection, g.agent)


@self_service.post("/rotate")
@self_service.arguments(schemas.Rotate)
@self_service.response(200, schemas.Rotated)
@self_service.errors(409, conflict=_NO_SECRET)
def rotate_my_secret(fields: dict[str, Any]) -> dict[str, str]:
    """Give the calling agent a new client secret."""
    secret = credentials.new_client_secret(settings().bcrypt_cost)
    with writing() as connection:
        rotate(connection, _myself(connection), secret, rotated_by="self", **fields)
    return {"client_secret": secret.text}


@self_service.post("/deactivate")
@self_service.arguments(schemas.Nothing)
@self_service.response(200, schemas.AgentDeactivated)
def deactivate_me(fields: dict[str, Any]) -> dict[str, Any]:
    """Deactivate the calling agent. Only an operator can reactivate it."""
    with writing() as connection:
        agent = deactivate(connection, _myself(connection))
    return {"message": "This agent is deactivated. Only an operator can reactivate it.", "agent": agent}


@self_service.delete("")
@self_service.response(204)
def delete_me() -> None:
    """Delete the calling agent and all its tokens."""
    with writing() as connection:
        delete(connection, _myself(connection))


def create(fields: dict[str, Any]) -> dict[str, Any]:
    """Register an agent.

    :param fields: as `schemas.AgentCreate` loads them.
    :returns: what `schemas.AgentCreated` shows; no secret for an agent that signs in by its keys.
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
    """A page of agents, as `schemas.AgentPage` shows it; `query` as `schemas.AgentQuery` loads it."""
    with reading() as connection:
        found, following = newest_page(connection, sa.select(Agent).where(*_filters(query)), Agent.pk, query)
    return {"agents": found, "next": following}


def usage(connection: sa.Connection, agent: Any) -> dict[str, Any]:
    """Totals, rotations and the last thirty days of an agent, as `schemas.Usage` shows them."""
    return {
        "token_count": agent.token_count,
        "refresh_count": agent.refresh_count,
        "last_activity_at": agent.last_activity_at,
        "last_token_issued_at": agent.last_token_issued_at,
        "rotation_history": _rotations(connection, agent),
        "daily": _daily_usage(connection, agent),
    }


def update(connection: sa.Connection, agent: Any, fields: dict[str, Any]) -> Any:
    """Change an agent's fields, as `schemas.AgentUpdate` loads them; returns the changed row."""
    if "jwks" in fields and not fields["jwks"] and agent.token_endpoint_auth_method == "private_key_jwt":
        raise Problem(409, "conflict", "This agent proves itself by its keys: give it others, not none.")
    # An agent that comes back from its expiry brings no old tokens along, as with a reactivation.
    if "expires_in" in fields and agent.expires_at is not None and agent.expires_at <= now():
        _end_tokens(connection, agent)
    agent = _set(connection, agent, **_columns(fields))
    events.record(connection, "agent.updated", agent, changed=sorted(fields))
    return agent


def rotate(
    connection: sa.Connection,
    agent: Any,
    secret: credentials.NewSecret,
    *,
    rotated_by: str,
    grace_period: int = 0,
    revoke_tokens: bool = False,
) -> None:
    """Make `secret` the agent's client secret.

    :param secret: made before the transaction: bcrypt under the write lock would block every other writer.
    :param grace_period: seconds the old secrets live on.
    :param revoke_tokens: end every token of the agent, for a leak.
    """
    if agent.token_endpoint_auth_method == "private_key_jwt":
        raise Problem(
            409, "conflict", "This agent has no client secret: PATCH its jwks to give it other keys."
        )
    if grace_period:
        ends_at = now() + timedelta(seconds=grace_period)
        lives_longer = sa.or_(ClientSecret.expires_at.is_(None), ClientSecret.expires_at > ends_at)
        shortened = sa.update(ClientSecret).where(*_live_secrets(agent), lives_longer)
        connection.execute(shortened.values(expires_at=ends_at))
    else:
        connection.execute(sa.delete(ClientSecret).where(ClientSecret.agent_pk == agent.pk))
    _add_secret(connection, agent, secret)
    _add_rotation(connection, agent, rotated_by)
    if revoke_tokens:
        _end_tokens(connection, agent)
    activity = {"last_activity_at": now()} if rotated_by == "self" else {}
    _set(connection, agent, updated_at=now(), **activity)
    facts: dict[str, Any] = {"grace_period": grace_period, "revoke_tokens": revoke_tokens}
    events.record(connection, "agent.credentials_rotated", agent, rotated_by=rotated_by, **facts)


def deactivate(connection: sa.Connection, agent: Any) -> Any:
    """Switch the agent off and end its tokens for good; returns the changed row."""
    if not agent.is_active:
        return agent
    _end_tokens(connection, agent)
    agent = _set(connection, agent, is_active=False, updated_at=now())
    events.record(connection, "agent.deactivated", agent)
    return agent


def reactivate(connection: sa.Connection, agent: Any) -> Any:
    """Switch the agent on again; returns the changed row."""
    if agent.expires_at is not None and agent.expires_at <= now():
        raise Problem(409, "conflict", "This agent has expired: give it a new expires_in first.")
    if agent.is_active:
        return agent
    agent = _set(connection, agent, is_active=True, updated_at=now())
    events.record(connection, "agent.reactivated", agent)
    return agent


def delete(connection: sa.Connection, agent: Any) -> None:
    """Delete the agent with all its tokens."""
    events.record(connection, "agent.deleted", agent)
    connection.execute(sa.delete(Agent).where(Agent.pk == agent.pk))


def rotate_by_operator(agent_id: str, fields: dict[str, Any]) -> dict[str, str]:
    """Give the agent a new client secret; `fields` as `schemas.Rotate` loads them."""
    secret = credentials.new_client_secret(settings().bcrypt_cost)
    with writing() as connection:
        rotate(connection, find(connection, agent_id), secret, rotated_by="admin", **fields)
    return {"client_secret": secret.text}


def delete_by_operator(agent_id: str) -> None:
    """Delete the agent and all its tokens."""
    with writing() as connection:
        delete(connection, find(connection, agent_id))


def change(agent_id: str, act: Callable[[sa.Connection, Any], Any]) -> dict[str, Any]:
    """Do `deactivate` or `reactivate` to the agent, in a transaction of its own."""
    with writing() as connection:
        return {"agent": act(connection, find(connection, agent_id))}


def find(connection: sa.Connection, agent_id: str) -> Any:
    """The agent with this id.

    :raises Problem: 404.
    """
    agent = connection.execute(sa.select(Agent).where(Agent.id == agent_id)).first()
    if agent is None:
        raise Problem(404, "not_found", "No agent has this id.")
    return agent


def _myself(connection: sa.Connection) -> Any:
    """The calling agent, checked again under the write lock: it may have died since."""
    g.guard()
    return find(connection, g.agent.id)


def _columns(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold the fields of `schemas.AgentFields`."""
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


def _add_rotation(connection: sa.Connection, agent: Any, rotated_by: str) -> None:
    mine = Rotation.agent_pk == agent.pk
    shown = sa.select(Rotation.pk).where(mine).order_by(Rotation.pk.desc()).limit(ROTATIONS_SHOWN - 1)
    connection.execute(sa.delete(Rotation).where(mine, Rotation.pk.not_in(shown)))
    row = {"agent_pk": agent.pk, "rotated_at": now(), "rotated_by": rotated_by}
    connection.execute(sa.insert(Rotation), row)


def _end_tokens(connection: sa.Connection, agent: Any) -> None:
    _set(connection, agent, token_version=Agent.token_version + 1)
    connection.execute(sa.delete(RefreshFamily).where(RefreshFamily.agent_pk == agent.pk))


def _live_secrets(agent: Any) -> tuple[sa.ColumnElement[bool], ...]:
    return ClientSecret.agent_pk == agent.pk, ClientSecret.live(now())


def _filters(query: dict[str, Any]) -> list[sa.ColumnElement[bool]]:
    moment = now()
    filters: list[sa.ColumnElement[bool]] = []
    if query["is_active"] is not None:
        filters.append(Agent.live(moment) if query["is_active"] else sa.not_(Agent.live(moment)))
    if query["scope"] is not None:
        filters.append(has_word(Agent.scopes, query["scope"]))
    if query["owner"] is not None:
        filters.append(Agent.owner == query["owner"])
    if query["stale_days"] is not None:
        since = moment - timedelta(days=query["stale_days"])
        filters.append(sa.func.coalesce(Agent.last_activity_at, Agent.created_at) < since)
    if query["q"] is not None:
        columns = (Agent.name, Agent.description, Agent.owner)
        found = [column.icontains(query["q"], autoescape=True) for column in columns]
        if credentials.begins_client_id(query["q"]):
            found.append(Agent.client_id.startswith(query["q"], autoescape=True))
        filters.append(sa.or_(*found))
    return filters


def _rotations(connection: sa.Connection, agent: Any) -> Sequence[Any]:
    statement = sa.select(Rotation).where(Rotation.agent_pk == agent.pk).order_by(Rotation.pk.desc())
    return connection.execute(statement.limit(ROTATIONS_SHOWN)).all()


def _daily_usage(connection: sa.Connection, agent: Any) -> list[Any]:
    """The last thirty days, today last, the idle ones with zeros."""
    today = now().date()
    days = [today - timedelta(days=back) for back in range(USAGE_DAYS - 1, -1, -1)]
    statement = sa.select(UsageDay).where(UsageDay.agent_pk == agent.pk, UsageDay.day >= days[0])
    used = {row.day: row for row in connection.execute(statement)}
    return [used.get(day) or {"day": day, "tokens_issued": 0, "tokens_refreshed": 0} for day in days]
