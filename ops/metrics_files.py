"""A folder through which gunicorn's workers share their metrics: prometheus_client's multiprocess mode."""

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
    """Return where the folder goes: memory, since writing a mapped file on a full disk kills the process."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is made by mkdtemp
    return memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


@cache  # gunicorn runs its configuration again at a reload
def share() -> None:
    """Put the metrics made from now on in a new folder, shared with every process forked from this one.

    The folder is removed when this process exits, or by the next start when it was killed.
    """
    base = base_folder()
    _remove_leftovers(base)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
    locks = (unlocked / "locks").open("a")
    _take_number(locks)
    # Renamed once locked, so that another server's start does not take it for a leftover.
    folder = unlocked.rename(base / unlocked.name.removeprefix("."))
    # Files are named after this. With the library's choice, the process id, those of dead workers would
    # pile up; a number is taken over by the next worker, which counts on in the files.
    name = "first"  # never a number: a worker must not count on from values inherited by fork

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
    """Return the lowest free number. Its lock ends with the process, and is not inherited."""
    return next(number for number in count() if _lock(locks, number, 1))


def _lock(locks: IO[str], start: int = 0, length: int = 0) -> bool:
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(base: Path) -> None:
    """Remove the folders of servers of which no process runs any more."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another start may have removed it
            if folder.lstat().st_uid == os.geteuid():
                with (folder / "locks").open("a") as locks:
                    if _lock(locks):
                        shutil.rmtree(folder)


def _remove_at_exit(folder: Path, owner: int) -> None:
    # Workers inherit this at fork.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
