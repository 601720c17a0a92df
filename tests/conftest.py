"""What the tests share: an app on a database file of its own, callers, a clock that moves, a real server."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import on_postgresql
import pytest
import requests
import sqlalchemy as sa
from click.testing import CliRunner, Result
from flask import Flask, Response, request_finished
from flask.cli import ScriptInfo
from flask.testing import FlaskClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from werkzeug.test import TestResponse

import models
from app import create_app
from commands.__main__ import lanyard as commands
from config import HERE, Settings, state
from models import db

ADMIN_TOKEN = "the-operators-token-of-the-tests"
OPERATOR = {"Authorization": f"Bearer {ADMIN_TOKEN}"}

# `make test` tries the same few examples each time; HYPOTHESIS_PROFILE=long looks for new ones.
_EXAMPLES: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": False,
    "report_multiple_bugs": False,
}
_EXAMPLES["suppress_health_check"] = [HealthCheck.too_slow, HealthCheck.data_too_large]
hypothesis_settings.register_profile(
    "short", max_examples=16, stateful_step_count=25, derandomize=True, **_EXAMPLES
)
hypothesis_settings.register_profile("long", max_examples=100, stateful_step_count=50, **_EXAMPLES)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: a third of the time goes by waiting for servers and locks."""
    return len(os.sched_getaffinity(0)) + 1


class Watch(logging.Handler):
    """Keeps what is logged in this process, and the secrets and tokens that its apps gave out."""

    SECRET = re.compile(r"(?:cs|rt|whsec)_[\w-]{40,}|eyJ[\w-]+\.[\w-]+\.[\w-]+")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.secrets = {ADMIN_TOKEN}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def read(self, app: Flask, response: Response) -> None:
        """Look for secrets in an answer."""
        if response.is_json:
            self.secrets.update(self.SECRET.findall(response.get_data(as_text=True)))

    def leaks(self) -> list[str]:
        """The lines that a secret is in, or all of one but its prefix and hint."""
        text = "\n".join(self.lines)
        leaked = [secret[11:] for secret in self.secrets if secret[11:] in text]
        return [line for line in self.lines if any(part in line for part in leaked)]


