"""Real servers, as a user would start them, and what tests ask them first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from support.forks import Gunicorn
from support.instances import CHEAP, database_variables

from config import HERE

COMMAND = ("-m", "gunicorn", "wsgi:app")


def as_user(uid: int) -> tuple[str, ...]:
    """Run what follows as this user of group 0, who may read this Python in root's home, but not write."""
    capability = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    return ("setpriv", f"--reuid={uid}", "--regid=0", "--clear-groups", *capability)


def instead(*command: str) -> tuple[str, ...]:
    """A program for Python that is the command instead, under the same process id."""
    return ("-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *command)


class Server:
    """Real gunicorn on a free port, as a user would start it."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        program: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        """Start it.

        :param program: Python's arguments for a new process, where that is the subject; else it is a fork.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.instance = folder / "instance"
        env = {"INSTANCE": str(self.instance), "PORT": str(self.port), "WORKERS": "2", **CHEAP, **variables}
        env = database_variables(self.instance) | env
        self.worker_count = int(env["WORKERS"])
        environment = {**os.environ, **{f"LANYARD_{name}": value for name, value in env.items()}}
        self.process: Gunicorn | subprocess.Popen[bytes]
        if not program:
            self.process = Gunicorn("wsgi:app", *arguments, environment=environment, log=self.log)
            return
        command = [sys.executable, *program, *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=HERE, env=environment, stdout=log, stderr=log)

    def wait(self) -> Server:
        """Return when it answers, by whichever worker; fail when it does not within 20 seconds."""
        until = time.monotonic() + 20
        while time.monotonic() < until and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/health", timeout=1)
                if len(self.workers()) == self.worker_count:
                    return self
            except (requests.ConnectionError, requests.Timeout):
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        """The process ids of gunicorn's workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self) -> str:
        """Stop it gracefully; returns its log."""
        self.process.terminate()
        self.process.wait(20)
        return self.log.read_text()

    def kill(self) -> None:
        """End it at once, where its stop is not the subject."""
        for pid in [self.process.pid, *self.workers()] if self.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def register(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"name": "an agent", "scopes": ["read", "write"], **fields}
    response = requests.post(f"{server.url}/api/agents", json=body)
    assert response.status_code == 201, response.text
    return dict(response.json())


def token_body(agent: dict[str, Any]) -> dict[str, str]:
    return {
        "grant_type": "client_credentials",
        "client_id": agent["client_id"],
        "client_secret": agent["client_secret"],
    }


@contextmanager
def running(folder: Path, **variables: Any) -> Iterator[Server]:
    """A server in local mode that several tests share."""
    server = Server(folder, LOCAL="1", **variables)
    try:
        yield server.wait()
    finally:
        server.kill()


def issuer_of(server: Server) -> str:
    return f"http://localhost:{server.port}"


def access_token(server: Server, agent: dict[str, Any]) -> str:
    answer = requests.post(f"{server.url}/oauth/token", json=token_body(agent))
    return str(answer.json()["access_token"])


def lanyard(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return subprocess.run([HERE / "lanyard", *arguments], capture_output=True, text=True, **options)
