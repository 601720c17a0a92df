"""What the server's processes take of the machine, as Linux tells it in /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Taken(NamedTuple):
    """By all processes of the server together."""

    processes: int
    memory: int  # bytes
    cpu: float  # seconds


class _Stat(NamedTuple):
    parent: int
    ticks: int
    ticks_of_ended: int  # its children that have ended


def of_service(first: int, others: set[int]) -> Taken | None:
    """What the process `first`, and those of `others` that are its living children, take together.

    Returns None where there is no /proc that tells.
    """
    stats = {pid: stat for pid in {first, *others} if (stat := _stat(pid)) is not None}
    ours = {pid: stat for pid, stat in stats.items() if pid == first or stat.parent == first}
    if first not in ours:
        return None
    # A worker's time goes over to `first` when it ends, so the sum never falls.
    ticks = sum(stat.ticks for stat in ours.values()) + ours[first].ticks_of_ended
    memory = sum(_memory(pid) for pid in ours)
    return Taken(len(ours), memory, ticks / os.sysconf("SC_CLK_TCK"))


def _stat(pid: int) -> _Stat | None:
    try:
        # The name, in brackets, may hold anything: proc(5).
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, children_user, children_system = map(int, fields[11:15])
    return _Stat(int(fields[1]), user + system, children_user + children_system)


def _memory(pid: int) -> int:
    """Proportional: a page that n processes share counts as an n-th in each."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended since
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
