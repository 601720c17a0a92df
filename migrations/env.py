"""What Alembic runs a migration with: the connection that `migrate.py` gave it, or a developer's database.

A rebuilt table (batch mode) needs its `table_kwargs` said again, `{"sqlite_autoincrement": True}` or
`{"sqlite_with_rowid": False}`: SQLite does not tell them.
"""

import sqlalchemy as sa
from alembic import context

from config import Settings
from models import Base


def run(connection: sa.Connection) -> None:
    """All revisions that are missing, in the transaction the connection is in, if it is in one."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:  # `alembic revision --autogenerate` compares with the database of LANYARD_INSTANCE
    with sa.create_engine(Settings.from_env().database_url).connect() as connection:
        run(connection)
