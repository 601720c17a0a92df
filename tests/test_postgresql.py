"""What only PostgreSQL does: several hosts on one database, and a server that comes and goes."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from flask import Flask
from support import postgresql as on_postgresql
from support.callers import OPERATOR, Operator, ask_token, run_command
from support.clock import Clock
from support.instances import ADMIN_TOKEN, copy_instance, engine_of, environment_of, settings_for
from support.receiver import Receiver
from support.servers import Server, token_body

import credentials
import database
import events
from app import create_app
from commands import doctor
from config import HERE, SettingError
from database import is_transient, reading, writing
from models import FailedSignIns, db
from storage import postgresql

pytestmark = pytest.mark.skipif(not on_postgresql.is_used(), reason="needs PostgreSQL: make test-postgresql")

ISSUER = "https://id.example.com"


@pytest.fixture
def hosts(tmp_path: Path, first_start: Path) -> Iterator[list[Server]]:
    """Two hosts on one database, each with an instance folder of its own."""
    shared = tmp_path / "database"
    copy_instance(first_start, shared)
    started = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        variables = {"ADMIN_TOKEN": ADMIN_TOKEN, "BCRYPT_COST": "4", "WEBHOOK_ALLOW_PRIVATE": "1"}
        variables |= {"DATABASE_URL": on_postgresql.url_of(shared), "ISSUER": ISSUER}
        started.append(Server(tmp_path / name, **variables))
    yield [server.wait() for server in started]
    for server in started:
        server.kill()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """What a test broke makes the next one's app impatient, which is of the same process."""
    yield
    database._lock_timed_out.clear()
    postgresql._is_silent.clear()


@pytest.mark.parametrize("path", ["", "/deliveries", "/deliveries/%00"])
def test_an_id_that_postgresql_cannot_store_is_not_found(app: Flask, path: str) -> None:
    answer = app.test_client().get(f"/api/webhooks/%00{path}", headers=OPERATOR)
    assert answer.status_code == 404, answer.text


def test_a_command_makes_no_admin_token(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app()
    url = on_postgresql.url_of(tmp_path / "instance")
    command = create_app(settings_for(tmp_path / "none", DATABASE_URL=url, ADMIN_TOKEN=""))
    shown = run_command(command, "admin-token", "show")
    assert shown.exit_code == 1
    assert "There is no" in shown.output
    assert not (tmp_path / "none").exists()


def call(server: Server, method: str, path: str, **kwargs: Any) -> requests.Response:
    """The operator's call."""
    return requests.request(method, f"{server.url}{path}", headers=OPERATOR, **kwargs)


def register(server: Server) -> dict[str, Any]:
    answer = call(server, "POST", "/api/agents", json={"name": "an agent", "scopes": ["read"]})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def ask(server: Server, path: str, **fields: str) -> requests.Response:
    return requests.post(f"{server.url}/oauth/{path}", json=fields)


def subscribe(host: Server, receiver: Receiver) -> None:
    """Have the receiver told of every new agent."""
    hook = {"name": "hook", "url": receiver.url, "events": ["agent.created"]}
    assert call(host, "POST", "/api/webhooks", json=hook).status_code == 201


def end_connections(folder: Path, name: str = "lanyard server%") -> int:
    """What a restart of PostgreSQL does to those who use the database: when this returns, they are gone."""
    ending = (
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE :name"
    )
    with engine_of(folder).connect() as connection:
        return int(connection.execute(sa.text(ending), {"name": name}).scalar_one())


def test_hosts_are_one_server(hosts: list[Server]) -> None:
    one, other = hosts
    agent = register(one)
    token = ask(other, "token", **token_body(agent)).json()
    me = {"Authorization": f"Bearer {token['access_token']}"}
    assert requests.get(f"{one.url}/api/agents/me", headers=me).status_code == 200
    keys = [requests.get(f"{host.url}/.well-known/jwks.json").json() for host in hosts]
    assert keys[0] == keys[1]
    refreshed = ask(one, "refresh", refresh_token=token["refresh_token"])
    assert refreshed.status_code == 200
    assert ask(other, "refresh", refresh_token=token["refresh_token"]).json()["error"] == "invalid_grant"
    assert ask(one, "refresh", refresh_token=refreshed.json()["refresh_token"]).status_code == 400, "a reuse"


def test_a_kill_switch_works_on_every_host_at_once(hosts: list[Server]) -> None:
    one, other = hosts
    agent = register(one)
    tokens = [ask(host, "token", **token_body(agent)).json() for host in hosts]
    assert call(one, "POST", f"/api/agents/{agent['agent']['id']}/deactivate").status_code == 200
    assert ask(other, "token", **token_body(agent)).status_code == 401
    for token in tokens:
        me = {"Authorization": f"Bearer {token['access_token']}"}
        assert requests.get(f"{other.url}/api/agents/me", headers=me).status_code == 401
        assert ask(other, "refresh", refresh_token=token["refresh_token"]).status_code == 400


def test_a_refresh_token_shown_to_both_hosts_at_once_works_once(hosts: list[Server]) -> None:
    agent = register(hosts[0])
    for _ in range(20):
        old = ask(hosts[0], "token", **token_body(agent)).json()["refresh_token"]
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(ask, host, "refresh", refresh_token=old) for host in hosts * 2]
            answers = [one.result() for one in running]
        assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]


