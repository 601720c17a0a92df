"""${message}.

Revision ${up_revision}, of ${down_revision}.
"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision).replace("'", '"')}
down_revision = ${repr(down_revision).replace("'", '"')}


def upgrade() -> None:
    """${message}."""
    ${upgrades if upgrades else "pass"}
