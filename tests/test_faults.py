"""Crashes and faults under load, each for a moment; `make soak` plays the same scenes for minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import floods
import pytest
import scenes
from scenes import Scene, Stage
from server import Server

pytestmark = pytest.mark.sqlite

CLIENTS = 4


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One server for all scenes: what one fault leaves broken, the next finds."""
    server = Server(tmp_path_factory.mktemp("stage")).start()
    yield Stage(server.wait(), CLIENTS)
    server.stop()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server whose instance is on a disk of its own."""
    folder = tmp_path_factory.mktemp("small")
    try:
        with faults.small_disk(folder / "disk", "8m") as disk:
            server = Server(folder, disk).start()
            yield Stage(server.wait(), CLIENTS)
            server.stop()
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


@pytest.mark.parametrize("play", SCENES.values(), ids=SCENES)
def test_acknowledged_changes_survive(stage: Stage, play: Callable[[Stage], Scene]) -> None:
    check(play(stage))


def test_broken_requests_fill_no_log_and_stop_nobody(stage: Stage) -> None:
    check(floods.log_flood(stage, times=500))


def test_rotations_of_one_agent_stop_nobody(stage: Stage) -> None:
    check(floods.rotation_flood(stage, seconds=1))


def test_acknowledged_changes_survive_read_only_files(stage: Stage) -> None:
    try:
        check(scenes.read_only(stage, times=1, seconds=0.7))
    except faults.Unavailable as reason:
        pytest.skip(str(reason))


def test_acknowledged_changes_survive_a_full_disk(small_disk: Stage) -> None:
    check(scenes.full_disk(small_disk, times=1, seconds=1.5))


@pytest.mark.parametrize("damage", faults.DAMAGES)
def test_a_damaged_database_is_refused_and_left_as_it_is(
    first_start: Path, tmp_path: Path, damage: str
) -> None:
    template = Path(shutil.copy(first_start, tmp_path / "template.db"))
    assert scenes.damaged(template, tmp_path / "damaged", damage).tally.violations == []
