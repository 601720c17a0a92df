"""The schema of the first release.

Revision 0001, of nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "agents",
        sa.Column("pk", number, nullable=False),
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("client_id", sa.String(length=26), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=True),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("audiences", sa.Text(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("token_version", sa.Integer(), nullable=False),
        sa.Column("token_ttl", sa.Integer(), nullable=True),
        sa.Column("rate_limit", sa.Integer(), nullable=True),
        sa.Column("token_endpoint_auth_method", sa.String(), nullable=False),
        sa.Column("jwks", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("minute_began_at", sa.BigInteger(), nullable=True),
        sa.Column("minute_count", number, nullable=False),
        sa.Column("token_count", number, nullable=False),
        sa.Column("refresh_count", number, nullable=False),
        sa.Column("last_activity_at", sa.BigInteger(), nullable=True),
        sa.Column("last_token_issued_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_agents")),
        sa.UniqueConstraint("client_id", name=op.f("uq_agents_client_id")),
        sa.UniqueConstraint("id", name=op.f("uq_agents_id")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("pk", number, nullable=False),
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=36), nullable=False),
        sa.Column("agent_id", sa.String(length=36), nullable=True),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_agent_id"), "events", ["agent_id"])
    op.create_table(
        "failed_sign_ins",
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("clear_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_failed_sign_ins")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_failed_sign_ins_clear_at"), "failed_sign_ins", ["clear_at"])
    op.create_table(
        "revoked_tokens",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_revoked_tokens")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_revoked_tokens_expires_at"), "revoked_tokens", ["expires_at"])
    op.create_table(
        "signing_keys",
        sa.Column("pk", number, nullable=False),
        sa.Column("kid", sa.String(length=43), nullable=False),
        sa.Column("alg", sa.String(), nullable=False),
        sa.Column("jwk", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("signs_from", sa.BigInteger(), nullable=False),
        sa.Column("gone_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_signing_keys")),
        sa.UniqueConstraint("kid", name=op.f("uq_signing_keys_kid")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "webhooks",
        sa.Column("pk", number, nullable=False),
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("events", sa.Text(), nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("old_secret", sa.String(), nullable=True),
        sa.Column("old_secret_expires_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("failing_since", sa.BigInteger(), nullable=True),
        sa.Column("disabled_reason", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_webhooks")),
        sa.UniqueConstraint("id", name=op.f("uq_webhooks_id")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "client_secrets",
        sa.Column("pk", number, nullable=False),
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("hint", sa.String(length=8), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_client_secrets_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_client_secrets")),
        sa.UniqueConstraint("agent_pk", "hint", name=op.f("uq_client_secrets_agent_pk_hint")),
        sa.UniqueConstraint("id", name=op.f("uq_client_secrets_id")),
    )
    op.create_index(op.f("ix_client_secrets_expires_at"), "client_secrets", ["expires_at"])
    op.create_table(
        "deliveries",
        sa.Column("pk", number, nullable=False),
        sa.Column("webhook_pk", number, nullable=False),
        sa.Column("event_pk", number, nullable=False),
        sa.Column("status", sa.String(length=10), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger(), nullable=True),
        sa.Column("last_attempt_at", sa.BigInteger(), nullable=True),
        sa.Column("response_status", sa.Integer(), nullable=True),
        sa.Column("response_body", sa.String(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["event_pk"], ["events.pk"], name=op.f("fk_deliveries_event_pk_events"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["webhook_pk"],
            ["webhooks.pk"],
            name=op.f("fk_deliveries_webhook_pk_webhooks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_deliveries")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_due", "deliveries", ["webhook_pk", "next_attempt_at"])
    op.create_index(op.f("ix_deliveries_event_pk"), "deliveries", ["event_pk"])
    op.create_index("ix_deliveries_listed", "deliveries", ["webhook_pk", "pk"])
    op.create_table(
        "refresh_families",
        sa.Column("id", sa.String(length=22), nullable=False),
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("token_version", sa.Integer(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("audiences", sa.Text(), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("ends_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_refresh_families_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_refresh_families")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_refresh_families_agent_pk"), "refresh_families", ["agent_pk"])
    op.create_index(op.f("ix_refresh_families_expires_at"), "refresh_families", ["expires_at"])
    op.create_table(
        "rotations",
        sa.Column("pk", number, nullable=False),
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("rotated_at", sa.BigInteger(), nullable=False),
        sa.Column("rotated_by", sa.String(), nullable=False),
        sa.CheckConstraint("rotated_by IN ('self', 'admin')", name=op.f("ck_rotations_rotated_by")),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_rotations_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_rotations")),
    )
    op.create_index(op.f("ix_rotations_agent_pk"), "rotations", ["agent_pk"])
    op.create_table(
        "spent_assertions",
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("jti_hash", sa.LargeBinary(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_spent_assertions_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_pk", "jti_hash", name=op.f("pk_spent_assertions")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_spent_assertions_expires_at"), "spent_assertions", ["expires_at"])
    op.create_table(
        "usage_days",
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tokens_issued", number, nullable=False),
        sa.Column("tokens_refreshed", number, nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_usage_days_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_pk", "day", name=op.f("pk_usage_days")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_usage_days_day"), "usage_days", ["day"])
