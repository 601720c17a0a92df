"""The operator's commands: what they print, what they refuse, and that they do what the API does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import Result
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer, run_command
from support.clock import Clock
from support.instances import copy_instance, environment_of
from support.servers import Server, lanyard

from commands import output
from config import HERE
from ops import cleanup

Run = Callable[..., Result]


@pytest.fixture
def run(app: Flask) -> Run:
    """Run a command in the app; its result has `stdout`, `stderr` and `exit_code`."""
    return partial(run_command, app)


@pytest.fixture
def environment(tmp_path: Path, first_start: Path) -> dict[str, str]:
    """The environment of a command on an instance of this test's own."""
    folder = tmp_path / "instance"
    copy_instance(first_start, folder)
    return environment_of(folder)


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_agent_made_here_gets_tokens(run: Run, client: FlaskClient, tmp_path: Path) -> None:
    given = ("--name", "night-reporter", "--scope", "read", "--scope", "write", "--owner", "ann")
    limits = ("--expires-in", 3600, "--token-ttl", 60, "--rate-limit", 5, "--audience", "https://a.example")
    told = ("--description", "Reports.", "--metadata", "team=a=b", "--metadata", "env=test")
    created = loaded(run("agents", "create", *given, *limits, *told, "--json"))
    agent = created["agent"]
    assert (agent["name"], agent["scopes"], agent["owner"]) == ("night-reporter", ["read", "write"], "ann")
    assert (agent["token_ttl"], agent["rate_limit"]) == (60, 5)
    assert (agent["audiences"], agent["description"]) == (["https://a.example"], "Reports.")
    assert agent["metadata"] == {"team": "a=b", "env": "test"}
    assert agent["expires_at"] is not None
    assert ask_token(client, created).status_code == 200
    (event,) = client.get("/api/events?type=agent.created", headers=OPERATOR).json["events"]
    assert event["actor"] == "admin"


def test_scopes_are_split_at_commas_and_audiences_are_not(run: Run) -> None:
    audience = "https://a.example/x,y"
    given = ("--name", "x", "--scope", "read,write", "--scope", "report:all", "--audience", audience)
    agent = loaded(run("agents", "create", *given, "--json"))["agent"]
    assert agent["scopes"] == ["read", "write", "report:all"]
    assert agent["audiences"] == [audience]
    assert "separated by commas" in run("agents", "create", "--help").stdout
    assert loaded(run("agents", "create", "--name", "y", "--json"))["agent"]["scopes"] == []


