"""What can happen to a server: a full disk, files nobody may write, a lock held, a file damaged."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHUNK = 64 * 1024  # bytes


class Unavailable(Exception):
    """This machine does not let us do that to it; the text says why."""


@contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[Path]:
    """A file system of its own at `folder`.

    :raises Unavailable: without the right to mount.
    """
    folder.mkdir()
    _command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _command("umount", "--lazy", str(folder))


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """No byte is free on the file system of `folder`."""
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            for size in (CHUNK, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"." * size)
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(database: Path) -> Iterator[None]:
    """Nobody may write the database, not even who has it open, as when the kernel gives up on a disk.

    A file system with files open for writing cannot be remounted read-only by hand, so the files are
    made immutable, which ext4 checks at every write.

    :raises Unavailable: without the right to, or on a file system that knows no such thing.
    """
    files = [str(database), f"{database}-wal"]
    _command("chattr", "+i", *files)
    try:
        with suppress(PermissionError):
            os.close(os.open(database, os.O_WRONLY))
            raise Unavailable("this file system lets immutable files be written")
        yield
    finally:
        _command("chattr", "-i", *files)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process holds the database's write lock."""
    connection = sqlite3.connect(database, isolation_level=None, timeout=20, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        connection.close()


def _garbage_header(path: Path) -> None:
    _overwrite(path, 0, b"this is a letter to my aunt")


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 1000)


def _page_overwritten(path: Path) -> None:
    page = 4096
    _overwrite(path, path.stat().st_size // page // 2 * page, b"\xa5" * page)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "garbage header": _garbage_header,
    "truncated": _truncated,
    "page overwritten": _page_overwritten,
}


def _overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _command(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable(f"there is no {command[0]} here") from None
    if done.returncode:
        raise Unavailable(f"{command[0]} is not allowed here: {done.stderr.strip().splitlines()[0]}")
