"""Migrations: they make the schema of `models.py`, keep what is stored, and change all or nothing."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask
from support import postgresql as on_postgresql
from support.callers import OPERATOR, ask_token
from support.instances import PROCESSES, engine_of, environment_of, settings_for
from support.revisions import GOOD, SHIPPED

from app import create_app
from config import HERE, SettingError
from credentials import new_client_secret
from migrations import upgrade
from models import Base

AGENT = "b5b0cd3b-a5d1-4b5f-8ed2-4f3a8d4f2f3b"
CLIENT = "cid_jbBTZ0e1F4ufeYvekNWtbA"
SECRET = new_client_secret(4)
ROWS: dict[str, dict[str, Any]] = {
    "agents": {
        "pk": 7,
        "id": AGENT,
        "client_id": CLIENT,
        "name": "night-reporter",
        "owner": "ops",
        "scopes": "read write",
        "audiences": "",
        "metadata": '{"a": "b"}',
        "is_active": True,
        "token_version": 1,
        "token_endpoint_auth_method": "client_secret_basic",
        "created_at": 1780000000,
        "updated_at": 1780000000,
        "minute_count": 0,
        "token_count": 41,
        "refresh_count": 3,
    },
    "client_secrets": {
        "pk": 1,
        "id": "a-secret",
        "agent_pk": 7,
        "hint": SECRET.hint,
        "hash": SECRET.hash,
        "created_at": 1780000000,
    },
    "rotations": {"pk": 1, "agent_pk": 7, "rotated_at": 1780000000, "rotated_by": "self"},
    "usage_days": {"agent_pk": 7, "day": "2026-06-01", "tokens_issued": 41, "tokens_refreshed": 3},
    "spent_assertions": {"agent_pk": 7, "jti_hash": b"\x00\xff", "expires_at": 4000000000},
    "revoked_tokens": {"id": "a-jti", "expires_at": 4000000000},
}

BAD = {
    "it raises": GOOD + "    raise KeyError('a bug')",
    "its SQL is refused": f"{GOOD}    op.execute('INSERT INTO agents (pk) VALUES (8)')",  # noqa: S608
    "it leaves a row without its agent": f"{GOOD}    op.execute('DELETE FROM agents')",  # noqa: S608
}
# PostgreSQL deletes them too, as the schema says: SQLite cannot while tables are rebuilt.
ORPHANING = {"it leaves a row without its agent"}
KILLED = GOOD + "    import os\n    os.kill(os.getpid(), 9)"


def clauses(statement: str) -> tuple[str, list[str], str]:
    """A CREATE statement's parts: before, in and after its brackets; the order of columns does not count."""
    head, _, rest = re.sub(r"\s+", " ", statement.replace('"', "")).partition("(")
    body, _, tail = rest.rpartition(")")
    return head.strip(), sorted(part.strip() for part in re.split(r",(?![^(]*\))", body)), tail.strip()


def schema(connection: sa.Connection) -> dict[str, Any]:
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: clauses(sql) for name, sql in rows if name != "alembic_version"}


def test_the_migrations_make_what_the_models_say(tmp_path: Path) -> None:
    upgrade.run(settings_for(tmp_path), None)
    with engine_of(tmp_path).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.sqlite
def test_the_migrations_say_it_in_the_same_words(tmp_path: Path) -> None:
    """What Alembic does not compare: AUTOINCREMENT, WITHOUT ROWID, checks, names."""
    upgrade.run(settings_for(tmp_path), None)
    said = sa.create_engine("sqlite://")
    with engine_of(tmp_path).connect() as connection, said.connect() as model:
        Base.metadata.create_all(model)
        assert schema(connection) == schema(model)
    said.dispose()


def test_the_revisions_are_numbered_in_the_order_they_run() -> None:
    config = Config()
    config.set_main_option("script_location", str(SHIPPED))
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert revisions[::-1] == [f"{number:04}" for number in range(1, len(revisions) + 1)]
    assert upgrade.revisions() == revisions[::-1]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database of the first release with data in it, made without today's models."""
    first = tmp_path / "first"
    (first / "versions").mkdir(parents=True)
    shutil.copy(SHIPPED / "env.py", first)
    shutil.copy(SHIPPED / "versions" / "0001_first.py", first / "versions")
    database = tmp_path / "instance" / "lanyard.db"
    database.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upgrade, "FOLDER", first)
        upgrade.run(settings_for(database.parent), None)
    with engine_of(database.parent).begin() as connection:
        for table, columns in ROWS.items():
            names = ", ".join(columns), ", ".join(f":{name}" for name in columns)
            statement = f"INSERT INTO {table} ({names[0]}) VALUES ({names[1]})"  # noqa: S608
            connection.execute(sa.text(statement), columns)
    return database


def dump(database: Path) -> list[str]:
    """All that is in it."""
    if on_postgresql.is_used():
        lines = on_postgresql.dump(database.parent).decode().splitlines()
        return [line for line in lines if not line.startswith("\\")]  # commands with a number new each time
    with closing(sqlite3.connect(database)) as connection:
        return list(connection.iterdump())


def ask(database: Path, statement: str) -> Any:
    with engine_of(database.parent).connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def start(database: Path, *, serving: bool = True) -> Flask:
    return create_app(settings_for(database.parent, SIGNING_ALG="ES256"), serving=serving)