def test_an_agent_with_keys_signs_in_by_them(run: Run, tmp_path: Path) -> None:
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [jwk]}))
    created = loaded(run("agents", "create", "--name", "keyed", "--jwks", file, "--json"))
    assert created["agent"]["token_endpoint_auth_method"] == "private_key_jwt"
    assert "client_secret" not in created
    assert run("agents", "rotate", created["client_id"]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["name: Missing data"]),
        (["--name", "", "--rate-limit", "0"], ["name: Length", "rate_limit: Must be"]),
        (["--name", "x", "--scope", "a b"], ["scopes.0: Not a scope token"]),
        (["--name", "x", "--scope", "a,,b"], ["scopes.1: Not a scope token"]),
        (["--name", "x", "--auth-method", "magic"], ["token_endpoint_auth_method: Must be one of"]),
        (["--name", "x", "--metadata", "plain"], ["Give name=value"]),
        (["--name", "x", "--metadata", "a=1", "--metadata", "a=2"], ["each name once"]),
        (["--name", "x", "--jwks", os.devnull], ["The file is not valid JSON"]),
    ],
    ids=["no name", "two fields", "scope", "empty scope", "method", "metadata", "repeated metadata", "jwks"],
)
def test_each_bad_field_is_named(run: Run, options: list[str], told: list[str]) -> None:
    result = run("agents", "create", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(text in result.stderr for text in told), result.stderr


def test_stdout_holds_data_and_stderr_the_advice(run: Run) -> None:
    created = run("agents", "create", "--name", "x")
    assert [line.split()[0] for line in created.stdout.splitlines()] == ["id", "client_id", "client_secret"]
    assert "shown this once" in created.stderr


@pytest.mark.parametrize("name", ["id", "client_id"])
def test_an_agent_is_named_by_either_id(run: Run, agent: dict[str, Any], name: str) -> None:
    assert loaded(run("agents", "show", agent["agent"][name], "--json")) == {"agent": agent["agent"]}
    shown = run("agents", "show", agent["agent"][name]).stdout
    assert re.search(rf"^client_id +{agent['client_id']}$", shown, re.MULTILINE)


@pytest.mark.parametrize("name", ["nobody", "cid_" + "x" * 22], ids=["id", "client id"])
@pytest.mark.parametrize("command", ["show", "rotate", "deactivate", "reactivate", "delete"])
def test_an_unknown_agent_is_an_error(run: Run, command: str, name: str) -> None:
    result = run("agents", command, name)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: No agent has this")


def test_the_list_takes_the_filters_of_the_api(run: Run, operator: Operator) -> None:
    operator.create(name="one", scopes=["read"], owner="ann")
    operator.act(operator.create(name="two", scopes=["write"]), "deactivate")

    def names(*options: str) -> list[str]:
        return [agent["name"] for agent in loaded(run("agents", "list", "--json", *options))["agents"]]

    assert names() == ["two", "one"]
    assert names("--active") == ["one"]
    assert names("--inactive") == ["two"]
    assert names("--scope", "write") == ["two"]
    assert names("--owner", "ann") == ["one"]
    assert names("-q", "tw") == ["two"]
    assert names("--stale-days", "1") == []
    assert run("agents", "list", "--limit", "201").exit_code == 2


def test_the_list_comes_in_pages_or_whole(
    run: Run, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        operator.create(name=f"agent-{number}")
    page = loaded(run("agents", "list", "--limit", "2", "--json"))
    assert [agent["name"] for agent in page["agents"]] == ["agent-4", "agent-3"]
    following = run("agents", "list", "--limit", "2", "--after", page["next"])
    assert [line.split()[0] for line in following.stdout.splitlines()] == ["NAME", "agent-2", "agent-1"]
    assert "There are more" in following.stderr
    monkeypatch.setattr(output, "PAGE_SIZE_MAX", 2)
    assert len(run("agents", "list", "--all").stdout.splitlines()) == 6
    streamed = run("agents", "list", "--all", "--json").stdout.splitlines()
    assert [json.loads(line)["name"] for line in streamed] == [f"agent-{n}" for n in (4, 3, 2, 1, 0)]


def test_a_table_is_aligned_and_cannot_steer_the_terminal(run: Run, operator: Operator) -> None:
    operator.create(name="a\u009b31mred")
    operator.create(name="x" * 128)
    lines = run("agents", "list").stdout.splitlines()
    assert [line.index("cid_") for line in lines[1:]] == [lines[0].index("CLIENT ID")] * 2
    assert lines[1].startswith("x" * 23 + "… ")
    assert lines[2].startswith("a?31mred ")


def test_rotating_prints_the_secret_alone(run: Run, client: FlaskClient, agent: dict[str, Any]) -> None:
    result = run("agents", "rotate", agent["client_id"], "--grace-period", "60")
    new = result.stdout.strip()
    for secret in (new, agent["client_secret"]):
        assert ask_token(client, {**agent, "client_secret": secret}).status_code == 200
    run("agents", "rotate", agent["client_id"])
    assert ask_token(client, {**agent, "client_secret": new}).status_code == 401
    assert run("agents", "rotate", agent["client_id"], "--grace-period", "86401").exit_code == 2


def test_a_leak_ends_every_token(
    run: Run, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    assert run("agents", "rotate", agent["client_id"], "--revoke-tokens").exit_code == 0
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401


def test_switching_off_and_on(
    run: Run, client: FlaskClient, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    off = loaded(run("agents", "deactivate", agent["client_id"], "--json"))
    assert off["agent"]["is_active"] is False
    assert client.get("/api/agents/me", headers=bearer(token)).status_code == 401
    shown = run("agents", "reactivate", agent["client_id"]).stdout
    assert re.search(r"^is_active +yes$", shown, re.MULTILINE)
    assert ask_token(client, agent).status_code == 200


def test_deleting_asks_first(run: Run, operator: Operator, agent: dict[str, Any]) -> None:
    assert run("agents", "delete", agent["client_id"], input="n\n").exit_code == 1
    assert run("agents", "delete", agent["client_id"]).exit_code == 1, "nobody there to answer"
    assert operator.get(agent)
    assert run("agents", "delete", agent["client_id"], input="y\n").exit_code == 0
    assert run("agents", "show", agent["client_id"]).exit_code == 1
    other = operator.create()
    assert run("agents", "delete", other["client_id"], "--yes").stdout == ""
    assert operator.call("GET", f"/{other['agent']['id']}").status_code == 404


def test_webhooks_and_their_deliveries(make_app: Callable[..., Flask]) -> None:
    app = make_app(WEBHOOK_ALLOW_PRIVATE="1")
    invoke = partial(run_command, app)
    body = {"name": "audit", "url": "http://127.0.0.1:9/hook", "events": ["agent.*"]}
    client = app.test_client()
    webhook = client.post("/api/webhooks", json=body, headers=OPERATOR).json["webhook"]
    client.post("/api/agents", json={"name": "x"}, headers=OPERATOR)
    listed = invoke("webhooks", "list").stdout
    assert all(text in listed for text in (webhook["id"], "audit", "active", "agent.*", body["url"]))
    assert loaded(invoke("webhooks", "list", "--json"))["webhooks"] == [webhook]
    found = loaded(invoke("webhooks", "deliveries", webhook["id"], "--json"))["deliveries"]
    assert [(one["type"], one["status"]) for one in found] == [("agent.created", "pending")]
    dead = invoke("webhooks", "deliveries", webhook["id"], "--status", "dead")
    assert len(dead.stdout.splitlines()) == 1
    assert invoke("webhooks", "deliveries", webhook["id"], "--status", "lost").exit_code == 2
    again = loaded(invoke("webhooks", "redeliver", webhook["id"], found[0]["id"], "--json"))
    assert again["delivery"]["status"] == "pending"
    assert invoke("webhooks", "redeliver", webhook["id"], "999").exit_code == 1
    assert invoke("webhooks", "deliveries", "none").exit_code == 1


def test_keys_are_listed_for_programs_too(run: Run) -> None:
    rotated = loaded(run("keys", "rotate", "--json"))["key"]
    assert [key["state"] for key in loaded(run("keys", "list", "--json"))["keys"]] == ["published", "signing"]
    assert rotated["state"] == "published"


@pytest.mark.sqlite
def test_purging_leaves_nothing_that_has_expired(
    run: Run, client: FlaskClient, agent: dict[str, Any], time_machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "BATCH", 2)
    for _ in range(5):
        ask_token(client, agent)
    time_machine.advance(days=8)
    good = ask_token(client, agent).json
    gone = loaded(run("purge", "--json"))
    assert (gone["deleted"]["refresh_families"], gone["total"]) == (5, 5)
    assert loaded(run("purge", "--vacuum", "--json"))["total"] == 0
    assert ask_refresh(client, good["refresh_token"]).status_code == 200
    time_machine.advance(days=8)
    assert "refresh_families  1" in run("purge").stdout


def test_the_admin_token_of_the_settings_is_theirs_to_change(run: Run) -> None:
    assert run("admin-token", "show").stdout.strip() == OPERATOR["Authorization"].split()[1]
    result = run("admin-token", "rotate")
    assert result.exit_code == 1
    assert "LANYARD_ADMIN_TOKEN" in result.stderr


def test_a_rotated_admin_token_is_dead_at_once_in_every_worker(serve: Callable[..., Server]) -> None:
    server = serve(ADMIN_TOKEN="").wait()
    env = environment_of(server.instance)

    def shown() -> str:
        return lanyard("admin-token", "show", env=env).stdout.strip()

    def statuses(token: str) -> set[int]:
        headers = {"Authorization": f"Bearer {token}"}
        # A new connection each, so that both workers answer some.
        return {requests.get(f"{server.url}/api/agents", headers=headers).status_code for _ in range(10)}

    old = shown()
    assert statuses(old) == {200}
    rotated = lanyard("admin-token", "rotate", env=env)
    assert rotated.returncode == 0, rotated.stderr
    assert old not in rotated.stdout + rotated.stderr
    assert statuses(old) == {401}
    assert statuses(shown()) == {200}


@pytest.mark.parametrize("text", [None, "short", "\udcff" * 20], ids=["gone", "short", "not text"])
def test_a_broken_admin_token_file_admits_no_operator(
    make_app: Callable[..., Flask], tmp_path: Path, text: str | None
) -> None:
    client = make_app(ADMIN_TOKEN="").test_client()
    file = tmp_path / "instance" / "admin_token"
    headers = {"Authorization": f"Bearer {file.read_text().strip()}"}
    if text is None:
        file.rename(tmp_path / "away")
    else:
        file.write_bytes(text.encode(errors="surrogateescape"))
    assert client.get("/api/agents", headers=headers).status_code == 401
    file.write_text("a-token-the-operator-wrote\n")
    headers = {"Authorization": "Bearer a-token-the-operator-wrote"}
    assert client.get("/api/agents", headers=headers).status_code == 200


def test_the_command_runs_from_any_folder_by_any_name(tmp_path: Path, environment: dict[str, str]) -> None:
    link = tmp_path / "ln"
    link.symlink_to(HERE / "lanyard")
    # What lies about in the caller's folder is nothing to run.
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong one')")
    command = [link, "backup", "here.db", "--json"]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["file"] == str(tmp_path / "here.db")
    assert (tmp_path / "here.db").exists()


@pytest.mark.parametrize("how", ["Ctrl-C", "a closed pipe"])
def test_following_events_ends_quietly(environment: dict[str, str], how: str) -> None:
    command = [HERE / "lanyard", "events", "tail", "-n", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert lanyard("keys", "rotate", env=environment).returncode == 0
        assert json.loads(process.stdout.readline())["type"] == "key.rotated"
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        until = time.monotonic() + 15
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        ended = process.poll()
        process.kill()
        assert ended == (-signal.SIGINT if how == "Ctrl-C" else 0)
        assert process.stderr.read() == ""


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("iso-8859-1", "J\xfcrgen ??? "), ("iso-8859-2", "J\xfcrgen ??? "), ("ascii", "J")],
)
def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(
    environment: dict[str, str], encoding: str, shown: str
) -> None:
    """In ASCII, click writes UTF-8, as Python does itself in the locale C."""
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": encoding}
    create = [HERE / "lanyard", "agents", "create", "--name", "J\xfcrgen \U0001f916\u2192\u2026 "]
    assert subprocess.run(create, env=environment, capture_output=True).returncode == 0
    for command in (["agents", "list"], ["doctor"], ["agents", "show", "\u2192"], ["--help"]):
        ended = subprocess.run([HERE / "lanyard", *command], env=environment, capture_output=True)
        assert b"Traceback" not in ended.stderr
        assert command != ["agents", "list"] or shown.encode(encoding) in ended.stdout
