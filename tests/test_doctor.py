"""The doctor finds what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from cryptography.fernet import Fernet
from flask import Flask
from support.callers import OPERATOR
from support.clock import Clock
from support.instances import ADMIN_TOKEN, close, engine_of, settings_for
from support.servers import Server, lanyard

from commands import doctor
from commands.__main__ import lanyard as commands
from commands.doctor import FAIL, OK, WARN

KEY, OTHER_KEY = Fernet.generate_key().decode(), Fernet.generate_key().decode()


@pytest.fixture
def folder(make_app: Callable[..., Flask], tmp_path: Path) -> Path:
    """An instance, sound but for its secrets' being in clear."""
    make_app()
    return tmp_path / "instance"


def found(folder: Path, level: str, subject: str, **variables: str) -> str:
    """What the doctor says about the subject on this level."""
    findings = doctor.examine(settings_for(folder, **variables))
    return "\n".join(one.text for one in findings if (one.level, one.subject) == (level, subject))


def change(folder: Path, statement: str) -> None:
    with engine_of(folder).begin() as connection:
        connection.execute(sa.text(statement))


@pytest.mark.sqlite
def test_a_sound_instance_passes_all_checks(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app(SECRET_KEY=KEY)
    findings = list(doctor.examine(settings_for(tmp_path / "instance", SECRET_KEY=KEY)))
    assert {one.subject for one in findings} == {
        "settings", "server", "folder", "files", "admin token", "disk", "wal", "database", "clock",
        "keys", "secrets", "webhooks",
    }  # fmt: skip
    assert [one for one in findings if one.level != OK] == []


def test_the_checks_change_nothing(folder: Path) -> None:
    list(doctor.examine(settings_for(folder)))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lanyard.db-shm"}
    list(doctor.examine(settings_for(folder)))
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lanyard.db-shm"}
    assert after == before


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ISSUER": "https://id.example"}, "LANYARD_TRUSTED_PROXIES is 0"),
        ({"TRUSTED_PROXIES": "1"}, "LANYARD_ISSUER is http"),
        ({"HOST": "0.0.0.0"}, "set LANYARD_ISSUER"),  # noqa: S104 - nothing binds it
        ({"WEBHOOK_ALLOW_PRIVATE": "1"}, "LANYARD_WEBHOOK_ALLOW_PRIVATE"),
    ],
    ids=["no proxies", "no https", "host", "private webhooks"],
)
def test_contradicting_settings_are_named(folder: Path, variables: dict[str, str], told: str) -> None:
    assert told in found(folder, WARN, "settings", **variables)
    assert told not in found(folder, WARN, "settings", SECRET_KEY=KEY)


def test_misspelt_settings_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANYARD_PROT", "9000")
    assert "LANYARD_PROT" in found(folder, WARN, "settings")


@pytest.mark.sqlite
def test_a_running_server_is_found(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve().wait()
    assert found(server.instance, OK, "server") == "A server runs on this instance."
    server.stop()
    assert found(server.instance, OK, "server") == "No server runs on this instance."


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ["lanyard.db", "lanyard.db-wal", "admin_token", "lanyard.db.replaced-1"])
def test_files_that_others_may_read_are_named(folder: Path, name: str) -> None:
    (folder / name).touch()
    for file in folder.iterdir():
        file.chmod(0o600)
    assert found(folder, FAIL, "files") == ""
    (folder / name).chmod(0o640)
    assert f"chmod 600 {folder / name}" in found(folder, FAIL, "files")


@pytest.mark.sqlite
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_another_owner_are_named(folder: Path) -> None:
    os.chown(folder / "lanyard.db.lock", 12345, -1)
    assert "lanyard.db.lock is not owned" in found(folder, FAIL, "files")


def test_a_folder_that_others_may_change_is_named(folder: Path) -> None:
    folder.chmod(0o777)
    assert "chmod go-w" in found(folder, FAIL, "folder")
    folder.chmod(0o770)
    assert f"Group {folder.stat().st_gid} may change files" in found(folder, WARN, "folder")


