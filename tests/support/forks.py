"""Start gunicorn as a fork of a process that has imported the libraries, which is most of what a start costs.

Only the libraries: each server imports gunicorn's configuration and all of Lanyard's modules itself.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
# Without prometheus_client, which reads the environment when it is imported.
LIBRARIES = (
    "gunicorn.workers.ggevent", "alembic.command", "authlib.integrations.flask_oauth2", "bcrypt",
    "cryptography.fernet", "flask_smorest", "flask_sqlalchemy", "joserfc.jwt", "sqlalchemy.dialects.sqlite",
    "sqlalchemy.dialects.postgresql", "standardwebhooks",
)  # fmt: skip


class Gunicorn:
    """`python -m gunicorn`, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, *arguments: str, environment: dict[str, str], log: Path) -> None:
        self.pid: int = _ask(arguments=arguments, environment=environment, log=str(log))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 20) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("gunicorn", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _ask(**request: Any) -> Any:
    process = _parent()
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@cache
def _parent() -> Any:
    """The parent of all servers, which ends when its input does."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-P", __file__], stdin=pipe, stdout=pipe, cwd=HERE, text=True)
    atexit.register(process.communicate)
    return process


def main() -> None:
    """Answer each line of input: fork a server, or tell its exit code once it has ended."""
    import_module("gunicorn.app.wsgiapp")
    monkey = import_module("gevent.monkey")
    monkey.patch_all()  # as gunicorn.conf.py does, before any other import
    for name in LIBRARIES:
        import_module(name)
    # gevent's own would start an event loop in this process.
    fork, waitpid = (monkey.get_original("os", name) for name in ("fork", "waitpid"))
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = fork()
            if answer == 0:
                return run(**request)
        print(json.dumps(answer), flush=True)


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be gunicorn, in this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(HERE))
    sys.argv[1:] = arguments
    runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
