"""The tables, their column types, event types, and the current time."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Types of events, and the names that webhooks and filters may use for groups of them.
EVENT_TYPES = (
    "agent.created",
    "agent.updated",
    "agent.deactivated",
    "agent.reactivated",
    "agent.deleted",
    "agent.credentials_rotated",
    "token.issued",
    "token.refreshed",
    "token.revoked",
    "token.reuse_detected",
    "auth.failed",
    "key.rotated",
    "webhook.created",
    "webhook.updated",
    "webhook.deleted",
    "webhook.test",
)
EVENT_GROUPS = ("*", "agent.*", "token.*", "auth.*", "key.*", "webhook.*")
_ENCRYPTED = "fernet:"  # prefix of a stored value that is encrypted


def now() -> datetime:
    """Return the current time: aware UTC, rounded down to the second."""
    return datetime.fromtimestamp(int(time.time()), UTC)


def new_id(prefix: str) -> str:
    """Return a non-secret identifier: the prefix and 128 random bits in 22 characters."""
    return prefix + secrets.token_urlsafe(16)


class Timestamp(sa.TypeDecorator[datetime]):
    """An aware UTC datetime, stored as whole seconds since 1970."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value.timestamp())

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value, UTC)


# 32 bits number the tokens of three weeks at 1,000 a second. SQLite's INTEGER has 64, and autoincrements.
Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")


class SpaceDelimited(sa.TypeDecorator[list[str]]):
    """A list of strings without spaces, stored joined by spaces, as OAuth writes scopes (RFC 6749 §3.3)."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> str | None:
        return None if value is None else " ".join(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> list[str] | None:
        return None if value is None else value.split()


class DecryptionError(Exception):
    """A stored secret is encrypted with a key that LANYARD_SECRET_KEY does not hold."""


class EncryptedText(sa.TypeDecorator[str]):
    """Text encrypted with LANYARD_SECRET_KEY, or stored as it is while that is unset.

    :raises DecryptionError: on reading a value that none of the keys decrypts.
    """

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else encrypt(value, current_app.config["LANYARD"].secret_keys)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else decrypt(value, current_app.config["LANYARD"].secret_keys)


def encrypt(text: str, keys: tuple[str, ...]) -> str:
    """Encrypt with the first of the Fernet keys; without keys return the text itself."""
    return _ENCRYPTED + _fernet(keys).encrypt(text.encode()).decode() if keys else text


def decrypt(stored: str, keys: tuple[str, ...]) -> str:
    """Return the text that was stored.

    :raises DecryptionError: when it is encrypted with none of these keys.
    """
    if not stored.startswith(_ENCRYPTED):
        return stored
    try:
        return _fernet(keys).decrypt(stored.removeprefix(_ENCRYPTED)).decode()
    except (InvalidToken, ValueError):  # MultiFernet raises the latter without keys
        raise DecryptionError(
            "LANYARD_SECRET_KEY must hold the key that the database's secrets are encrypted with"
        ) from None


def is_encrypted(stored: str, keys: tuple[str, ...] | None = None) -> bool:
    """Whether a stored value is encrypted, with one of the keys if given."""
    try:
        return stored.startswith(_ENCRYPTED) and (keys is None or decrypt(stored, keys) != stored)
    except DecryptionError:
        return False


@lru_cache(maxsize=16)
def _fernet(keys: tuple[str, ...]) -> MultiFernet:
    return MultiFernet([Fernet(key) for key in keys])


class Base(DeclarativeBase):
    """The base of all tables; its naming convention lets migrations refer to constraints."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        datetime: Timestamp,
        list[str]: SpaceDelimited,
        dict[str, str]: sa.JSON,
        dict[str, Any]: sa.JSON(none_as_null=True),
    }


db = SQLAlchemy(metadata=Base.metadata)


