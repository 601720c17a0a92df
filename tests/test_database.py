"""The database: its file, its pragmas, its transactions, and what is in it in clear."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support import postgresql as on_postgresql
from support.callers import OPERATOR, Operator, ask_refresh, ask_token
from support.instances import PROCESSES, contents, lock, settings_for

import models
from app import create_app
from config import HERE
from database import is_transient, reading, writing
from models import Agent, SigningKey, db
from storage import postgresql, sqlite
from storage.files import make_folder


def pragma(name: str) -> Any:
    with reading() as connection:
        return connection.scalar(sa.text(f"PRAGMA {name}"))


@pytest.mark.sqlite
def test_the_pragmas_are_as_designed(app: Flask) -> None:
    with app.app_context():
        assert pragma("journal_mode") == "wal"
        assert pragma("foreign_keys") == 1
        assert pragma("busy_timeout") == 5000
        assert pragma("synchronous") == 2


@pytest.mark.sqlite
def test_durability_is_chosen_for_each_transaction(app: Flask) -> None:
    with app.app_context():
        for durable, level in ((False, 1), (True, 2), (False, 1)):
            with writing(durable=durable) as connection:
                assert connection.scalar(sa.text("PRAGMA synchronous")) == level


@pytest.fixture
def durabilities(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each write transaction is durable once it is committed."""
    found: list[bool] = []
    backend = postgresql if on_postgresql.is_used() else sqlite
    real = backend.begin_writing

    def begin_writing(connection: sa.Connection, *, durable: bool, **options: bool) -> None:
        real(connection, durable=durable, **options)
        found.append(durable)

    monkeypatch.setattr(backend, "begin_writing", begin_writing)
    return found


def test_only_issuing_tokens_may_be_undone_by_a_power_cut(
    durabilities: list[bool], make_app: Callable[..., Flask]
) -> None:
    app = make_app()
    operator, client = Operator(app), app.test_client()
    durabilities.clear()
    agent = operator.create()
    token = ask_token(client, agent).json
    ask_refresh(client, token["refresh_token"])
    ask_refresh(client, token["refresh_token"])  # a reuse, which ends the family
    new = operator.act(agent, "rotate").json
    token = ask_token(client, {**agent, **new}).json
    client.post("/oauth/revoke", json={"token": token["access_token"]}, headers=OPERATOR)
    client.delete(f"/api/agents/{agent['agent']['id']}", headers=OPERATOR)
    assert durabilities == [True, False, True, True, True, False, True, True]


def test_a_write_waits_for_another_instead_of_failing(app: Flask, tmp_path: Path) -> None:
    other = lock(tmp_path)
    release = threading.Timer(0.3, other.close)
    release.start()
    assert Operator(app).call("POST", json={"name": "x"}).status_code == 201
    release.join()


