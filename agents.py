"""Agents: the operator's routes, the agent's own, and what happens to an agent."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

import bearer
import clock
import credentials
import events
import schemas
from api import AGENT, OPERATOR, Blueprint
from database import newest_page, writing
from models import Agent, ClientSecret, RefreshFamily, Rotation, UsageDay, db, has_word
from wire import Problem

USAGE_DAYS = 30
ROTATIONS_SHOWN = 100
_NO_SECRET = "This agent has no client secret: PATCH its jwks to give it other keys."
_EXPIRED = "This agent has expired: give it a new expires_in first."
# An id is a UUID. `me` is shorter: what it does not answer is a 405, and not the operator's business.
_ONE = "/<string(minlength=3):agent_id>"

management = Blueprint(
    "agents", __name__, url_prefix="/api/agents", description="Agents (management)", security=OPERATOR
)
management.before_request(bearer.require_operator)

self_service = Blueprint(
    "me", __name__, url_prefix="/api/agents/me", description="Self-service of an agent", security=AGENT
)
self_service.before_request(bearer.require_agent)


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
def show_agent(agent_id: str) -> dict[str, Agent]:
    """Get an agent."""
    return {"agent": find(agent_id)}


@management.route(_ONE, methods=["PATCH", "PUT"])
@management.arguments(schemas.AgentUpdate)
@management.response(200, schemas.AgentAnswer)
@management.errors(409, conflict="This agent proves itself by its keys: give it others, not none.")
def update_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Agent]:
    """Change an agent.

    Fields left out stay as they are.
    """
    with writing():
        agent = find(agent_id)
        _set_fields(agent, fields)
        events.record("agent.updated", agent, changed=sorted(_public_names(fields)))
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
def deactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Agent]:
    """Deactivate an agent and end all its tokens."""
    return change(agent_id, deactivate)


@management.post(_ONE + "/reactivate")
@management.arguments(schemas.Nothing)
@management.response(200, schemas.AgentAnswer)
@management.errors(409, conflict=_EXPIRED)
def reactivate_agent(fields: dict[str, Any], agent_id: str) -> dict[str, Agent]:
    """Reactivate an agent. Its old tokens stay dead."""
    return change(agent_id, reactivate)


@management.get(_ONE + "/secrets")
@management.response(200, schemas.Secrets)
def list_secrets(agent_id: str) -> dict[str, Sequence[ClientSecret]]:
    """List an agent's live client secrets, without their text."""
    statement = _live_secrets(find(agent_id)).order_by(ClientSecret.pk.desc())
    return {"secrets": db.session.scalars(statement).all()}


@management.delete(_ONE + "/secrets/<secret_id>")
@management.response(204)
def delete_secret(agent_id: str, secret_id: str) -> None:
    """Delete a client secret at once."""
    with writing():
        agent = find(agent_id)
        secret = db.session.scalar(_live_secrets(agent).where(ClientSecret.id == secret_id))
        if secret is None:
            raise Problem(404, "not_found", "This agent has no live secret with this id.")
        db.session.delete(secret)
        agent.updated_at = clock.now()
        events.record("agent.updated", agent, changed=["secrets"])


@self_service.get("")
@self_service.response(200, schemas.AgentAnswer)
def show_me() -> dict[str, Any]:
    """Get the calling agent."""
    return {"agent": bearer.current_agent()}


@self_service.get("/usage")
@self_service.response(200, schemas.Usage)
def show_my_usage() -> dict[str, Any]:
    """Get the calling agent's usage: totals, rotations, and the last thirty days."""
    agent = bearer.current_agent()
    return {
        "token_count": agent.token_count,
        "refresh_count": agent.refresh_count,
        "last_activity_at": agent.last_activity_at,
        "last_token_issued_at": agent.last_token_issued_at,
        "rotation_history": _rotations(agent),
        "daily": _daily_usage(agent),
    }


@self_service.post("/rotate")
@self_service.arguments(schemas.Rotate)
@self_service.response(200, schemas.Rotated)
@self_service.errors(409, conflict=_NO_SECRET)
def rotate_my_secret(fields: dict[str, Any]) -> dict[str, str]:
    """Give the calling agent a new client secret."""
    secret = credentials.checker().make()
    with writing():
        rotate(_myself(), secret, rotated_by="self", **fields)
    return {"client_secret": secret.text}


