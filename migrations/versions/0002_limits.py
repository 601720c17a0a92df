"""Rate limits of any 60 seconds, and client authentication for refresh tokens.

Revision 0002, of 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Replace the counter of the current minute by one for each second; add two columns."""
    op.create_table(
        "rate_seconds",
        sa.Column("agent_pk", number, nullable=False),
        sa.Column("second", sa.BigInteger(), nullable=False),
        sa.Column("count", number, nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_pk"], ["agents.pk"], name=op.f("fk_rate_seconds_agent_pk_agents"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_pk", "second", name=op.f("pk_rate_seconds")),
        sqlite_with_rowid=False,
    )
    op.drop_column("agents", "minute_began_at")
    op.drop_column("agents", "minute_count")
    off = sa.Column(
        "require_client_auth_for_refresh", sa.Boolean(), server_default=sa.false(), nullable=False
    )
    op.add_column("agents", off)
    op.add_column("refresh_families", sa.Column("secret_hint", sa.String(length=8), nullable=True))
