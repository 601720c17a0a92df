"""The folder in which gunicorn's workers share metrics: prometheus_client's multiprocess mode."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO

from prometheus_client import values

PREFIX = "lanyard-metrics-"


def base_folder() -> Path:
    """Return the folder's parent: in memory, since writing a mapped file on a full disk kills the process."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is made by mkdtemp
    return memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


@cache  # gunicorn runs its configuration again at a reload
def share() -> None:
    """Make the folder, for the metrics of this process and of every process forked from it.

    It is removed when this process exits, or by the next start if this process was killed.
    """
    base = base_folder()
    _remove_leftovers(base)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
    locks = (unlocked / "locks").open("a")
    _take_number(locks)
    # Renamed once locked: else another server's start could remove it.
    folder = unlocked.rename(base / unlocked.name.removeprefix("."))
    # Part of the files' names. With the library's default, the process id, files of ended workers would
    # accumulate; the next worker takes over the number of an ended one and adds to its files.
    name = "first"  # no number: a worker must not add to values inherited by fork

    def take_name() -> None:
        nonlocal name
        # systemd-logind empties /dev/shm when the user logs out (RemoveIPC): no request may fail for that.
        folder.mkdir(mode=0o700, exist_ok=True)
        name = str(_take_number(locks))

    os.register_at_fork(after_in_child=take_name)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: name)
    atexit.register(_remove_at_exit, folder, os.getpid())


def _take_number(locks: IO[str]) -> int:
    """Return the lowest free number. Its lock ends with the process, and a fork does not inherit it."""
    return next(number for number in count() if _lock(locks, number, 1))


def _lock(locks: IO[str], start: int = 0, length: int = 0) -> bool:
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(base: Path) -> None:
    """Remove the folders of servers whose processes have all ended."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another server's start may remove it at the same time
            if folder.lstat().st_uid == os.geteuid():
                with (folder / "locks").open("a") as locks:
                    if _lock(locks):
                        shutil.rmtree(folder)


def _remove_at_exit(folder: Path, owner: int) -> None:
    # Workers inherit this at fork.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