def test_no_token_of_an_agent_goes_uncounted(hosts: list[Server]) -> None:
    agent = register(hosts[0])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda host: ask(host, "token", **token_body(agent)), hosts * 50))
    assert {answer.status_code for answer in answers} == {200}
    shown = call(hosts[1], "GET", f"/api/agents/{agent['agent']['id']}").json()["agent"]
    assert shown["token_count"] == 100


def test_webhooks_are_delivered_once_among_hosts(
    hosts: list[Server],
    receive: Callable[..., Receiver],
) -> None:
    receiver = receive()
    subscribe(hosts[0], receiver)
    for _ in range(30):
        for host in hosts:
            register(host)
    receiver.wait_for(lambda: len(set(receiver.ids())) == 60)
    time.sleep(1)
    assert set(Counter(receiver.ids()).values()) == {1}


def test_when_a_host_dies_another_delivers(
    hosts: list[Server],
    receive: Callable[..., Receiver],
) -> None:
    receiver = receive()
    subscribe(hosts[0], receiver)
    register(hosts[0])
    receiver.wait_for(lambda: len(receiver.ids()) == 1)
    for process in [hosts[0].process.pid, *hosts[0].workers()]:
        subprocess.run(["kill", "-9", str(process)], check=True)
    register(hosts[1])
    receiver.wait_for(lambda: len(receiver.ids()) == 2)


def test_after_a_restart_of_postgresql_no_request_fails(
    hosts: list[Server],
    tmp_path: Path,
    receive: Callable[..., Receiver],
) -> None:
    receiver = receive()
    subscribe(hosts[0], receiver)
    agent = register(hosts[0])
    for _ in range(3):
        for _ in range(4):
            answers = [ask(host, "token", **token_body(agent)) for host in hosts]
            answers += [call(host, "GET", "/api/agents") for host in hosts]
            assert {answer.status_code for answer in answers} == {200}
        assert end_connections(tmp_path / "database") >= 4
    register(hosts[1])
    receiver.wait_for(lambda: len(set(receiver.ids())) == 2, seconds=40)


def test_tokens_are_issued_side_by_side_and_management_waits(app: Flask, operator: Operator) -> None:
    agent = operator.create()
    with app.app_context(), writing(durable=False, exclusive=False):
        assert run_beside(lambda: ask_token(app.test_client(), agent)).status_code == 200
        waiting = threading.Thread(target=operator.create)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


def test_an_event_committed_out_of_order_is_followed_too(
    app: Flask, operator: Operator, tmp_path: Path
) -> None:
    command = [HERE / "lanyard", "events", "tail", "-n", "1"]
    environment = environment_of(tmp_path / "instance")
    agent = operator.create()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["type"] == "agent.created"
        with app.app_context(), writing(exclusive=False) as connection:
            events.record(connection, "token.revoked")
            assert run_beside(lambda: ask_token(app.test_client(), agent)).status_code == 200
            assert json.loads(process.stdout.readline())["type"] == "token.issued"
        assert json.loads(process.stdout.readline())["type"] == "token.revoked"
        process.terminate()


def test_following_events_outlives_a_restart_of_postgresql(operator: Operator, tmp_path: Path) -> None:
    operator.create()
    command = [HERE / "lanyard", "events", "tail", "-n", "1"]
    environment, pipe = environment_of(tmp_path / "instance"), subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["type"] == "agent.created"
        assert end_connections(tmp_path / "instance", "lanyard command%") == 1
        operator.call("POST", json={"name": "another"})
        assert json.loads(process.stdout.readline())["data"]["agent_name"] == "another"
        process.terminate()
        assert "Traceback" not in process.stderr.read()


