"""Files that appear whole or not at all, their owners, and the folders that they are in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make the folder and its missing parents, with mode 0700 under any umask."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield an empty file of mode 0600 that durably replaces `file`, unless the block raises."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    draft.unlink(missing_ok=True)  # of a killed process: numbers of processes repeat
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield draft
        _sync(draft)
        os.replace(draft, file)
        _sync(file.parent)
    finally:
        draft.unlink(missing_ok=True)  # or it would keep a full disk full


def _sync(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_private(path: Path) -> None:
    """Set mode 0600 on a file of this process's user, unless it is a link to a file of another program."""
    if not path.is_symlink() and path.stat().st_uid == os.geteuid():
        path.chmod(0o600)


def describe_error(error: OSError) -> str:
    """Return the error's text; when permission was denied, also who owns the file, or its folder."""
    path = str(error.filename)
    if not isinstance(error, PermissionError) or not os.path.isabs(path):
        return str(error)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    status = os.stat(path)
    owner = f"{path} is of uid {status.st_uid} and gid {status.st_gid}, mode {status.st_mode & 0o7777:o}"
    return f"{error}; {owner}, and this process has uid {os.geteuid()} and gid {os.getegid()}"


def copy_owner(source: Path, target: Path) -> None:
    """Give `target` the owner of `source` when root runs this, so that the server can still use its files."""
    if os.geteuid() == 0:
        status = source.stat()
        os.chown(target, status.st_uid, status.st_gid)
