"""What a thread says before it waits: then another one answers requests meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

_mine = threading.local()


def before_waiting(step_aside: Callable[[], None]) -> None:
    """Have `step_aside` called whenever this thread is about to wait; it may be called again and again."""
    _mine.step_aside = step_aside


def step_aside() -> None:
    """Call this before a wait of more than a millisecond: for a hash, a disk, another's lock."""
    act: Callable[[], None] | None = getattr(_mine, "step_aside", None)
    if act is not None:
        act()