def test_a_bad_admin_token_is_named(folder: Path) -> None:
    assert "no " in found(folder, WARN, "admin token", ADMIN_TOKEN="")
    (folder / "admin_token").write_text("short")
    told = found(folder, FAIL, "admin token", ADMIN_TOKEN="")
    assert "at least 16" in told
    (folder / "admin_token").write_text(ADMIN_TOKEN)
    assert ADMIN_TOKEN not in found(folder, OK, "admin token", ADMIN_TOKEN="")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("free", "level"), [(10**6, FAIL), (10**8, WARN), (10**10, OK)], ids=["none", "little", "enough"]
)
def test_little_space_on_the_disk_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "are free" in found(folder, level, "disk")


@pytest.mark.sqlite
def test_a_reserve_that_is_missing_or_used_is_named(folder: Path) -> None:
    assert "reserve" not in found(folder, WARN, "disk")
    os.truncate(folder / "lanyard.db.reserve", 0)
    assert "no token until" in found(folder, FAIL, "disk")
    (folder / "lanyard.db.reserve").unlink()
    assert "No reserve lets" in found(folder, WARN, "disk")


@pytest.mark.sqlite
def test_a_large_wal_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LARGE_WAL", -1)
    assert "restart the server" in found(folder, WARN, "wal")


@pytest.mark.sqlite
def test_a_damaged_database_is_a_failure(folder: Path) -> None:
    file = folder / "lanyard.db"
    change(folder, "PRAGMA journal_mode = DELETE")
    content = bytearray(file.read_bytes())
    content[4096 : 4096 * 8] = b"\xff" * 4096 * 7
    file.write_bytes(content)
    assert "restore a backup" in found(folder, FAIL, "database")


@pytest.mark.sqlite
def test_orphaned_rows_are_a_failure(folder: Path) -> None:
    change(folder, "INSERT INTO usage_days VALUES (99, '2026-01-01', 1, 1)")
    assert "rows of usage_days" in found(folder, FAIL, "database")


def test_a_newer_schema_is_a_failure(folder: Path, time_machine: Clock) -> None:
    time_machine.advance(minutes=-30)
    assert "The database knows of" in found(folder, WARN, "clock")


def test_a_clock_that_was_never_set_is_a_failure(folder: Path, time_machine: Clock) -> None:
    time_machine.advance(days=-1000)
    assert "set the clock" in found(folder, FAIL, "clock")


def test_an_old_signing_key_is_a_warning(folder: Path, time_machine: Clock) -> None:
    assert "due by" in found(folder, OK, "keys")
    assert "RS256" in found(folder, WARN, "keys", SIGNING_ALG="RS256")
    time_machine.advance(days=366)
    assert "366 days: ./lanyard keys rotate" in found(folder, WARN, "keys")


