"""Encrypted columns: what is in the database in clear, and which keys open it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from flask import Flask
from support.callers import Operator, ask_token
from support.hooks import create, due_deliveries
from support.instances import close, contents, engine_of, settings_for

from app import create_app
from config import SettingError
from models import decrypt


def test_with_a_secret_key_no_key_or_secret_is_stored_in_clear(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    key = Fernet.generate_key().decode()
    app = make_app(SECRET_KEY=key, WEBHOOK_ALLOW_PRIVATE="1", INSTANCE=str(tmp_path / "sealed"))
    secret = create(app.test_client())["secret"]
    assert ask_token(app.test_client(), Operator(app).create()).status_code == 200
    files = contents(tmp_path / "sealed")
    assert secret.encode() not in files
    assert b'"d"' not in files
    with app.app_context():
        assert decrypt(due_deliveries(app)[0].secret, (key,)) == secret


def test_without_a_secret_key_they_are_stored_in_clear(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1", INSTANCE=str(tmp_path / "open"))
    secret = create(app.test_client())["secret"]
    files = contents(tmp_path / "open")
    assert secret.encode() in files
    assert b'"d"' in files


def test_the_first_of_several_secret_keys_encrypts(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    place = {"WEBHOOK_ALLOW_PRIVATE": "1", "INSTANCE": str(tmp_path / "sealed")}
    app = make_app(**place)
    secret = create(app.test_client())["secret"]
    for keys in (old, f"{new},{old}", new):
        close(app)
        app = make_app(SECRET_KEY=keys, **place)
        Operator(app).create()
        with app.app_context():
            (sealed,) = {attempt.secret for attempt in due_deliveries(app)}
            assert (sealed != secret, decrypt(sealed, tuple(keys.split(",")))) == (True, secret)
        assert ask_token(app.test_client(), Operator(app).create()).status_code == 200
    for wrong in ("", old):
        with pytest.raises(SettingError, match="LANYARD_SECRET_KEY must hold the key"):
            make_app(SECRET_KEY=wrong, **place)


def stored_secrets(folder: Path) -> list[str]:
    with engine_of(folder).connect() as connection:
        found = "SELECT jwk FROM signing_keys UNION ALL SELECT secret FROM webhooks"
        return list(connection.scalars(sa.text(found)))


def test_a_command_does_not_encrypt_stored_secrets(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    create(app.test_client())
    close(app)
    before = stored_secrets(tmp_path / "instance")
    create_app(settings_for(tmp_path / "instance", SECRET_KEY=Fernet.generate_key().decode()))
    assert stored_secrets(tmp_path / "instance") == before


def test_stored_secrets_are_not_encrypted_while_another_server_runs(
    make_app: Callable[..., Flask], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    create(running.test_client())
    before, key = stored_secrets(tmp_path / "instance"), Fernet.generate_key().decode()
    second = make_app(SECRET_KEY=key)
    assert stored_secrets(tmp_path / "instance") == before
    for app in (running, second):
        close(app)
    make_app(SECRET_KEY=key)
    assert {text[:7] for text in stored_secrets(tmp_path / "instance")} == {"fernet:"}
    assert "no server starts without it" in caplog.text


def test_a_server_without_the_secret_key_is_not_ready(
    make_app: Callable[..., Flask], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    agent = Operator(app).create()
    with engine_of(tmp_path / "instance").begin() as connection:
        connection.execute(sa.text("UPDATE signing_keys SET jwk = 'fernet:x'"))
    refused = [app.test_client().get("/health/ready"), ask_token(app.test_client(), agent)]
    assert [answer.status_code for answer in refused] == [503, 503]
    assert "LANYARD_SECRET_KEY must hold the key" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("key", ["short", "x" * 44, "é" * 44])
def test_a_malformed_secret_key_stops_the_start(make_app: Callable[..., Flask], key: str) -> None:
    with pytest.raises(SettingError, match="LANYARD_SECRET_KEY must be") as caught:
        make_app(SECRET_KEY=key)
    assert key not in str(caught.value)