def test_a_database_locked_for_long_is_a_503(
    make_app: Callable[..., Flask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.05)
    monkeypatch.setitem(postgresql._SESSION, "lock_timeout", 50)
    operator = Operator(make_app())
    other = lock(tmp_path)
    refused = operator.call("POST", json={"name": "x"})
    assert (refused.status_code, refused.json["error"]) == (503, "temporarily_unavailable")
    assert refused.headers["Retry-After"] == "1"
    assert operator.client.get("/health/ready").status_code == 503
    assert operator.call("GET").status_code == 200, "reading goes on"
    other.close()
    assert operator.call("POST", json={"name": "x"}).status_code == 201


@pytest.mark.sqlite
def test_after_a_lock_timeout_others_wait_briefly(
    make_app: Callable[..., Flask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.6)
    monkeypatch.setattr(sqlite, "SHORT_TIMEOUT", 0.05)
    operator = Operator(make_app())
    waited = []
    for _ in range(2):
        other = lock(tmp_path)
        for _ in range(2):
            started = time.monotonic()
            assert operator.call("POST", json={"name": "x"}).status_code == 503
            waited.append(time.monotonic() - started > 0.5)
        other.close()
        assert operator.call("POST", json={"name": "x"}).status_code == 201
    assert waited == [True, False, True, False]


def test_a_waiter_for_the_lock_is_not_starved_by_newcomers(app: Flask) -> None:
    until = time.monotonic() + 2.5

    def write() -> float:
        longest = 0.0
        with app.app_context():
            while (began := time.monotonic()) < until:
                with writing(durable=False, exclusive=False):
                    longest = max(longest, time.monotonic() - began)
                    time.sleep(0.001)
                time.sleep(0.004)  # what else a request does
        return longest

    with ThreadPoolExecutor(8) as pool:
        waits = [one.result() for one in [pool.submit(write) for _ in range(8)]]
    assert max(waits) < 1.5


def test_an_error_rolls_everything_back(app: Flask) -> None:
    with app.app_context():
        with pytest.raises(RuntimeError), writing() as connection:
            connection.execute(sa.update(SigningKey).values(alg="none"))
            raise RuntimeError
        assert db.session.scalars(sa.select(SigningKey.alg)).all() == ["ES256"]


def test_a_transaction_inside_another_is_refused(app: Flask) -> None:
    with app.app_context():
        with writing() as connection:
            with pytest.raises(RuntimeError, match="inside"), writing():
                pass
            with reading() as inner:
                assert inner is connection
        with writing():
            pass


CONCURRENT_CLIENTS = """
from gevent import monkey
monkey.patch_all()
import sys
from pathlib import Path
import gevent, greenlet
import sqlalchemy as sa
from app import create_app
from config import HERE
from support.callers import OPERATOR, Operator, ask_refresh, ask_token
from support.instances import settings_for
from models import db
from storage import sqlite

app = create_app(settings_for(Path(sys.argv[1])), serving=True)
begin_writing, writers, switched = sqlite.begin_writing, [], []

def begin(connection, **options):
    begin_writing(connection, **options)
    writers.append(greenlet.getcurrent())

def use(number):
    operator, client = Operator(app), app.test_client()
    agent = operator.create()
    for _ in range(3):
        token = ask_token(client, agent).json
        ask_refresh(client, token["refresh_token"])
        ask_refresh(client, token["refresh_token"])
        ask_token(client, {**agent, "client_secret": "wrong"})
        bearer = {"Authorization": f"Bearer {token['access_token']}"}
        client.post("/api/agents/me/deactivate", json={}, headers=bearer)
        operator.act(agent, "reactivate")
        agent |= operator.act(agent, "rotate").json

sqlite.begin_writing = begin
with app.app_context():
    sa.event.listen(db.engine, "checkin", lambda *_: writers.clear())
greenlet.settrace(lambda event, ends: switched.append(ends[0].gr_frame) if ends[0] in writers else None)
gevent.joinall([gevent.spawn(use, number) for number in range(5)], raise_error=True)
assert not switched, switched
"""


@pytest.mark.sqlite
def test_no_greenlet_yields_between_begin_and_commit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONCURRENT_CLIENTS, str(tmp_path)]
    path = os.pathsep.join([str(HERE), str(HERE / "tests")])
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_deleting_an_agent_leaves_nothing_of_it(
    app: Flask, client: FlaskClient, operator: Operator, agent: dict[str, Any]
) -> None:
    ask_token(client, agent)
    operator.act(agent, "rotate")
    operator.call("DELETE", f"/{agent['agent']['id']}")
    with app.app_context():
        for table in models.Base.metadata.sorted_tables:
            left = db.session.scalar(sa.select(sa.func.count()).select_from(table))
            kept = {"signing_keys", "events"}  # the log tells of deleted agents too
            assert bool(left) == (table.name in kept), table.name


def test_the_number_of_a_deleted_agent_is_never_given_again(app: Flask, operator: Operator) -> None:
    pks = []
    for _ in range(2):
        agent = operator.create()
        with app.app_context():
            pks.append(db.session.scalar(sa.select(Agent.pk)))
        operator.call("DELETE", f"/{agent['agent']['id']}")
    assert pks[1] > pks[0]


@contextmanager
def masked(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_strict_umask_leaves_folders_usable(tmp_path: Path) -> None:
    with masked(0o777):
        make_folder(tmp_path / "made" / "by lanyard")
    made = (tmp_path / "made", tmp_path / "made" / "by lanyard")
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700, 0o700]


@pytest.mark.sqlite
@pytest.mark.parametrize("umask", [0o000, 0o022], ids=oct)
def test_the_files_and_folders_are_their_owners_only(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "made" / "by lanyard"
    with masked(umask):
        app = create_app(settings_for(folder), serving=True)
    with app.app_context():
        pragma("user_version")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    endings = {"", "-wal", "-shm", ".lock", ".serving", ".reserve"}
    assert set(modes) == {f"lanyard.db{ending}" for ending in endings} | {"serving.json"}
    assert set(modes.values()) == {0o600}
    assert [stat.S_IMODE(one.stat().st_mode) for one in (folder, folder.parent)] == [0o700, 0o700]


def test_no_secret_or_token_is_in_the_files_in_clear(
    client: FlaskClient, operator: Operator, tmp_path: Path
) -> None:
    agent = operator.create()
    secrets = [agent["client_secret"], operator.act(agent, "rotate", grace_period=60).json["client_secret"]]
    token = ask_token(client, agent).json
    newest = ask_refresh(client, token["refresh_token"]).json
    files = contents(tmp_path / "instance")
    assert agent["client_id"].encode() in files, "this is the file, and it is readable"
    for secret in secrets:
        assert secret[11:].encode() not in files
    for answer in (token, newest):
        assert answer["refresh_token"][25:].encode() not in files
        assert answer["access_token"].encode() not in files
        assert answer["access_token"].rsplit(".", 1)[1].encode() not in files


def start_at_once(folder: Path, barrier: Any, kids: Any) -> None:
    barrier.wait()
    app = create_app(settings_for(folder, ADMIN_TOKEN=""), serving=True)
    with app.app_context():
        kids.put((db.session.scalars(sa.select(SigningKey.kid)).all(), (folder / "admin_token").read_text()))


def test_simultaneous_first_starts_make_one_key_and_one_token(tmp_path: Path) -> None:
    settings_for(tmp_path)
    barrier, kids = PROCESSES.Barrier(4), PROCESSES.Queue()
    started = [PROCESSES.Process(target=start_at_once, args=(tmp_path, barrier, kids)) for _ in range(4)]
    for process in started:
        process.start()
    found = [kids.get(timeout=60) for _ in started]
    for process in started:
        process.join(20)
    assert [process.exitcode for process in started] == [0] * 4
    assert len(found[0][0]) == 1
    assert all(one == found[0] for one in found)


def test_no_connection_crosses_a_fork(app: Flask) -> None:
    with app.app_context():
        assert isinstance(db.engine.pool, sa.QueuePool)
        assert db.engine.pool.checkedin() == 0


def test_a_pool_without_a_free_connection_is_a_passing_fault() -> None:
    assert is_transient(sa.exc.TimeoutError("QueuePool limit reached"))