# What these show does not depend on the database.
NO_DATABASE = {
    "test_config.py", "test_credentials.py", "test_deploy.py", "test_docs.py", "test_examples.py",
    "test_headers.py", "test_journal.py", "test_openapi.py", "test_real_clients.py", "test_docs_page.py",
    "test_wall.py", "test_connections.py",
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On PostgreSQL, leave out what is about SQLite's file, or about no database."""
    if on_postgresql.is_used():
        left_out = [
            item for item in items if item.get_closest_marker("sqlite") or item.path.name in NO_DATABASE
        ]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_logged() -> Iterator[None]:
    """Holds for all tests of this process together; its failure is an error of the last one."""
    watch = Watch()
    logging.getLogger().addHandler(watch)
    with request_finished.connected_to(watch.read):
        yield
    logging.getLogger().removeHandler(watch)
    assert watch.leaks() == []


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database after its first start; making a signing key takes longer than most tests."""
    folder = tmp_path_factory.mktemp("first-start")
    close(create_app(settings_for(folder), serving=True))
    return folder / "lanyard.db"


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a key that signs in no time, for tests that sign a thousand tokens."""
    folder = tmp_path_factory.mktemp("quick-start")
    close(create_app(settings_for(folder, SIGNING_ALG="ES256"), serving=True))
    return folder / "lanyard.db"


def close(app: Flask) -> None:
    """End the server that the app is: let go of its connections, and of its mark on the database."""
    with app.app_context():
        db.engine.dispose()
    state(app).stop_serving()


def settings_for(folder: Path, **variables: str) -> Settings:
    """Settings for an instance in `folder`, cheap in bcrypt."""
    env = {"INSTANCE": str(folder), "ADMIN_TOKEN": ADMIN_TOKEN, "BCRYPT_COST": "4", **variables}
    env = database_variables(Path(env["INSTANCE"])) | env
    return Settings.from_env({f"LANYARD_{name}": value for name, value in env.items()})


def database_variables(folder: Path) -> dict[str, str]:
    """The settings that give an instance a database of its own, where its folder does not."""
    return {"DATABASE_URL": on_postgresql.url_of(folder)} if on_postgresql.is_used() else {}


def environment_of(folder: Path) -> dict[str, str]:
    """The environment of a command on an instance."""
    variables = {"INSTANCE": str(folder), **database_variables(folder)}
    return {**os.environ, **{f"LANYARD_{name}": value for name, value in variables.items()}}


def engine_of(folder: Path) -> sa.Engine:
    """A way into an instance's database from outside."""
    url = on_postgresql.url_of(folder) if on_postgresql.is_used() else f"sqlite:///{folder}/lanyard.db"
    return sa.create_engine(url, poolclass=sa.NullPool)


def contents(folder: Path) -> bytes:
    """All that is kept of an instance: its files, and what a dump of its database holds."""
    files = b"".join(path.read_bytes() for path in folder.iterdir())
    return files + (on_postgresql.dump(folder) if on_postgresql.is_used() else b"")


def copy_instance(template: Path, folder: Path) -> None:
    """Put a copy of a database, as the fixtures above make it, into an instance's folder."""
    folder.mkdir(exist_ok=True)
    if on_postgresql.is_used():
        on_postgresql.copy(template.parent, folder)
    else:
        shutil.copy(template, folder)


@pytest.fixture
def make_app(tmp_path: Path, first_start: Path) -> Iterator[Callable[..., Flask]]:
    """Make an app with the settings given, on a database of this test's own."""
    folder = tmp_path / "instance"

    def make(**variables: str) -> Flask:
        if not folder.exists():
            copy_instance(first_start, folder)
        return create_app(settings_for(folder, **variables), serving=True)

    yield make
    if on_postgresql.is_used():
        on_postgresql.drop(folder)


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """Anyone."""
    return app.test_client()


class Operator:
    """The operator: calls the management API with the admin token."""

    def __init__(self, app: Flask) -> None:
        self.client = app.test_client()

    def call(self, method: str, path: str = "", **kwargs: Any) -> TestResponse:
        return self.client.open(f"/api/agents{path}", method=method, headers=OPERATOR, **kwargs)

    def create(self, **fields: Any) -> dict[str, Any]:
        response = self.call("POST", json={"name": "an agent", "scopes": ["read", "write"], **fields})
        assert response.status_code == 201, response.text
        return dict(response.json or {})

    def get(self, agent: Mapping[str, Any]) -> dict[str, Any]:
        answer = self.call("GET", f"/{agent['agent']['id']}").json
        assert answer
        return dict(answer["agent"])

    def act(self, agent: Mapping[str, Any], action: str, **fields: Any) -> TestResponse:
        return self.call("POST", f"/{agent['agent']['id']}", json={"action": action, **fields})

    def patch(self, agent: Mapping[str, Any], **fields: Any) -> TestResponse:
        return self.call("PATCH", f"/{agent['agent']['id']}", json=fields)


@pytest.fixture
def operator(app: Flask) -> Operator:
    return Operator(app)


@pytest.fixture
def agent(operator: Operator) -> dict[str, Any]:
    """A registered agent: `{agent, client_id, client_secret}`."""
    return operator.create()


@pytest.fixture
def token(client: FlaskClient, agent: dict[str, Any]) -> dict[str, Any]:
    """The agent's first token answer."""
    return dict(ask_token(client, agent).json or {})


def ask_token(client: FlaskClient, agent: Mapping[str, Any], **fields: Any) -> TestResponse:
    """A token request with the agent's secret; `fields` are added or replace others."""
    body = {
        "grant_type": "client_credentials",
        "client_id": agent["client_id"],
        "client_secret": agent["client_secret"],
        **fields,
    }
    return client.post("/oauth/token", json=body)


def ask_refresh(client: FlaskClient, refresh_token: str, **fields: Any) -> TestResponse:
    return client.post("/oauth/refresh", json={"refresh_token": refresh_token, **fields})


def bearer(token: Mapping[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {token['access_token']}"}


class Clock:
    """The test's hand on the one clock."""

    def __init__(self) -> None:
        self.moment = models.now()

    def now(self) -> datetime:
        return self.moment

    def time(self) -> float:
        """Stand in for `time.time` in models.py."""
        return self.moment.timestamp()

    def advance(self, **by: float) -> None:
        self.moment += timedelta(**by)


@pytest.fixture
def time_machine(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stops the clock; `advance(days=1)` moves it."""
    hand = Clock()
    monkeypatch.setattr(models, "time", hand)
    return hand


class Server:
    """Real gunicorn on a free port, started as a user would."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        program: tuple[str, ...] = ("-m", "gunicorn", "wsgi:app"),
        **variables: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.instance = folder / "instance"
        env = {"INSTANCE": str(self.instance), "PORT": str(self.port), "WORKERS": "2", **variables}
        env = database_variables(self.instance) | env
        self.worker_count = int(env["WORKERS"])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=HERE,
                env={**os.environ, **{f"LANYARD_{name}": value for name, value in env.items()}},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

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


def run_command(app: Flask, *arguments: object, **options: Any) -> Result:
    """Run a command of `./lanyard` in the app; its result has `stdout`, `stderr` and `exit_code`."""
    info = ScriptInfo(create_app=lambda: app)
    return CliRunner().invoke(commands, list(map(str, arguments)), obj=info, **options)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a real server with the arguments and settings given; it stops after the test."""
    running: list[Server] = []

    def start(*arguments: str, **variables: Any) -> Server:
        running.append(Server(tmp_path, *arguments, **{"BCRYPT_COST": "4", **variables}))
        return running[-1]

    yield start
    for server in running:
        server.stop()
