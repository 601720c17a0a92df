"""Servers to measure, run by gunicorn with Lanyard's own configuration."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

HERE = Path(__file__).resolve().parent
ADMIN_TOKEN = "the-operators-token-of-the-benchmark"
OPERATOR = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


class Server:
    """gunicorn on a free port, until `stop()`; `tree` is the checkout to run."""

    def __init__(
        self, instance: Path, app: str = "wsgi:app", path: str = "/health", tree: Path = HERE.parent
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.instance = instance
        instance.mkdir(exist_ok=True)
        own = {"INSTANCE": str(instance), "PORT": str(port), "HOST": "127.0.0.1", "ADMIN_TOKEN": ADMIN_TOKEN}
        env = {name: value for name, value in os.environ.items() if not name.startswith("LANYARD_")}
        env |= {f"LANYARD_{name}": value for name, value in own.items()}
        # BENCH_WORKERS=1 sets the server's LANYARD_WORKERS.
        env |= {f"LANYARD_{n[6:]}": value for n, value in os.environ.items() if n.startswith("BENCH_")}
        python = tree / ".venv/bin/python"
        command = [str(python) if python.exists() else sys.executable, "-m", "gunicorn"]
        command += ["--pythonpath", str(HERE), app]
        started = time.monotonic()
        with (instance / "server.log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=tree, env=env, stdout=log, stderr=log)
        self._wait(path)
        self.first_answer = time.monotonic() - started

    def _wait(self, path: str) -> None:
        while self.process.poll() is None:
            try:
                requests.get(self.url + path, timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.01)
        raise SystemExit((self.instance / "server.log").read_text())

    def post(self, path: str, **kwargs: Any) -> Any:
        """Send a request that must succeed, and return the JSON of its response."""
        response = requests.post(self.url + path, timeout=60, **kwargs)
        response.raise_for_status()
        return response.json()

    def memory(self) -> tuple[float, float]:
        """Return MB of all processes: proportional (shared pages counted once), and the sum of resident."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        totals = {"Pss:": 0, "Rss:": 0}
        for process in [str(pid), *children]:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, *value = line.split()
                if name in totals:
                    totals[name] += int(value[0])
        return totals["Pss:"] / 1024, totals["Rss:"] / 1024

    def stop(self) -> None:
        """Stop the server, and wait for its end."""
        self.process.terminate()
        self.process.wait(30)