class Agent(Base):
    """A registered agent: an OAuth client that acts for itself."""

    __tablename__ = "agents"
    # AUTOINCREMENT: the number of a deleted agent, a key of pages, is never reused.
    __table_args__ = {"sqlite_autoincrement": True}

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(36), unique=True)
    client_id: Mapped[str] = mapped_column(sa.String(26), unique=True)
    name: Mapped[str]
    description: Mapped[str | None]
    owner: Mapped[str | None]
    scopes: Mapped[list[str]]
    audiences: Mapped[list[str]]
    # SQLAlchemy reserves `metadata`.
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata")
    is_active: Mapped[bool] = mapped_column(default=True)
    # Incremented to end all tokens: one that was issued under another version is invalid.
    token_version: Mapped[int] = mapped_column(default=1)
    token_ttl: Mapped[int | None]
    rate_limit: Mapped[int | None]
    token_endpoint_auth_method: Mapped[str]
    jwks: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    # In the database too, for the agents of before this column.
    require_client_auth_for_refresh: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    token_count: Mapped[int] = mapped_column(Number, default=0)
    refresh_count: Mapped[int] = mapped_column(Number, default=0)
    last_activity_at: Mapped[datetime | None]
    last_token_issued_at: Mapped[datetime | None]

    @classmethod
    def active(cls, at: datetime) -> sa.ColumnElement[bool]:
        """Return `is_active` as SQL."""
        return sa.and_(cls.is_active, sa.or_(cls.expires_at.is_(None), cls.expires_at > at))


def has_word(words: Any, word: Any) -> sa.ColumnElement[bool]:
    """Whether a column of space-delimited strings contains a string, as SQL."""
    # With spaces around both, a part of a string does not match.
    padded, wanted = (sa.literal(" ") + sa.type_coerce(text, sa.Text) + " " for text in (words, word))
    return padded != sa.func.replace(padded, wanted, "")


def is_active(agent: Any, at: datetime) -> bool:
    """Whether an agent may get and use tokens at that time: not deactivated and not expired."""
    return bool(agent.is_active) and (agent.expires_at is None or agent.expires_at > at)


def _agent_pk(**options: Any) -> Mapped[int]:
    return mapped_column(sa.ForeignKey(Agent.pk, ondelete="CASCADE"), **options)


class ClientSecret(Base):
    """A client secret of an agent: its bcrypt hash, and the hint that selects the row to verify."""

    __tablename__ = "client_secrets"
    __table_args__ = (sa.UniqueConstraint("agent_pk", "hint"),)

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(36), unique=True)
    agent_pk: Mapped[int] = _agent_pk()
    hint: Mapped[str] = mapped_column(sa.String(8))
    hash: Mapped[bytes]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None] = mapped_column(index=True)
    last_used_at: Mapped[datetime | None]

    @classmethod
    def valid(cls, at: datetime) -> sa.ColumnElement[bool]:
        """Whether the secret is valid at that time, as SQL."""
        return sa.or_(cls.expires_at.is_(None), cls.expires_at > at)


class RefreshFamily(Base):
    """The refresh tokens of one grant, of which only the newest is valid.

    A token names its family. Its hash equals the row's if it is valid, and differs if it was used before;
    an ended family has no row.
    """

    __tablename__ = "refresh_families"
    __table_args__ = {"sqlite_with_rowid": False}

    id: Mapped[str] = mapped_column(sa.String(22), primary_key=True)
    agent_pk: Mapped[int] = _agent_pk(index=True)
    # The client secret that the grant was made with; None for an assertion.
    secret_hint: Mapped[str | None] = mapped_column(sa.String(8))
    token_hash: Mapped[bytes]
    token_version: Mapped[int]
    scopes: Mapped[list[str]]
    audiences: Mapped[list[str]]
    issued_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    ends_at: Mapped[datetime]


class UsageDay(Base):
    """The number of tokens issued to an agent on a day (UTC)."""

    __tablename__ = "usage_days"
    __table_args__ = {"sqlite_with_rowid": False}

    agent_pk: Mapped[int] = _agent_pk(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True, index=True)
    tokens_issued: Mapped[int] = mapped_column(Number, default=0)
    tokens_refreshed: Mapped[int] = mapped_column(Number, default=0)


class RateSecond(Base):
    """What counts against an agent's rate limit, by second; only while the agent has a limit."""

    __tablename__ = "rate_seconds"
    __table_args__ = {"sqlite_with_rowid": False}

    agent_pk: Mapped[int] = _agent_pk(primary_key=True)
    second: Mapped[datetime] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(Number)


class Rotation(Base):
    """A rotation of an agent's client secret, and whether the agent or an operator did it."""

    __tablename__ = "rotations"
    __table_args__ = (sa.CheckConstraint("rotated_by IN ('self', 'admin')", name="rotated_by"),)

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    agent_pk: Mapped[int] = _agent_pk(index=True)
    rotated_at: Mapped[datetime]
    rotated_by: Mapped[str]


