"""Revisions of the schema that no release has."""

from __future__ import annotations

import shutil
from pathlib import Path

from config import HERE

SHIPPED = HERE / "migrations"


# A table that others refer to is rebuilt, and every row of it changed.
GOOD = """
    with op.batch_alter_table("agents", table_kwargs={"sqlite_autoincrement": True}) as agents:
        agents.add_column(sa.Column("colour", sa.Text(), nullable=False, server_default="blue"))
        agents.alter_column("owner", type_=sa.Text())
    op.execute("UPDATE agents SET token_count = token_count + 1")
"""


def folder_of_revisions(folder: Path, body: str) -> Path:
    """What is shipped, and one revision more."""
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("__pycache__"))
    last = len(list((folder / "versions").glob("*.py")))
    (folder / "versions" / f"{last + 1:04}_next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision, down_revision = '{last + 1:04}', '{last:04}'\n"
        f"def upgrade():\n{body}"
    )
    return folder
