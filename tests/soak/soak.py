"""Hurt a real server in every way for some minutes, and tell what it kept: `make soak`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import floods
import scenes
from scenes import Scene, Stage
from server import Server


def main() -> int:
    """Play every scene, print the table; returns the number of violations, as far as an exit code goes."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lanyard-soak-") as folder:
        played = list(play(Path(folder)))
    print_table(played)
    print(f"\n{time.monotonic() - started:.0f} seconds.")
    violations = [f"{scene.name}: {text}" for scene in played for text in scene.tally.violations]
    for text in violations[:50]:
        print(f"VIOLATION {text}", file=sys.stderr)
    return min(len(violations), 1)


def play(folder: Path) -> Iterator[Scene]:
    """The scenes, one after the other, on three servers."""
    (folder / "plain").mkdir()
    server = Server(folder / "plain").start().wait()
    try:
        yield from _in_turn(Stage(server), on_any_disk())
        server.terminate()
        template = shutil.copy(server.database, folder / "template.db")
    finally:
        server.stop()
    for damage in faults.DAMAGES:
        yield _told(partial(scenes.damaged, template, folder / damage.replace(" ", "-"), damage))
    try:
        with faults.small_disk(folder / "small") as disk:
            yield from _on_small_disk(folder, disk)
    except faults.Unavailable as reason:
        print(f"SKIPPED full disk: {reason}", file=sys.stderr)


def on_any_disk() -> list[Callable[[Stage], Scene]]:
    """The scenes that need no disk of their own, with their lengths."""
    return [
        partial(scenes.kill_workers, times=35, seconds=0.6),
        partial(scenes.kill_all, times=15, seconds=0.8),
        partial(scenes.terminate, times=4, seconds=1),
        partial(scenes.reload, times=3, seconds=1),
        partial(scenes.locked, times=1, seconds=30),
        partial(scenes.read_only, times=2, seconds=3),
        # Long enough that what has expired is swept at each stop.
        partial(scenes.clock_jumps, seconds=10.5),
        partial(floods.log_flood, times=5000),
        partial(floods.rotation_flood, seconds=10),
        partial(floods.hostile_receivers, seconds=10),
    ]


SMALL_DISK: list[Callable[[Stage], Scene]] = [
    partial(scenes.full_disk, times=2, seconds=5),
    partial(scenes.kill_switch, times=2, seconds=3),
]


def _on_small_disk(folder: Path, disk: Path) -> Iterator[Scene]:
    (folder / "log").mkdir()
    server = Server(folder / "log", disk).start().wait()
    try:
        yield from _in_turn(Stage(server), SMALL_DISK)
    finally:
        server.stop()


def _in_turn(stage: Stage, parts: list[Callable[[Stage], Scene]]) -> Iterator[Scene]:
    for part in parts:
        try:
            yield _told(partial(part, stage))
        except faults.Unavailable as reason:
            print(f"SKIPPED {part}: {reason}", file=sys.stderr)


def _told(part: Callable[[], Scene]) -> Scene:
    started = time.monotonic()
    scene = part()
    print(f"{scene.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return scene


def print_table(played: list[Scene]) -> None:
    """One row for each fault."""
    print("\n| fault | times | acknowledged changes | lost | violations | answers |")
    print("| --- | --: | --: | --: | --: | --- |")
    for scene in played:
        answers = ", ".join(f"{what}: {count}" for what, count in sorted(scene.tally.answers.items()))
        found = len(scene.tally.violations)
        print(f"| {scene.name} | {scene.times} | {scene.acknowledged} | {scene.lost} | {found} | {answers} |")


if __name__ == "__main__":
    sys.exit(main())
