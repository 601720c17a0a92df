"""Crashes and faults under load, each for a moment; `make soak` plays the same scenes for minutes."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import floods
import pytest
import requests
import scenes
import sqlalchemy as sa
from flask import Flask
from scenes import Scene, Stage
from server import Server
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer
from support.instances import close, settings_for

from app import create_app
from database import writing
from models import RefreshFamily
from ops import cleanup
from storage import sqlite

pytestmark = pytest.mark.sqlite

# Far from all that the server can do: other tests run beside these.
LOAD = {"clients": 4, "pause": 0.03, "sample": 8}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One server for all scenes: what one fault leaves broken, the next finds."""
    server = Server(tmp_path_factory.mktemp("stage")).start()
    yield Stage(server.wait(), **LOAD)
    server.stop()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server whose instance is on a disk of its own."""
    folder = tmp_path_factory.mktemp("small")
    try:
        with faults.small_disk(folder / "disk") as disk:
            server = Server(folder, disk).start()
            yield Stage(server.wait(), **LOAD)
            server.stop()
    except faults.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """An app whose instance is on a disk of its own, and that cleans up after every response."""
    monkeypatch.setattr(cleanup, "INTERVAL", 0)
    monkeypatch.setattr(sqlite, "RESERVE", 1024**2)
    try:
        with faults.small_disk(tmp_path / "disk", "8m") as disk:
            made = create_app(settings_for(disk), serving=True)
            yield made
            close(made)
    except faults.Unavailable as reason:
        pytest.skip(str(reason))


def check(scene: Scene) -> None:
    assert scene.tally.violations == []
    assert scene.acknowledged > 0


SCENES: dict[str, Callable[[Stage], Scene]] = {
    "a worker is killed": partial(scenes.kill_workers, times=3, seconds=0.3),
    "all is killed": partial(scenes.kill_all, times=2, seconds=0.3),
    "SIGTERM": partial(scenes.terminate, times=1, seconds=0.3),
    "SIGHUP": partial(scenes.reload, times=1, seconds=0.3),
    "the clock jumps": partial(scenes.clock_jumps, seconds=0.2),
    # Longer than a write waits for the lock.
    "the database is locked": partial(scenes.locked, times=1, seconds=6),
}


@pytest.mark.long
@pytest.mark.parametrize("play", SCENES.values(), ids=SCENES)
def test_acknowledged_changes_survive(stage: Stage, play: Callable[[Stage], Scene]) -> None:
    check(play(stage))


@pytest.mark.long
def test_broken_requests_fill_no_log_and_stop_nobody(stage: Stage) -> None:
    check(floods.log_flood(stage, times=500))


@pytest.mark.long
def test_rotations_of_one_agent_stop_nobody(stage: Stage) -> None:
    check(floods.rotation_flood(stage, seconds=1))


@pytest.mark.long
def test_acknowledged_changes_survive_read_only_files(stage: Stage) -> None:
    try:
        check(scenes.read_only(stage, times=1, seconds=0.7))
    except faults.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.long
def test_acknowledged_changes_survive_a_full_disk(small_disk: Stage) -> None:
    check(scenes.full_disk(small_disk, times=1, seconds=1.5))


def test_access_can_be_ended_on_a_full_disk(small_disk: Stage) -> None:
    check(scenes.kill_switch(small_disk, times=1, seconds=0.5))


def test_while_the_reserve_is_used_only_access_is_ended(app: Flask, tmp_path: Path) -> None:
    operator, client = Operator(app), app.test_client()
    agents = [operator.create() for _ in range(4)]
    token = ask_token(client, agents[0]).json or {}
    with faults.full(tmp_path / "disk"):
        assert operator.act(agents[1], "deactivate").status_code == 200
        assert ask_token(client, agents[0]).status_code == 503
        assert ask_refresh(client, token["refresh_token"]).status_code == 503
        assert operator.call("POST", json={"name": "x"}).status_code == 503
        assert operator.act(agents[0], "rotate").status_code == 503
        assert client.post("/api/keys/rotate", headers=OPERATOR).status_code == 503
        assert operator.act(agents[0], "rotate", revoke_tokens=True).status_code == 200
        assert operator.call("DELETE", f"/{agents[2]['agent']['id']}").status_code == 204
        assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    client.get("/health").close()
    assert ask_token(client, agents[3]).status_code == 200


def test_agents_leave_the_operator_half_of_the_reserve(app: Flask, tmp_path: Path) -> None:
    operator, client = Operator(app), app.test_client()
    agent, hostile, patient = (operator.create() for _ in range(3))
    tokens = [ask_token(client, agent).json or {} for _ in range(3)]
    others, last = (ask_token(client, one).json or {} for one in (hostile, patient))
    left = (tmp_path / "disk" / "lanyard.db.reserve").stat
    with faults.full(tmp_path / "disk"):
        for token in tokens:
            body = {"token": token["access_token"]}
            assert client.post("/oauth/revoke", json=body, headers=bearer(token)).status_code == 200
            assert left().st_size == sqlite.RESERVE // 2
        rotation = {"revoke_tokens": True}
        assert client.post("/api/agents/me/rotate", json=rotation, headers=bearer(others)).status_code == 200
        assert left().st_size == sqlite.RESERVE // 2
        assert operator.act(agent, "deactivate").status_code == 200
        assert left().st_size == 0
        # From now on agents may not even use what is free.
        body = {"token": last["access_token"]}
        assert client.post("/oauth/revoke", json=body, headers=bearer(last)).status_code == 503
        assert client.post("/oauth/revoke", json=body, headers=OPERATOR).status_code == 200
        assert operator.act(hostile, "deactivate").status_code == 200
    client.get("/health").close()
    assert left().st_size == sqlite.RESERVE
    assert left().st_blocks * 512 == sqlite.RESERVE


def test_an_agent_with_thousands_of_refresh_tokens_fits_the_reserve(app: Flask, tmp_path: Path) -> None:
    operator, client = Operator(app), app.test_client()
    agent = operator.create()
    token = ask_token(client, agent).json or {}
    with app.app_context(), writing() as connection:
        grant = connection.execute(sa.select(RefreshFamily)).one()._asdict()
        grants = [{**grant, "id": secrets.token_urlsafe(16)} for _ in range(6000)]
        connection.execute(sa.insert(RefreshFamily), grants)
    with faults.full(tmp_path / "disk"):
        assert operator.act(agent, "deactivate").status_code == 200
        assert ask_refresh(client, token["refresh_token"]).status_code == 400
    client.get("/health").close()
    assert operator.act(agent, "reactivate").status_code == 200
    assert ask_refresh(client, token["refresh_token"]).status_code == 400


def test_a_server_restarts_on_a_full_disk_and_ends_access(app: Flask, tmp_path: Path) -> None:
    agent = Operator(app).create()
    with faults.full(tmp_path / "disk"):
        again = create_app(settings_for(tmp_path / "disk"), serving=True)
        assert Operator(again).act(agent, "deactivate").status_code == 200
        close(again)
        again = create_app(settings_for(tmp_path / "disk"), serving=True)
        assert Operator(again).call("DELETE", f"/{agent['agent']['id']}").status_code == 204
        close(again)


def test_a_start_without_room_for_a_reserve_warns(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "reserve" not in caplog.text
    monkeypatch.setattr(sqlite, "RESERVE", 64 * 1024**2)
    (tmp_path / "disk" / "lanyard.db.reserve").unlink()
    again = create_app(settings_for(tmp_path / "disk"), serving=True)
    assert "There is no reserve for a full disk" in caplog.text
    assert Operator(again).call("POST", json={"name": "x"}).status_code == 201
    close(again)


def readiness(stage: Stage) -> int:
    return requests.get(f"{stage.server.url}/health/ready").status_code


def test_a_server_whose_files_are_read_only_is_not_ready(stage: Stage) -> None:
    assert readiness(stage) == 200
    try:
        with faults.read_only(stage.server.database):
            assert readiness(stage) == 503
    except faults.Unavailable as reason:
        pytest.skip(str(reason))
    assert readiness(stage) == 200


def test_a_server_whose_disk_is_full_is_not_ready(small_disk: Stage) -> None:
    assert readiness(small_disk) == 200
    with faults.full(small_disk.server.instance):
        assert [readiness(small_disk) for _ in range(20)] == [503] * 20
    assert readiness(small_disk) == 200


@pytest.mark.parametrize("damage", faults.DAMAGES)
def test_a_damaged_database_is_refused_and_left_as_it_is(
    first_start: Path, tmp_path: Path, damage: str
) -> None:
    template = Path(shutil.copy(first_start, tmp_path / "template.db"))
    assert scenes.damaged(template, tmp_path / "damaged", damage).tally.violations == []