def test_a_database_of_the_first_release_is_served(old: Path) -> None:
    client = start(old).test_client()
    agent = {"client_id": CLIENT, "client_secret": SECRET.text}
    assert ask_token(client, agent).status_code == 200
    shown = client.get(f"/api/agents/{AGENT}", headers=OPERATOR).json
    assert shown
    assert shown["agent"]["name"] == "night-reporter"
    assert (shown["agent"]["metadata"], shown["agent"]["token_count"]) == ({"a": "b"}, 42)


def test_an_upgrade_keeps_every_row(old: Path, next_release: Callable[[str], Path]) -> None:
    children = [table for table in ROWS if table != "agents"]
    before = {table: ask(old, f"SELECT * FROM {table}") for table in children}  # noqa: S608
    assert all(before.values())
    next_release(GOOD)
    start(old)
    assert before == {table: ask(old, f"SELECT * FROM {table}") for table in children}  # noqa: S608
    assert ask(old, "SELECT pk, name, token_count, colour FROM agents") == [(7, "night-reporter", 42, "blue")]
    if not on_postgresql.is_used():
        assert ask(old, "SELECT seq FROM sqlite_sequence WHERE name = 'agents'") == [(7,)]
        assert ask(old, "PRAGMA integrity_check") == [("ok",)]
        assert ask(old, "PRAGMA foreign_key_check") == []


@pytest.mark.sqlite
def test_the_database_as_it_was_is_kept_beside_it(
    old: Path, next_release: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    before = dump(old)
    next_release(GOOD)
    start(old)
    [copy] = old.parent.glob("lanyard.db.before-*")
    assert dump(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert str(copy) in caplog.text


@pytest.mark.sqlite
def test_without_a_copy_there_is_no_upgrade(old: Path, next_release: Callable[[str], Path]) -> None:
    before = dump(old)
    next_release(GOOD)
    copy = old.with_name(f"lanyard.db.before-{upgrade.revisions()[-1]}")
    copy.mkdir()
    with pytest.raises(SettingError, match="is unchanged"):
        start(old)
    assert dump(old) == before
    assert not list(old.parent.glob(".*.draft"))


@pytest.mark.sqlite
def test_a_new_database_needs_no_copy(tmp_path: Path) -> None:
    start(tmp_path / "lanyard.db")
    names = {path.name.removeprefix("lanyard.db") for path in tmp_path.iterdir()}
    assert names == {"", ".lock", ".serving", ".reserve", "serving.json"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name, marks=[pytest.mark.sqlite] * (name in ORPHANING))
        for name, body in BAD.items()
    ],
)
def test_a_revision_that_fails_changes_nothing(
    body: str, old: Path, next_release: Callable[[str], Path]
) -> None:
    before = dump(old)
    next_release(body)
    with pytest.raises(SettingError, match="is unchanged"):
        start(old)
    assert dump(old) == before
    next_release(GOOD)
    start(old)
    assert ask(old, "SELECT token_count FROM agents") == [(42,)]


def start_next(database: Path, folder: Path, barrier: Any) -> None:
    upgrade.FOLDER = folder
    barrier.wait()
    start(database)


def start_together(database: Path, folder: Path, count: int) -> list[int | None]:
    """Start that many processes of the next release; returns how each of them ended."""
    barrier = PROCESSES.Barrier(count)
    started = [PROCESSES.Process(target=start_next, args=(database, folder, barrier)) for _ in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def test_a_crash_in_the_middle_changes_nothing(old: Path, next_release: Callable[[str], Path]) -> None:
    before = dump(old)
    assert start_together(old, next_release(KILLED), 1) == [-signal.SIGKILL]
    assert dump(old) == before
    next_release(GOOD)
    start(old)
    assert ask(old, "SELECT token_count FROM agents") == [(42,)]


def test_processes_that_start_together_upgrade_once(old: Path, next_release: Callable[[str], Path]) -> None:
    assert start_together(old, next_release(GOOD), 2) == [0, 0]
    assert ask(old, "SELECT token_count, colour FROM agents") == [(42, "blue")]
    assert on_postgresql.is_used() or len(list(old.parent.glob("lanyard.db.before-*"))) == 1


def test_a_newer_database_is_refused_and_left_alone(
    old: Path, next_release: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    next_release(GOOD)
    newer = upgrade.revisions()[-1]
    start(old)
    before = dump(old)
    monkeypatch.setattr(upgrade, "FOLDER", SHIPPED)
    with pytest.raises(SettingError) as refused:
        start(old)
    assert {newer, upgrade.revisions()[-1]} <= set(re.findall(r"\b\d{4}\b", refused.value.message))
    assert dump(old) == before


def test_a_database_without_a_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    database = tmp_path / "lanyard.db"
    with engine_of(tmp_path).begin() as connection:
        connection.exec_driver_sql("CREATE TABLE agents (pk INTEGER)")
        before = sa.inspect(connection).get_table_names()
    with pytest.raises(SettingError, match="no schema version"):
        start(database)
    with engine_of(tmp_path).connect() as connection:
        assert sa.inspect(connection).get_table_names() == before == ["agents"]


def test_a_command_does_not_upgrade(old: Path, next_release: Callable[[str], Path]) -> None:
    before = dump(old)
    next_release(GOOD)
    with pytest.raises(SettingError, match="start the server once"):
        start(old, serving=False)
    assert dump(old) == before
    start(old)
    start(old, serving=False)


def test_a_start_with_nothing_to_upgrade_does_without_alembic(old: Path) -> None:
    start(old)
    program = "import sys, app; app.create_app(serving=True); sys.exit('alembic' in sys.modules)"
    env = environment_of(old.parent)
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, env=env).returncode == 0
