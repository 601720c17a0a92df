"""Run the tests on a real PostgreSQL that is started for them: `postgresql.py [pytest's arguments]`.

As a module it gives each instance folder of the tests a database of its own there.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import psycopg

VARIABLE = "TEST_POSTGRESQL"  # the folder that the server's socket is in
# A power cut may take these databases: nobody waits for its disk.
OPTIONS = "-c fsync=off -c full_page_writes=off -c max_connections=500 -c listen_addresses="


def is_used() -> bool:
    """Whether the tests run on PostgreSQL."""
    return VARIABLE in os.environ


def url_of(folder: Path) -> str:
    """The address of an instance's database, which is made if there is none."""
    name = _name(folder)
    if not _server().execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
        _server().execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
    return f"postgresql+psycopg://lanyard@/{name}?host={os.environ[VARIABLE]}"


def copy(template: Path, folder: Path) -> None:
    """Give an instance a copy of another's database, which nobody may have open."""
    _server().execute(  # type: ignore[call-overload]
        f'CREATE DATABASE "{_name(folder)}" TEMPLATE "{_name(template)}" STRATEGY file_copy'
    )


def drop(folder: Path) -> None:
    """Delete an instance's database, whoever has it open."""
    _server().execute(f'DROP DATABASE IF EXISTS "{_name(folder)}" WITH (FORCE)')  # type: ignore[arg-type]


def dump(folder: Path) -> bytes:
    """Everything in an instance's database, as text."""
    command = [str(_program("pg_dump")), "-h", os.environ[VARIABLE], "-U", "lanyard", _name(folder)]
    return subprocess.check_output(command)


def _name(folder: Path) -> str:
    return "lanyard_" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _server() -> psycopg.Connection[Any]:
    return _connection(os.getpid())


@cache
def _connection(process: int) -> psycopg.Connection[Any]:
    return psycopg.connect(f"host={os.environ[VARIABLE]} user=lanyard dbname=postgres", autocommit=True)


def _program(name: str) -> str | None:
    """One of PostgreSQL's own, of the newest version there is."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return shutil.which(name, path=os.pathsep.join([*map(str, reversed(places)), os.environ["PATH"]]))


def main() -> int:
    """Start PostgreSQL, run pytest, stop it; returns pytest's exit code."""
    found = _program("initdb")
    if found is None:
        print("There is no PostgreSQL here to run the tests on: apt-get install postgresql", file=sys.stderr)
        return 1
    # In memory, where there is room.
    shared = Path("/dev/shm")  # noqa: S108
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 4 * 1024**3
    folder = Path(tempfile.mkdtemp(prefix="lanyard-", dir=shared if has_room else None))
    # PostgreSQL will not be root.
    account = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    shutil.chown(folder, account)
    ctl = [str(Path(found).with_name("pg_ctl")), "-D", f"{folder}/data", "-s", "-w", "-l", f"{folder}/log"]
    try:
        initdb = [found, "-D", f"{folder}/data", "-U", "lanyard", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, user=account, check=True, stdout=subprocess.DEVNULL, cwd="/")
        started = [*ctl, "-o", f"{OPTIONS} -k {folder}", "start"]
        subprocess.run(started, user=account, check=True, cwd="/")
        environment = {**os.environ, VARIABLE: str(folder)}
        # Apps that tests leave behind leave connections behind.
        pytest = [sys.executable, "-m", "pytest", "-W", "ignore::ResourceWarning"]
        return subprocess.run([*pytest, *sys.argv[1:]], env=environment).returncode
    finally:
        subprocess.run([*ctl, "-m", "immediate", "stop"], user=account, cwd="/")
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