def test_a_thread_goes_on_after_a_lock_timeout(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql._SESSION, "lock_timeout", 200)
    app = make_app()
    agent = Operator(app).create()
    client = app.test_client()

    def ask_twice() -> list[int]:
        answers = [ask_token(client, agent).status_code]
        done.set()
        released.wait(5)
        return [*answers, ask_token(client, agent).status_code]

    done, released = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with app.app_context(), writing():
            running = pool.submit(ask_twice)
            assert done.wait(5)
        released.set()
        assert running.result(5) == [503, 200]


def test_after_a_lock_timeout_others_wait_briefly(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql._SESSION, "lock_timeout", 2000)
    app = make_app()
    agent = Operator(app).create()
    took = []
    with app.app_context(), writing():
        for _ in range(3):
            began = time.monotonic()
            assert run_beside(lambda: ask_token(app.test_client(), agent)).status_code == 503
            took.append(time.monotonic() - began)
    assert took[0] > 1.9
    assert max(took[1:]) < 1
    assert run_beside(lambda: ask_token(app.test_client(), agent)).status_code == 200


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_client_that_stalls_in_a_write_loses_the_lock(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    monkeypatch.setitem(postgresql._SESSION, "idle_in_transaction_session_timeout", 300)
    app = make_app()
    operator = Operator(app)

    def stand_still() -> None:
        with app.app_context(), writing(exclusive=exclusive):
            time.sleep(1)

    with ThreadPoolExecutor(1) as pool:
        standing = pool.submit(stand_still)
        time.sleep(0.2)
        operator.create()
        assert not standing.done()
        with pytest.raises(sa.exc.DBAPIError) as failed:
            standing.result(5)
    assert is_transient(failed.value)


def test_a_server_that_hangs_is_given_up(
    app: Flask, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = operator.create()
    monkeypatch.setattr(postgresql, "ANSWER_TIMEOUT", 0.3)
    with app.app_context(), reading() as connection:
        hanging = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    os.kill(hanging, signal.SIGSTOP)
    try:
        refused = ask_token(app.test_client(), agent)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert ask_token(app.test_client(), agent).status_code == 200, "over another connection"
    finally:
        os.kill(hanging, signal.SIGCONT)


def test_a_connection_that_ends_when_all_is_read_spoils_no_answer(
    app: Flask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with app.app_context():
            assert db.session.scalar(sa.text("SELECT 1")) == 1
            assert end_connections(tmp_path / "instance", "lanyard%") > 0
            time.sleep(0.1)
    assert not caplog.messages


def test_requests_are_503_while_postgresql_is_down_and_good_after(
    app: Flask,
    operator: Operator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    agent = operator.create()
    client = app.test_client()

    def ask_everything() -> set[int]:
        answers = [client.get("/.well-known/jwks.json"), client.get("/api/agents", headers=OPERATOR)]
        answers += [ask_token(client, agent), ask_token(client, {**agent, "client_secret": "wrong"})]
        assert "connection to server" not in "".join(answer.text for answer in answers)
        return {answer.status_code for answer in answers}

    name = sa.make_url(on_postgresql.url_of(tmp_path / "instance")).database
    server: Any = on_postgresql._server()
    assert ask_everything() == {200, 401}
    server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
    assert ask_everything() == {503}
    assert not any(record.exc_info for record in caplog.records)
    server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert ask_everything() == {200, 401}
    gc.collect()
    assert "ignored" not in capfd.readouterr().err


def test_the_doctor_names_shared_settings_and_running_hosts(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        db.session.execute(sa.text("SELECT 1"))
    findings = list(doctor.examine(settings_for(tmp_path / "instance", ADMIN_TOKEN="")))
    warned = [one.text for one in findings if (one.level, one.subject) == (doctor.WARN, "settings")]
    assert [text.split()[0] for text in warned[-2:]] == ["LANYARD_ADMIN_TOKEN", "LANYARD_ISSUER"]
    told = {one.subject: one.text for one in findings}
    assert told["hosts"] == "Servers run on: its own machine."
    assert told["durability"].startswith("full_page_writes is off"), "as the tests' PostgreSQL has it"


def test_the_doctor_of_a_database_that_is_gone_says_so_once(tmp_path: Path) -> None:
    url = on_postgresql.url_of(tmp_path).replace("?", "_gone?")
    findings = list(doctor.examine(settings_for(tmp_path, DATABASE_URL=url)))
    (failed,) = [one.text for one in findings if one.level == doctor.FAIL]
    assert failed.endswith("does not exist; make it with createdb.")
    assert "\n" not in failed


def test_a_server_waits_for_postgresqls_answer_but_not_for_ever(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "ANSWER_TIMEOUT", 0.5)

    def sleep(seconds: int) -> None:
        with reading() as connection:
            connection.execute(sa.select(sa.func.pg_sleep(seconds)))

    def ask_it() -> list[float]:
        took = []
        with app.app_context():
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(sa.exc.DBAPIError) as failed:
                    sleep(30)
                took.append(time.monotonic() - began)
                assert is_transient(failed.value)
            sleep(0)
            assert not postgresql._is_silent.is_set()
        return took

    app = make_app()
    assert all(0.5 <= seconds < 0.95 for seconds in run_beside(ask_it, seconds=10))


def test_a_command_needs_no_folder(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    make_app()
    url = on_postgresql.url_of(tmp_path / "instance")
    command = create_app(settings_for(tmp_path / "none", DATABASE_URL=url, ADMIN_TOKEN=ADMIN_TOKEN))
    assert command.test_client().get("/api/agents", headers=OPERATOR).status_code == 200
    assert not (tmp_path / "none").exists()


def run_beside(work: Callable[[], Any], seconds: float = 5) -> Any:
    """What it returns in another thread, whose connection is another."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(seconds)


@pytest.mark.parametrize(("durable", "level"), [(True, "on"), (False, "off")])
def test_durability_is_chosen_for_each_transaction(app: Flask, durable: bool, level: str) -> None:
    with app.app_context():
        with writing(durable=durable) as connection:
            assert connection.scalar(sa.text("SHOW synchronous_commit")) == level
        with reading() as connection:
            assert connection.scalar(sa.text("SHOW synchronous_commit")) == "on"


def test_of_failures_at_the_same_time_none_goes_uncounted(app: Flask, time_machine: Clock) -> None:
    def fail(_: int) -> None:
        with app.test_request_context(environ_base={"REMOTE_ADDR": "192.0.2.1"}):
            credentials.throttle(lambda: False, "secret", known=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fail, range(40)))
    with app.app_context():
        (row,) = db.session.scalars(sa.select(FailedSignIns))
        assert (row.clear_at - time_machine.now()).total_seconds() == 40 * credentials.SECRET.pause.seconds


def test_transactions_are_read_committed_whatever_the_default(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    make_app()
    with engine_of(tmp_path / "instance").begin() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(
            f'ALTER DATABASE "{name}" SET default_transaction_isolation = "serializable"'
        )
    app = make_app()
    with app.app_context(), writing() as connection:
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda url: url.replace("?", "_gone?"), "make it with createdb"),
        (lambda url: url.replace("lanyard@", "nobody@"), 'role "nobody" does not exist'),
        (lambda url: url.partition("?")[0] + "?host=/nowhere", "No such file or directory"),
    ],
    ids=["database", "user", "server"],
)
def test_an_unreachable_database_is_one_sentence_without_password(
    tmp_path: Path, change: Callable[[str], str], told: str
) -> None:
    url = change(on_postgresql.url_of(tmp_path)).replace("@/", ":hunter2@/")
    with pytest.raises(SettingError) as refused:
        create_app(settings_for(tmp_path, DATABASE_URL=url), serving=True)
    assert told in refused.value.message
    assert "hunter2" not in refused.value.message


def test_a_database_that_cannot_keep_every_text_is_refused(tmp_path: Path) -> None:
    url = on_postgresql.url_of(tmp_path)
    name = sa.make_url(url).database
    on_postgresql.drop(tmp_path)
    on_postgresql._server().execute(  # type: ignore[call-overload]
        f"CREATE DATABASE \"{name}\" ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    )
    with pytest.raises(SettingError, match="UTF8, not LATIN1"):
        create_app(settings_for(tmp_path), serving=True)
    on_postgresql.drop(tmp_path)


def test_a_server_whose_database_is_read_only_is_not_ready(app: Flask, tmp_path: Path) -> None:
    def ready(mode: str) -> int:
        setting = (
            f"format('ALTER DATABASE %I SET default_transaction_read_only = {mode}', current_database())"
        )
        with engine_of(tmp_path / "instance").connect() as connection:
            connection.execute(sa.text("SET TRANSACTION READ WRITE"))
            connection.execute(sa.text(f"DO $$ BEGIN EXECUTE {setting}; END $$"))
            connection.commit()
        with app.app_context():
            db.engine.dispose()
        return app.test_client().get("/health/ready").status_code

    assert [ready("off"), ready("on"), ready("off")] == [200, 503, 200]
