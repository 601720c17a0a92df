"""Alembic's environment: run migrations on the connection of `upgrade.py`, or on a developer's database.

In batch mode a rebuilt table needs its `table_kwargs` again, `{"sqlite_autoincrement": True}` or
`{"sqlite_with_rowid": False}`: SQLite does not report them.
"""

import sqlalchemy as sa
from alembic import context

from config import Settings
from models import Base

connection = context.config.attributes.get("connection")
if connection is None:  # `alembic revision --autogenerate` compares with the database of LANYARD_INSTANCE
    connection = sa.create_engine(Settings.from_env().database_url).connect()
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