@self_service.post("/deactivate")
@self_service.arguments(schemas.Nothing)
@self_service.response(200, schemas.AgentDeactivated)
def deactivate_me(fields: dict[str, Any]) -> dict[str, Any]:
    """Deactivate the calling agent. Only an operator can reactivate it."""
    with writing():
        agent = _myself()
        deactivate(agent)
    return {"message": "This agent is deactivated. Only an operator can reactivate it.", "agent": agent}


@self_service.delete("")
@self_service.response(204)
def delete_me() -> None:
    """Delete the calling agent and all its tokens."""
    with writing():
        delete(_myself())


def create(fields: dict[str, Any]) -> dict[str, Any]:
    """Register an agent.

    :param fields: as `schemas.AgentCreate` loads them.
    :returns: what `schemas.AgentCreated` tells; no secret for an agent that signs in by its keys.
    """
    by_key = fields["token_endpoint_auth_method"] == "private_key_jwt"
    secret = None if by_key else credentials.checker().make()
    with writing():
        agent = _new_agent(fields)
        if secret:
            _add_secret(agent, secret)
        events.record("agent.created", agent)
    created = {"agent": agent, "client_id": agent.client_id}
    return created | {"client_secret": secret.text} if secret else created


def page(query: dict[str, Any]) -> dict[str, Any]:
    """A page of agents, as `schemas.AgentPage` tells it; `query` as `schemas.AgentQuery` loads it."""
    found, following = newest_page(sa.select(Agent).where(*_filters(query)), Agent.pk, query)
    return {"agents": found, "next": following}


def rotate(
    agent: Agent,
    secret: credentials.NewSecret,
    *,
    rotated_by: str,
    grace_period: int = 0,
    revoke_tokens: bool = False,
) -> None:
    """Make `secret` the agent's, in the caller's transaction.

    :param secret: made before the transaction: bcrypt under the write lock would hold everybody up.
    :param grace_period: seconds the old secrets live on.
    :param revoke_tokens: end every token of the agent, for a leak.
    """
    if agent.token_endpoint_auth_method == "private_key_jwt":
        raise Problem(409, "conflict", _NO_SECRET)
    now = clock.now()
    if grace_period:
        ends_at = now + timedelta(seconds=grace_period)
        for old in db.session.scalars(_live_secrets(agent)):
            old.expires_at = min(ends_at, old.expires_at or ends_at)
    else:
        db.session.execute(sa.delete(ClientSecret).where(ClientSecret.agent_pk == agent.pk))
    _add_secret(agent, secret)
    _note_rotation(agent, rotated_by)
    if rotated_by == "self":
        agent.last_activity_at = now
    if revoke_tokens:
        _end_tokens(agent)
    agent.updated_at = now
    told: dict[str, Any] = {"grace_period": grace_period, "revoke_tokens": revoke_tokens}
    events.record("agent.credentials_rotated", agent, rotated_by=rotated_by, **told)


def deactivate(agent: Agent) -> None:
    """Switch the agent off, and end its tokens for good; in the caller's transaction."""
    if agent.is_active:
        agent.is_active = False
        agent.updated_at = clock.now()
        _end_tokens(agent)
        events.record("agent.deactivated", agent)


def reactivate(agent: Agent) -> None:
    """Switch the agent on again; in the caller's transaction."""
    now = clock.now()
    if agent.expires_at is not None and agent.expires_at <= now:
        raise Problem(409, "conflict", _EXPIRED)
    if not agent.is_active:
        agent.is_active = True
        agent.updated_at = now
        events.record("agent.reactivated", agent)


def delete(agent: Agent) -> None:
    """Delete the agent with all its tokens; in the caller's transaction."""
    events.record("agent.deleted", agent)
    db.session.delete(agent)


def rotate_by_operator(agent_id: str, fields: dict[str, Any]) -> dict[str, str]:
    """Give the agent a new client secret, as `schemas.Rotate` loads how."""
    secret = credentials.checker().make()
    with writing():
        rotate(find(agent_id), secret, rotated_by="admin", **fields)
    return {"client_secret": secret.text}


def delete_by_operator(agent_id: str) -> None:
    """Delete the agent and all its tokens."""
    with writing():
        delete(find(agent_id))


def change(agent_id: str, act: Callable[[Agent], None]) -> dict[str, Agent]:
    """Do `deactivate` or `reactivate` to the agent, in a transaction of its own."""
    with writing():
        agent = find(agent_id)
        act(agent)
    return {"agent": agent}


def find(agent_id: str) -> Agent:
    """The agent with this id.

    :raises Problem: 404.
    """
    agent = db.session.scalar(sa.select(Agent).where(Agent.id == agent_id))
    if agent is None:
        raise Problem(404, "not_found", "No agent has this id.")
    return agent


