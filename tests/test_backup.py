"""Backup while the server writes, and restore."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result
from conftest import Operator, Server, copy_instance, settings_for
from flask import Flask
from test_cli import lanyard
from test_serving import register, token_body

from commands import backup
from commands.__main__ import lanyard as commands
from storage import sqlite

pytestmark = pytest.mark.sqlite


def run(folder: Path, *arguments: str | Path) -> Result:
    """Run a command as ./lanyard does, on the instance in `folder`."""
    env = {"LANYARD_INSTANCE": str(folder), "LANYARD_BCRYPT_COST": "4"}
    return CliRunner().invoke(commands, list(map(str, arguments)), env=env)


@pytest.fixture
def instance(tmp_path: Path, first_start: Path) -> Path:
    """An instance that no server runs on."""
    folder = tmp_path / "instance"
    copy_instance(first_start, folder)
    return folder


@pytest.fixture
def copy(instance: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    file = tmp_path / "backup.db"
    assert run(instance, "backup", file).exit_code == 0
    return file


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@contextmanager
def write_load(server: Server, agents: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Tokens are asked for, and agents made, all the time; the statuses of the answers."""
    done = threading.Event()
    statuses: list[int] = []

    def ask(agent: dict[str, Any]) -> None:
        with requests.Session() as session:
            while not done.is_set():
                statuses.append(session.post(f"{server.url}/oauth/token", json=token_body(agent)).status_code)
                made = session.post(f"{server.url}/api/agents", json={"name": "load"})
                statuses.append(made.status_code)

    threads = [threading.Thread(target=ask, args=[agent]) for agent in agents]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_backup_taken_under_load_is_a_whole_instance(serve: Callable[..., Server], tmp_path: Path) -> None:
    old = serve(LOCAL="1", ISSUER="https://id.example").wait()
    agent = register(old)
    token = requests.post(f"{old.url}/oauth/token", json=token_body(agent)).json()
    hook = {"name": "audit", "url": "http://127.0.0.1:9/hook", "events": ["key.*"]}
    webhook = requests.post(f"{old.url}/api/webhooks", json=hook).json()["webhook"]
    file = tmp_path / "backup.db"
    with write_load(old, [register(old) for _ in range(4)]) as statuses:
        while len(statuses) < 40:
            threading.Event().wait(0.01)
        last = register(old, name="acknowledged just before")
        env = {**os.environ, "LANYARD_INSTANCE": str(old.instance)}
        made = lanyard("backup", "backup.db", env=env, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        before = len(statuses)
    assert before > 40, "there was a load while it was made"
    assert set(statuses) == {200, 201}
    assert (mode(file), list(tmp_path.glob(".*"))) == (0o600, [])
    old.stop()
    shutil.move(old.instance, tmp_path / "lost")
    restored = run(old.instance, "restore", file)
    assert restored.exit_code == 0, restored.output

    new = serve(LOCAL="1", ISSUER="https://id.example").wait()
    headers = {"Authorization": f"Bearer {token['access_token']}"}
    me = requests.get(f"{new.url}/api/agents/me", headers=headers).json()["agent"]
    assert (me["id"], me["token_count"]) == (agent["agent"]["id"], 1)
    for one in (agent, last):
        assert requests.post(f"{new.url}/oauth/token", json=token_body(one)).status_code == 200
    body = {"refresh_token": token["refresh_token"]}
    assert requests.post(f"{new.url}/oauth/refresh", json=body).status_code == 200
    assert requests.get(f"{new.url}/api/webhooks").json()["webhooks"] == [webhook]
    events = requests.get(f"{new.url}/api/events?agent_id={me['id']}").json()["events"]
    assert [event["type"] for event in events][-2:] == ["token.issued", "agent.created"]


def test_a_backup_is_not_written_over(instance: Path, copy: Path) -> None:
    copy.write_text("precious")
    assert "--force" in run(instance, "backup", copy).stderr
    assert copy.read_text() == "precious"
    assert run(instance, "backup", copy, "--force").exit_code == 0
    backup.check(copy, "the new one")


@pytest.mark.parametrize("name", ["lanyard.db", "lanyard.db-wal", "../instance/lanyard.db"])
def test_the_database_is_no_place_for_its_backup(instance: Path, name: str) -> None:
    before = (instance / "lanyard.db").read_bytes()
    result = run(instance, "backup", instance / name, "--force")
    assert result.exit_code == 1
    assert "own database" in result.stderr
    assert (instance / "lanyard.db").read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_told(instance: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere" / "b.db", tmp_path):
        result = run(instance, "backup", place)
        assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")


def test_a_backup_that_fails_leaves_nothing(
    instance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup.back_up(settings_for(instance), tmp_path / "b.db", overwrite=False, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]


def test_a_backup_is_one_snapshot_however_much_is_written_meanwhile(
    app: Flask, operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "PAGES", 1)
    steps: list[int] = []
    operator.create(name="before")

    def write(done: int, total: int) -> None:
        if len(steps) < 10:
            operator.create(name="meanwhile")
        steps.append(done)

    file = tmp_path / "b.db"
    backup.back_up(settings_for(tmp_path / "instance"), file, overwrite=False, progress=write)
    assert steps == sorted(steps), "it never starts anew"
    with closing(sqlite.open_read_only(file)) as connection:
        assert connection.execute("SELECT name FROM agents").fetchall() == [("before",)]


def test_what_a_restore_replaces_is_kept(instance: Path, copy: Path) -> None:
    env = {**os.environ, "LANYARD_INSTANCE": str(instance)}
    created = lanyard("agents", "create", "--name", "newer", env=env)
    assert created.returncode == 0, created.stderr
    result = run(instance, "restore", copy)
    assert result.exit_code == 0, result.output
    assert "newer" not in run(instance, "agents", "list").stdout
    (kept,) = instance.glob("lanyard.db.replaced-*")
    assert str(kept) in result.stderr
    assert (mode(kept), mode(instance / "lanyard.db")) == (0o600, 0o600)
    with closing(sqlite.open_read_only(kept)) as connection:
        assert connection.execute("SELECT name FROM agents").fetchall() == [("newer",)]


def test_a_damaged_database_is_replaced_with_what_belongs_to_it(instance: Path, copy: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        (instance / f"lanyard.db{ending}").write_bytes(b"rubbish" * 1000)
    assert run(instance, "restore", copy).exit_code == 0
    assert not (instance / "lanyard.db-wal").exists(), "it would be written into the restored one"
    assert run(instance, "agents", "list").exit_code == 0


def test_a_running_server_is_not_robbed_of_its_database(serve: Callable[..., Server], copy: Path) -> None:
    server = serve().wait()
    before = (server.instance / "lanyard.db").stat().st_ino
    result = run(server.instance, "restore", copy)
    assert (result.exit_code, result.stderr) == (1, "Error: A server runs on this instance: stop it first.\n")
    assert (server.instance / "lanyard.db").stat().st_ino == before
    server.stop()
    assert run(server.instance, "restore", copy).exit_code == 0


def test_a_server_that_was_killed_is_in_nobodys_way(serve: Callable[..., Server], copy: Path) -> None:
    server = serve(WORKERS="1").wait()
    server.process.kill()
    server.process.wait()
    for _ in range(100):  # until its worker has noticed
        if not sqlite.is_serving(settings_for(server.instance)):
            break
        threading.Event().wait(0.1)
    result = run(server.instance, "restore", copy)
    assert result.exit_code == 0, result.output


def test_another_process_with_the_database_open_is_told(instance: Path, copy: Path) -> None:
    with closing(sqlite3.connect(instance / "lanyard.db")) as other:
        other.execute("SELECT * FROM agents").fetchall()
        result = run(instance, "restore", copy)
    assert (result.exit_code, result.stderr[:22]) == (1, "Error: Another process")
    assert not list(instance.glob("*replaced*"))


def rubbish(file: Path) -> None:
    file.write_bytes(b"rubbish" * 1000)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def without_a_table(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE client_secrets")


def without_a_column(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("ALTER TABLE agents DROP COLUMN owner")


def without_a_key(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DELETE FROM signing_keys")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (rubbish, "cannot be copied"),
        (cut_short, "cannot be|is damaged"),
        (without_a_table, "lacks the table client_secrets"),
        (without_a_column, "lacks agents.owner"),
        (without_a_key, "lacks a signing key"),
        (Path.unlink, "cannot be copied"),
    ],
    ids=["rubbish", "cut short", "a table less", "a column less", "no key", "no file"],
)
def test_no_bad_file_is_restored(
    instance: Path, copy: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(copy)
    before = (instance / "lanyard.db").read_bytes()
    result = run(instance, "restore", copy)
    assert result.exit_code == 1
    assert any(text in result.stderr for text in told.split("|")), result.stderr
    assert (instance / "lanyard.db").read_bytes() == before
    assert not [path for path in instance.iterdir() if "draft" in path.name or "replaced" in path.name]
