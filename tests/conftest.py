"""Fixtures that several files use: an app on its own database, a stopped clock, a real server."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request_finished
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache
from support import postgresql as on_postgresql
from support.callers import Operator, ask_token
from support.clock import Clock
from support.instances import close, copy_instance, settings_for
from support.receiver import Receiver
from support.revisions import folder_of_revisions
from support.servers import Server
from support.watch import Watch
from werkzeug.routing import Rule

import models
from app import create_app
from migrations import upgrade
from storage import sqlite

# Containers often turn bytecode off; without it every process compiles every module that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# `make test` tries the same few examples each time; HYPOTHESIS_PROFILE=long looks for new ones.
_EXAMPLES: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": False,
    "report_multiple_bugs": False,
}
_EXAMPLES["suppress_health_check"] = [HealthCheck.too_slow, HealthCheck.data_too_large]
hypothesis_settings.register_profile(
    "short", max_examples=6, stateful_step_count=25, derandomize=True, **_EXAMPLES
)
hypothesis_settings.register_profile("long", max_examples=40, stateful_step_count=40, **_EXAMPLES)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Of the apps in this process, hundreds of which leave their folders; servers keep the real size.
sqlite.RESERVE = 64 * 1024


def pytest_xdist_auto_num_workers() -> int:
    """Two processes more than there are cores: a third of the time goes by waiting for servers and locks."""
    return len(os.sched_getaffinity(0)) + 2


# What these show does not depend on the database.
NO_DATABASE = {
    "test_access_log.py", "test_config.py", "test_connections.py", "test_console.py",
    "test_credentials.py", "test_deploy.py", "test_docs.py", "test_examples.py",
    "test_layout.py", "test_openapi.py", "test_real_clients.py", "test_ssrf.py",
}  # fmt: skip


# They take longest: started last, one of them would keep one core busy and the others idle.
FIRST = ("test_faults.py", "test_connections.py", "test_serving.py", "test_metrics.py", "test_delivery.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest; on PostgreSQL, leave out what is about SQLite's file, or no database."""
    items.sort(key=lambda item: item.path.name not in FIRST)
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


@pytest.fixture(scope="session", autouse=True)
def no_route_is_compiled_twice() -> Iterator[None]:
    """Keep the functions that werkzeug writes for each route: they take most of the 25 ms of `create_app`."""
    compiled: dict[tuple[str, bool], Any] = {}
    write = Rule._compile_builder

    def look_up(rule: Rule, append_unknown: bool = True) -> Any:
        key = (rule.rule, append_unknown)
        if key not in compiled:
            compiled[key] = write(rule, append_unknown)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "_compile_builder", look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_statement_is_compiled_twice() -> Iterator[None]:
    """Share SQLAlchemy's cache, whose keys have the dialect in them: it takes 15 ms to fill for each app."""
    make = SQLAlchemy._make_engine
    compiled: Any = LRUCache(1000)

    def share(*arguments: Any) -> Any:
        engine = make(*arguments)
        engine._compiled_cache = compiled
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SQLAlchemy, "_make_engine", share)
        patch.setattr(DefaultDialect, "__eq__", lambda self, other: type(self) is type(other))
        patch.setattr(DefaultDialect, "__hash__", lambda self: hash(type(self)))
        yield


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database after its first start, to be copied: Alembic takes longer than most tests."""
    folder = tmp_path_factory.mktemp("first-start")
    close(create_app(settings_for(folder), serving=True))
    return folder / "lanyard.db"


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


@pytest.fixture
def time_machine(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stops the clock; `advance(days=1)` moves it."""
    hand = Clock()
    monkeypatch.setattr(models, "time", hand)
    return hand


@pytest.fixture
def serve(tmp_path: Path, first_start: Path) -> Iterator[Callable[..., Server]]:
    """Start a real server with the arguments and settings given; it stops after the test.

    It is its first start where a `program` is named.
    """
    running: list[Server] = []

    def start(*arguments: str, **variables: Any) -> Server:
        if "program" not in variables and not (tmp_path / "instance").exists():
            copy_instance(first_start, tmp_path / "instance")
        running.append(Server(tmp_path, *arguments, **variables))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    listening: list[Receiver] = []

    def start(*arguments: Any) -> Receiver:
        listening.append(Receiver(*arguments))
        return listening[-1]

    yield start
    for receiver in listening:
        receiver.shutdown()
        receiver.server_close()


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make this code the next release, whose revision does what is given; returns its revisions' folder."""

    def make(body: str) -> Path:
        shutil.rmtree(tmp_path / "next", ignore_errors=True)
        monkeypatch.setattr(upgrade, "FOLDER", folder_of_revisions(tmp_path / "next", body))
        return upgrade.FOLDER

    return make