def _myself() -> Agent:
    """The calling agent, checked again under the write lock: it may have died since."""
    bearer.require_agent()
    return find(bearer.current_agent().id)


def _new_agent(fields: dict[str, Any]) -> Agent:
    now = clock.now()
    agent = Agent(
        id=str(uuid.uuid4()),
        client_id=credentials.new_client_id(),
        scopes=[],
        audiences=[],
        metadata_={},
        created_at=now,
    )
    _set_fields(agent, fields)
    db.session.add(agent)
    db.session.flush()
    return agent


def _set_fields(agent: Agent, fields: dict[str, Any]) -> None:
    if "jwks" in fields and not fields["jwks"] and agent.token_endpoint_auth_method == "private_key_jwt":
        raise Problem(409, "conflict", "This agent proves itself by its keys: give it others, not none.")
    agent.updated_at = clock.now()
    for name, value in fields.items():
        if name == "expires_in":
            _set_expiry(agent, value)
        else:
            setattr(agent, name, value)


def _public_names(fields: dict[str, Any]) -> list[str]:
    return [name.rstrip("_") for name in fields]


def _set_expiry(agent: Agent, expires_in: int | None) -> None:
    now = clock.now()
    # An agent that comes back from its expiry brings no old tokens along, as with a reactivation.
    if agent.expires_at is not None and agent.expires_at <= now:
        _end_tokens(agent)
    agent.expires_at = None if expires_in is None else now + timedelta(seconds=expires_in)


def _add_secret(agent: Agent, secret: credentials.NewSecret) -> None:
    row = ClientSecret(id=str(uuid.uuid4()), hint=secret.hint, hash=secret.hash, created_at=clock.now())
    row.agent_pk = agent.pk
    db.session.add(row)


def _note_rotation(agent: Agent, rotated_by: str) -> None:
    mine = Rotation.agent_pk == agent.pk
    shown = sa.select(Rotation.pk).where(mine).order_by(Rotation.pk.desc()).limit(ROTATIONS_SHOWN - 1)
    db.session.execute(sa.delete(Rotation).where(mine, Rotation.pk.not_in(shown)))
    db.session.add(Rotation(agent_pk=agent.pk, rotated_at=clock.now(), rotated_by=rotated_by))


def _end_tokens(agent: Agent) -> None:
    agent.token_version += 1
    db.session.execute(sa.delete(RefreshFamily).where(RefreshFamily.agent_pk == agent.pk))


def _live_secrets(agent: Agent) -> sa.Select[ClientSecret]:
    return sa.select(ClientSecret).where(ClientSecret.agent_pk == agent.pk, ClientSecret.live(clock.now()))


def _filters(query: dict[str, Any]) -> list[sa.ColumnElement[bool]]:
    now = clock.now()
    filters: list[sa.ColumnElement[bool]] = []
    if query["is_active"] is not None:
        filters.append(Agent.live(now) if query["is_active"] else sa.not_(Agent.live(now)))
    if query["scope"] is not None:
        filters.append(has_word(Agent.scopes, query["scope"]))
    if query["owner"] is not None:
        filters.append(Agent.owner == query["owner"])
    if query["stale_days"] is not None:
        since = now - timedelta(days=query["stale_days"])
        filters.append(sa.func.coalesce(Agent.last_activity_at, Agent.created_at) < since)
    if query["q"] is not None:
        columns = (Agent.name, Agent.description, Agent.owner)
        found = [column.icontains(query["q"], autoescape=True) for column in columns]
        if credentials.begins_client_id(query["q"]):
            found.append(Agent.client_id.startswith(query["q"], autoescape=True))
        filters.append(sa.or_(*found))
    return filters


def _rotations(agent: Any) -> Sequence[Rotation]:
    statement = sa.select(Rotation).where(Rotation.agent_pk == agent.pk).order_by(Rotation.pk.desc())
    return db.session.scalars(statement.limit(ROTATIONS_SHOWN)).all()


def _daily_usage(agent: Any) -> list[UsageDay]:
    """The last thirty days, today last, the idle ones with zeros."""
    today = clock.now().date()
    days = [today - timedelta(days=back) for back in range(USAGE_DAYS - 1, -1, -1)]
    statement = sa.select(UsageDay).where(UsageDay.agent_pk == agent.pk, UsageDay.day >= days[0])
    used = {row.day: row for row in db.session.scalars(statement)}
    return [used.get(day) or UsageDay(day=day, tokens_issued=0, tokens_refreshed=0) for day in days]
