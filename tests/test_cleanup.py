"""Rubbish goes by itself."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator, ask_refresh, ask_token
from support.clock import Clock
from support.instances import lock

from models import Base, db
from ops import cleanup


@pytest.fixture
def app(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """An app that sweeps after every answer, two rows at a time."""
    monkeypatch.setattr(cleanup, "INTERVAL", 0)
    monkeypatch.setattr(cleanup, "BATCH", 2)
    made: Flask = make_app()
    return made


def rows(app: Flask, table: str) -> int:
    with app.app_context():
        count = sa.select(sa.func.count()).select_from(Base.metadata.tables[table])
        return int(db.session.scalar(count) or 0)


def test_expired_rows_are_deleted_a_batch_at_a_time(
    app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    tokens = [ask_token(client, agent).json for _ in range(5)]
    for token in tokens:
        client.post("/oauth/revoke", json={"token": token["access_token"]}, headers=OPERATOR)
    operator.act(agent, "rotate", grace_period=60)
    client.post("/api/keys/rotate", headers=OPERATOR)
    tables = ["refresh_families", "revoked_tokens", "client_secrets", "signing_keys"]
    assert [rows(app, table) for table in tables] == [5, 5, 2, 2]
    time_machine.advance(days=32)
    client.get("/health").close()
    assert [rows(app, table) for table in tables] == [3, 3, 1, 1]
    for _ in range(2):
        client.get("/health").close()
    assert [rows(app, table) for table in tables] == [0, 0, 1, 1]


def test_a_clock_that_was_ahead_revives_no_revoked_token(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    token = ask_token(client, operator.create()).json["access_token"]
    client.post("/oauth/revoke", data={"token": token}, headers=OPERATOR)
    time_machine.advance(days=30)
    client.get("/health").close()
    time_machine.advance(days=-30)
    body = client.post("/oauth/introspect", data={"token": token}, headers=OPERATOR).json
    assert body == {"active": False}


def test_days_that_the_usage_shows_no_more_are_deleted(
    app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    for _ in range(40):
        ask_token(client, agent).close()
        time_machine.advance(days=1)
    assert 30 <= rows(app, "usage_days") <= 32


def test_what_is_good_stays(app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock) -> None:
    token = ask_token(client, operator.create()).json
    time_machine.advance(days=6)
    for _ in range(3):
        client.get("/health").close()
    assert ask_refresh(client, token["refresh_token"]).status_code == 200


def test_expired_rows_do_not_accumulate_under_constant_load(
    app: Flask, client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create()
    most = 0
    for _ in range(60):
        ask_token(client, agent).close()
        time_machine.advance(hours=12)
        most = max(most, rows(app, "refresh_families"))
    assert most <= 15, "seven days of two a day, and the newest"


def test_a_sweep_waits_for_its_turn_among_writers(app: Flask, tmp_path: Path) -> None:
    other = lock(tmp_path)
    release = threading.Timer(0.05, other.close)
    release.start()
    with app.app_context():
        assert cleanup.delete_batch() is False, "under load there is always another writer"
    release.join()


def test_a_sweep_does_not_wait_long_for_another_writer(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        with closing(lock(tmp_path)), pytest.raises(sa.exc.OperationalError):
            started = time.monotonic()
            cleanup.delete_batch()
        assert 0.25 < time.monotonic() - started < 3
        db.session.rollback()
        assert cleanup.delete_batch() is False


@pytest.mark.parametrize(
    "error",
    [
        sa.exc.OperationalError("sweep", {}, Exception("database is locked")),
        sa.exc.TimeoutError("QueuePool limit reached"),
    ],
    ids=["locked", "no free connection"],
)
def test_a_locked_database_delays_the_sweep_only(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, error: sa.exc.SQLAlchemyError
) -> None:
    sweep = Mock(side_effect=[error, False])
    monkeypatch.setattr(cleanup, "delete_batch", sweep)
    for sweeps in (1, 2):
        client.get("/health").close()
        assert sweep.call_count == sweeps
