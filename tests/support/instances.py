"""Instances of their own for tests: their settings, databases and copies."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask
from support import postgresql as on_postgresql

from config import Settings, state
from models import db
from storage import postgresql

ADMIN_TOKEN = "the-operators-token-of-the-tests"
# Tests whose subject they are set them to something else.
CHEAP = {"BCRYPT_COST": "4", "SIGNING_ALG": "ES256"}
# Processes that have imported the app already: they are forked by one that has, and that runs no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["app", "alembic.command", "pytest"])


def close(app: Flask) -> None:
    """End the server that the app is: let go of its connections, and of its mark on the database."""
    with app.app_context():
        db.engine.dispose()
    state(app).stop_serving()


def settings_for(folder: Path, **variables: str) -> Settings:
    """Settings for an instance in `folder`, with cheap hashes and signatures."""
    env = {"INSTANCE": str(folder), "ADMIN_TOKEN": ADMIN_TOKEN, **CHEAP, **variables}
    env = database_variables(Path(env["INSTANCE"])) | env
    return Settings.from_env({f"LANYARD_{name}": value for name, value in env.items()})


def database_variables(folder: Path) -> dict[str, str]:
    """The settings that give an instance a database of its own, where its folder does not."""
    return {"DATABASE_URL": on_postgresql.url_of(folder)} if on_postgresql.is_used() else {}


def environment_of(folder: Path) -> dict[str, str]:
    """The environment of a command on an instance."""
    variables = {"INSTANCE": str(folder), **database_variables(folder)}
    return {**os.environ, **{f"LANYARD_{name}": value for name, value in variables.items()}}


def engine_of(folder: Path) -> sa.Engine:
    """A way into an instance's database from outside."""
    url = on_postgresql.url_of(folder) if on_postgresql.is_used() else f"sqlite:///{folder}/lanyard.db"
    return sa.create_engine(url, poolclass=sa.NullPool)


def contents(folder: Path) -> bytes:
    """All that is kept of an instance: its files, and what a dump of its database holds."""
    files = b"".join(path.read_bytes() for path in folder.iterdir())
    return files + (on_postgresql.dump(folder) if on_postgresql.is_used() else b"")


def copy_instance(template: Path, folder: Path) -> None:
    """Put a copy of a database, as the fixtures above make it, into an instance's folder."""
    folder.mkdir(exist_ok=True)
    if on_postgresql.is_used():
        on_postgresql.copy(template.parent, folder)
    else:
        shutil.copy(template, folder)


def lock(folder: Path) -> Any:
    """Another process's write lock, as far as the database can tell; `close()` ends it."""
    if on_postgresql.is_used():
        writer = engine_of(folder / "instance").connect().execution_options(isolation_level="AUTOCOMMIT")
        postgresql.begin_writing(writer, durable=True, patient=True, exclusive=True)
        return writer
    path = folder / "instance" / "lanyard.db"
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection
