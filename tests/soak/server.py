"""A real server to be hurt: gunicorn with two workers on a port and an instance that outlive its death."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import requests

HERE = Path(__file__).resolve().parent
ADMIN_TOKEN = "the-operators-token-of-the-soak"
WORKERS = 2


class Server:
    """Started, killed and started anew on the same database; its log goes on."""

    def __init__(self, folder: Path, instance: Path | None = None) -> None:
        self.instance = instance or folder / "instance"
        self.database = self.instance / "lanyard.db"
        self.reserve = self.instance / "lanyard.db.reserve"
        self.log = folder / "server.log"
        self.clock = folder / "clock"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        """Start it; returns at once."""
        mine = {"INSTANCE": str(self.instance), "PORT": str(self.port), "ADMIN_TOKEN": ADMIN_TOKEN}
        mine |= {"WORKERS": str(WORKERS), "BCRYPT_COST": "4", "SIGNING_ALG": "ES256"}
        mine |= {"WEBHOOK_ALLOW_PRIVATE": "1"}
        env = {name: value for name, value in os.environ.items() if not name.startswith("LANYARD_")}
        env |= {f"LANYARD_{name}": value for name, value in mine.items()}
        env |= {"PYTHONPATH": str(HERE / "clock"), "SOAK_CLOCK": str(self.clock)}
        self._env = env
        command = [sys.executable, "-m", "gunicorn", "wsgi:app"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=HERE.parents[1], env=env, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ./lanyard on its instance, by the right clock."""
        env = {name: value for name, value in self._env.items() if name != "PYTHONPATH"}
        command = [str(HERE.parents[1] / "lanyard"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def wait(self) -> Server:
        """Return when it answers; raise RuntimeError when it does not within a minute."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/health", timeout=5)
                if len(self.workers()) == WORKERS:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-2000:]}")

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill_worker(self) -> None:
        """kill -9 of one worker, and wait until the master has another."""
        victim = random.choice(self.workers())
        os.kill(victim, signal.SIGKILL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            now = self.workers()
            if victim not in now and len(now) == WORKERS:
                return
            time.sleep(0.02)
        raise RuntimeError("no worker came for the one that was killed")

    def kill_all(self) -> None:
        """kill -9 of the master and all workers at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def terminate(self) -> int:
        """SIGTERM, as `systemctl stop` sends it; returns the exit code."""
        self.process.terminate()
        return self.process.wait(30)

    def reload(self) -> None:
        """SIGHUP, and wait until all workers are new."""
        old = set(self.workers())
        self.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 30
        while old & set(self.workers()):
            if time.monotonic() > until:
                raise RuntimeError("old workers outlived a SIGHUP")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it if it runs, however it is."""
        if self.process.poll() is None:
            self.kill_all()

    def set_clock(self, seconds: float) -> None:
        """Let its clock be off by that much from now on."""
        draft = self.clock.with_suffix(".new")
        draft.write_text(str(seconds))
        draft.replace(self.clock)

    def offset(self) -> float:
        """How much its clock is off."""
        return float(self.clock.read_text()) if self.clock.exists() else 0

    def now(self) -> float:
        """What its clock says, in seconds since 1970."""
        return time.time() + self.offset()

    def integrity(self) -> str:
        """What SQLite says of the file: `ok`, or what is broken."""
        connection = sqlite3.connect(self.database, timeout=10)
        try:
            return "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
        finally:
            connection.close()