class SpentAssertion(Base):
    """A used client assertion, stored until it expires, so that it works once (RFC 7523 §3)."""

    __tablename__ = "spent_assertions"
    __table_args__ = {"sqlite_with_rowid": False}

    agent_pk: Mapped[int] = _agent_pk(primary_key=True)
    jti_hash: Mapped[bytes] = mapped_column(primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class FailedSignIns(Base):
    """When the failed sign-ins from an address are forgotten (a leaky bucket)."""

    __tablename__ = "failed_sign_ins"
    __table_args__ = {"sqlite_with_rowid": False}

    key: Mapped[str] = mapped_column(sa.String(128), primary_key=True)
    clear_at: Mapped[datetime] = mapped_column(index=True)


class Event(Base):
    """An entry of the audit log: written in the transaction of the change, never changed."""

    # No index on `created_at`, which every token would pay for: `pk` grows with it.
    __tablename__ = "events"

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(26))
    type: Mapped[str] = mapped_column(sa.String(32))
    created_at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(sa.String(36))
    # No foreign key: the log includes deleted agents.
    agent_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    address: Mapped[str | None]
    request_id: Mapped[str | None]
    data: Mapped[dict[str, Any]]


class Webhook(Base):
    """A URL to deliver events of some types to."""

    __tablename__ = "webhooks"
    __table_args__ = {"sqlite_autoincrement": True}

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(36), unique=True)
    name: Mapped[str]
    url: Mapped[str]
    events: Mapped[list[str]]
    max_retries: Mapped[int]
    is_active: Mapped[bool] = mapped_column(default=True)
    secret: Mapped[str] = mapped_column(EncryptedText)
    # Signs besides `secret` until it expires, for a rotation without downtime.
    old_secret: Mapped[str | None] = mapped_column(EncryptedText)
    old_secret_expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    # The first of the latest deliveries, all failed; after five days of that the webhook is disabled.
    failing_since: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]


class Delivery(Base):
    """One event to deliver to one webhook (the outbox): written in the transaction of the event."""

    __tablename__ = "deliveries"
    __table_args__ = (
        sa.Index("ix_deliveries_listed", "webhook_pk", "pk"),
        sa.Index("ix_deliveries_due", "webhook_pk", "next_attempt_at"),
        {"sqlite_autoincrement": True},
    )

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    webhook_pk: Mapped[int] = mapped_column(sa.ForeignKey(Webhook.pk, ondelete="CASCADE"))
    event_pk: Mapped[int] = mapped_column(sa.ForeignKey(Event.pk, ondelete="CASCADE"), index=True)
    status: Mapped[str] = mapped_column(sa.String(10), default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    # None when no attempt will follow.
    next_attempt_at: Mapped[datetime | None]
    last_attempt_at: Mapped[datetime | None]
    response_status: Mapped[int | None]
    response_body: Mapped[str | None]
    error: Mapped[str | None]


class RevokedToken(Base):
    """A revoked `jti`, or the part of it that all access tokens of a grant share, until they expire."""

    __tablename__ = "revoked_tokens"
    __table_args__ = {"sqlite_with_rowid": False}

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class SigningKey(Base):
    """A private key that signs access tokens, as a JWK (RFC 7517).

    The clock alone decides its state: published from `created_at`, signing from `signs_from` until
    a newer key signs, retired then, and gone from `gone_at`, which a rotation sets.
    """

    __tablename__ = "signing_keys"
    # AUTOINCREMENT: a worker compares the highest number with that of its newest key.
    __table_args__ = {"sqlite_autoincrement": True}

    pk: Mapped[int] = mapped_column(Number, primary_key=True)
    kid: Mapped[str] = mapped_column(sa.String(43), unique=True)
    alg: Mapped[str]
    jwk: Mapped[str] = mapped_column(EncryptedText)
    created_at: Mapped[datetime]
    signs_from: Mapped[datetime]
    gone_at: Mapped[datetime | None]


# Selected with every read before signing, to see whether this process has the newest key.
NEWEST_KEY = sa.select(sa.func.max(SigningKey.pk)).scalar_subquery()