def test_the_next_signing_key_is_shown(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app().test_client().post("/api/keys/rotate", headers=OPERATOR)
    assert "the next one from" in found(tmp_path / "instance", OK, "keys")


@pytest.mark.parametrize(
    ("sealed_with", "given", "level", "told"),
    [
        ("", "", WARN, "in clear"),
        ("", KEY, WARN, "start one"),
        (KEY, KEY, OK, "newest key"),
        (KEY, f"{OTHER_KEY},{KEY}", WARN, "start one"),
        (KEY, OTHER_KEY, FAIL, "add the key"),
        (KEY, "", FAIL, "add the key"),
    ],
    ids=["clear", "not yet sealed", "sealed", "old key", "wrong key", "lost key"],
)
def test_encryption_of_secrets_is_checked(
    make_app: Callable[..., Flask], tmp_path: Path, sealed_with: str, given: str, level: str, told: str
) -> None:
    make_app(SECRET_KEY=sealed_with)
    assert told in found(tmp_path / "instance", level, "secrets", SECRET_KEY=given)


def test_failing_webhooks_are_named(
    make_app: Callable[..., Flask], tmp_path: Path, time_machine: Clock
) -> None:
    client = make_app(WEBHOOK_ALLOW_PRIVATE="1").test_client()
    body = {"name": "audit", "url": "http://127.0.0.1:9/hook", "events": ["agent.*"]}
    webhook = client.post("/api/webhooks", json=body, headers=OPERATOR).json["webhook"]
    client.post("/api/agents", json={"name": "x"}, headers=OPERATOR)
    folder = tmp_path / "instance"
    assert found(folder, WARN, "webhooks", WEBHOOK_ALLOW_PRIVATE="1") == ""
    assert "LANYARD_WEBHOOK_ALLOW_PRIVATE" in found(folder, WARN, "webhooks")
    time_machine.advance(minutes=11)
    overdue = "1 deliveries are overdue: does the server run?"
    assert found(folder, WARN, "webhooks", WEBHOOK_ALLOW_PRIVATE="1") == overdue
    change(folder, "UPDATE deliveries SET status = 'dead', next_attempt_at = NULL")
    change(folder, "UPDATE webhooks SET is_active = false, disabled_reason = 'Gone.'")
    assert found(folder, WARN, "webhooks").splitlines() == [
        "'audit' is switched off: Gone.",
        f"1 deliveries are dead: ./lanyard webhooks deliveries {webhook['id']} --status dead",
    ]


def run(*arguments: str, **variables: str) -> Any:
    env = {f"LANYARD_{name}": value for name, value in variables.items()}
    return CliRunner().invoke(commands, ["doctor", *arguments], env=env)


@pytest.mark.sqlite
def test_the_command_prints_a_line_for_each_check(folder: Path) -> None:
    result = run(INSTANCE=str(folder), ADMIN_TOKEN=ADMIN_TOKEN)
    assert result.exit_code == 0, result.output
    assert {line.split()[0] for line in result.stdout.splitlines()} == {"OK", "WARN"}
    told = json.loads(run("--json", INSTANCE=str(folder), ADMIN_TOKEN=ADMIN_TOKEN).stdout)
    assert set(told[0]) == {"level", "subject", "text"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [({"PORT": "x"}, "LANYARD_PORT must be"), ({"INSTANCE": "/nowhere/at/all"}, "There is no /nowhere")],
    ids=["a bad setting", "no instance"],
)
def test_a_failure_is_an_exit_code(variables: dict[str, str], told: str) -> None:
    result = run(**variables)
    assert result.exit_code == 1
    assert told in result.stdout
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.sqlite
def test_the_command_looks_at_what_the_server_has(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app(ISSUER="https://id.example.com", TRUSTED_PROXIES="1", LOCAL="0")
    env = {"LANYARD_INSTANCE": str(tmp_path / "instance"), "LANYARD_ADMIN_TOKEN": ADMIN_TOKEN}
    output = CliRunner().invoke(commands, ["doctor"], env=env).output
    assert "Tokens name https://id.example.com." in output
    assert "LANYARD_TRUSTED_PROXIES" not in output


@pytest.mark.sqlite
def test_a_command_refuses_another_database_than_the_servers(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    make_app(DATABASE_URL=f"sqlite:///{tmp_path}/instance/other.db")
    env = {"LANYARD_INSTANCE": str(tmp_path / "instance"), "LANYARD_ADMIN_TOKEN": ADMIN_TOKEN}
    for command in (["agents", "list"], ["backup", str(tmp_path / "copy.db")], ["doctor"]):
        result = CliRunner().invoke(commands, command, env=env)
        assert result.exit_code == 1
        assert "it serves other.db, and this command would use lanyard.db" in result.output
    file = tmp_path / "lanyard.env"
    file.write_text(f"# the unit's\nLANYARD_DATABASE_URL='sqlite:///{tmp_path}/instance/other.db'\nPATH=/\n")
    done = lanyard("--env-file", str(file), "agents", "list", env={**os.environ, **env})
    assert (done.returncode, done.stdout.split()[0]) == (0, "NAME")


@pytest.mark.sqlite
def test_an_instance_may_be_moved(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app()
    (tmp_path / "instance").rename(tmp_path / "moved")
    env = {"LANYARD_INSTANCE": str(tmp_path / "moved"), "LANYARD_ADMIN_TOKEN": ADMIN_TOKEN}
    assert CliRunner().invoke(commands, ["agents", "list"], env=env).exit_code == 0


@pytest.mark.sqlite
def test_a_start_beside_a_running_server_does_not_speak_for_it(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    running = make_app(ISSUER="https://id.example.com")
    make_app(ISSUER="https://other.example.com")
    served = settings_for(tmp_path / "instance").read_served()
    assert served["issuer"] == "https://id.example.com"
    close(running)
