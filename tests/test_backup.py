"""Backup while the server writes, restore, and moving an instance between the databases."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from flask import Flask
from standardwebhooks import Webhook as Verifier
from support import postgresql as on_postgresql
from support.callers import OPERATOR, Operator, ask_refresh, ask_token, bearer
from support.instances import close, copy_instance, database_variables, engine_of, settings_for
from support.receiver import Receiver
from support.revisions import GOOD
from support.servers import Server, lanyard, register, token_body
from werkzeug.test import TestResponse

import database
from app import create_app
from commands import backup, transfer
from commands.__main__ import lanyard as commands
from migrations import upgrade
from models import Agent, Base, EncryptedText, db
from storage import sqlite
from webhooks.delivery import Deliverer

KEY = Fernet.generate_key().decode()

on_sqlite_only = pytest.mark.sqlite
on_postgresql_only = pytest.mark.skipif(not on_postgresql.is_used(), reason="needs PostgreSQL")


def run(folder: Path, *arguments: str | Path, **variables: str) -> Result:
    """Run a command as ./lanyard does, on the instance in `folder`."""
    env = {"INSTANCE": str(folder), "BCRYPT_COST": "4", **database_variables(folder), **variables}
    prefixed = {f"LANYARD_{name}": value for name, value in env.items()}
    return CliRunner().invoke(commands, list(map(str, arguments)), env=prefixed)


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def in_a_file(folder: Path) -> dict[str, str]:
    """Settings for a SQLite file in the folder, whatever the tests run on."""
    return {"DATABASE_URL": f"sqlite:///{folder}/lanyard.db"}


def rows_of(folder: Path, **variables: str) -> dict[str, list[Any]]:
    """Every row of every table of an instance; encrypted columns as they are stored."""
    settings = settings_for(folder, **variables)
    engine = sa.create_engine(database.backend(settings).url(settings), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(select_stored(table))), key=str)
            for table in Base.metadata.sorted_tables
        }


def select_stored(table: sa.Table) -> sa.Select[Any]:
    return sa.select(
        *(sa.type_coerce(c, sa.String) if isinstance(c.type, EncryptedText) else c for c in table.columns)
    )


def change(file: Path, statement: str, *values: Any) -> None:
    """Change a backup file as somebody might who is not Lanyard."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement, values)


def forget(folder: Path) -> None:
    if on_postgresql.is_used():
        on_postgresql.drop(folder)


@pytest.fixture
def instance(tmp_path: Path, first_start: Path) -> Iterator[Path]:
    """An instance that no server runs on."""
    folder = tmp_path / "instance"
    copy_instance(first_start, folder)
    yield folder
    forget(folder)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """The folder of an instance that does not exist yet."""
    yield tmp_path / "there"
    forget(tmp_path / "there")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, first_start: Path) -> Iterator[Path]:
    """A backup of an instance with an agent that got a token."""
    folder = tmp_path_factory.mktemp("sample")
    copy_instance(first_start, folder)
    app = create_app(settings_for(folder), serving=True)
    json_of(ask_token(app.test_client(), Operator(app).create()))
    done(run(folder, "backup", folder / "backup.db"))
    yield folder / "backup.db"
    forget(folder)


@pytest.fixture
def filled(sample: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copy(sample, tmp_path / "filled.db"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    listening = Receiver()
    yield listening
    listening.shutdown()
    listening.server_close()


def json_of(response: TestResponse) -> dict[str, Any]:
    assert response.status_code < 300, response.text
    return dict(response.json or {})


@pytest.fixture
def copy(instance: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    file = tmp_path / "backup.db"
    done(run(instance, "backup", file))
    return file


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@contextmanager
def write_load(server: Server, agents: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Tokens are asked for, and agents made, all the time; the statuses of the answers."""
    done = threading.Event()
    statuses: list[int] = []

    def ask(agent: dict[str, Any]) -> None:
        with requests.Session() as session:
            while not done.wait(0.02):  # the backup needs some of the machine
                statuses.append(session.post(f"{server.url}/oauth/token", json=token_body(agent)).status_code)
                made = session.post(f"{server.url}/api/agents", json={"name": "load"})
                statuses.append(made.status_code)

    threads = [threading.Thread(target=ask, args=[agent]) for agent in agents]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        done.set()
        for thread in threads:
            thread.join()


@on_sqlite_only
def test_a_backup_taken_under_load_is_a_whole_instance(serve: Callable[..., Server], tmp_path: Path) -> None:
    old = serve(LOCAL="1", ISSUER="https://id.example").wait()
    agent = register(old)
    token = requests.post(f"{old.url}/oauth/token", json=token_body(agent)).json()
    hook = {"name": "audit", "url": "http://127.0.0.1:9/hook", "events": ["key.*"]}
    webhook = requests.post(f"{old.url}/api/webhooks", json=hook).json()["webhook"]
    file = tmp_path / "backup.db"
    with write_load(old, [register(old) for _ in range(4)]) as statuses:
        while len(statuses) < 40:
            threading.Event().wait(0.01)
        last = register(old, name="acknowledged just before")
        env = {**os.environ, "LANYARD_INSTANCE": str(old.instance)}
        made = lanyard("backup", "backup.db", env=env, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        before = len(statuses)
    assert before > 40, "there was a load while it was made"
    assert set(statuses) == {200, 201}
    assert (mode(file), list(tmp_path.glob(".*"))) == (0o600, [])
    old.stop()
    shutil.move(old.instance, tmp_path / "lost")
    done(run(old.instance, "restore", file))

    new = serve(LOCAL="1", ISSUER="https://id.example").wait()
    headers = {"Authorization": f"Bearer {token['access_token']}"}
    me = requests.get(f"{new.url}/api/agents/me", headers=headers).json()["agent"]
    assert (me["id"], me["token_count"]) == (agent["agent"]["id"], 1)
    for one in (agent, last):
        assert requests.post(f"{new.url}/oauth/token", json=token_body(one)).status_code == 200
    body = {"refresh_token": token["refresh_token"]}
    assert requests.post(f"{new.url}/oauth/refresh", json=body).status_code == 200
    assert requests.get(f"{new.url}/api/webhooks").json()["webhooks"] == [webhook]
    events = requests.get(f"{new.url}/api/events?agent_id={me['id']}").json()["events"]
    assert [event["type"] for event in events][-2:] == ["token.issued", "agent.created"]


def test_a_backup_is_not_written_over(instance: Path, copy: Path) -> None:
    copy.write_text("precious")
    assert "--force" in run(instance, "backup", copy).stderr
    assert copy.read_text() == "precious"
    done(run(instance, "backup", copy, "--force"))
    backup.check(copy, "the new one")
    assert mode(copy) == 0o600


@on_sqlite_only
@pytest.mark.parametrize(
    "name",
    [
        "lanyard.db",
        "lanyard.db-wal",
        "../instance/lanyard.db",
        "lanyard.db.lock",
        "lanyard.db.serving",
        "lanyard.db.deliverer",
        "lanyard.db.reserve",
    ],
)
def test_a_backup_never_overwrites_the_database(instance: Path, name: str) -> None:
    before = (instance / "lanyard.db").read_bytes()
    result = run(instance, "backup", instance / name, "--force")
    assert result.exit_code == 1
    assert "of the instance itself" in result.stderr
    assert (instance / "lanyard.db").read_bytes() == before


def test_a_backup_never_overwrites_the_admin_token(instance: Path) -> None:
    (instance / "admin_token").write_text("precious")
    result = run(instance, "backup", instance / "admin_token", "--force")
    assert result.exit_code == 1
    assert "of the instance itself" in result.stderr
    assert (instance / "admin_token").read_text() == "precious"


def test_a_target_that_cannot_be_written_is_named(instance: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere" / "b.db", tmp_path):
        result = run(instance, "backup", place)
        assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")


def test_a_failed_backup_leaves_no_file(
    instance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    module = transfer if on_postgresql.is_used() else backup
    with pytest.raises(KeyboardInterrupt):
        module.back_up(settings_for(instance), tmp_path / "b.db", overwrite=False, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]


@on_sqlite_only
def test_a_backup_is_one_snapshot_however_much_is_written_meanwhile(
    app: Flask, operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PAGES", 1)
    steps: list[int] = []
    operator.create(name="before")

    def write(done: int, total: int) -> None:
        if len(steps) < 10:
            operator.create(name="meanwhile")
        steps.append(done)

    file = tmp_path / "b.db"
    backup.back_up(settings_for(tmp_path / "instance"), file, overwrite=False, progress=write)
    assert steps == sorted(steps), "it never starts anew"
    with closing(sqlite.open_read_only(file)) as connection:
        assert connection.execute("SELECT name FROM agents").fetchall() == [("before",)]


@on_sqlite_only
def test_what_a_restore_replaces_is_kept(instance: Path, copy: Path) -> None:
    env = {**os.environ, "LANYARD_INSTANCE": str(instance)}
    created = lanyard("agents", "create", "--name", "newer", env=env)
    assert created.returncode == 0, created.stderr
    result = done(run(instance, "restore", copy))
    assert "newer" not in run(instance, "agents", "list").stdout
    (kept,) = instance.glob("lanyard.db.replaced-*")
    assert str(kept) in result.stderr
    assert (mode(kept), mode(instance / "lanyard.db")) == (0o600, 0o600)
    with closing(sqlite.open_read_only(kept)) as connection:
        assert connection.execute("SELECT name FROM agents").fetchall() == [("newer",)]


@on_sqlite_only
def test_a_restore_replaces_a_damaged_database_and_its_wal(instance: Path, copy: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        (instance / f"lanyard.db{ending}").write_bytes(b"rubbish" * 1000)
    assert run(instance, "restore", copy).exit_code == 0
    assert not (instance / "lanyard.db-wal").exists(), "it would be written into the restored one"
    assert run(instance, "agents", "list").exit_code == 0


def test_a_restore_is_refused_while_a_server_runs(serve: Callable[..., Server], filled: Path) -> None:
    server = serve().wait()
    before = rows_of(server.instance)
    result = run(server.instance, "restore", filled)
    assert (result.exit_code, result.stderr) == (1, "Error: A server runs on this instance: stop it first.\n")
    assert rows_of(server.instance) == before
    server.stop()
    done(run(server.instance, "restore", filled))
    assert rows_of(server.instance) != before


@on_sqlite_only
def test_a_killed_server_does_not_prevent_a_restore(serve: Callable[..., Server], copy: Path) -> None:
    server = serve(WORKERS="1").wait()
    server.process.kill()
    server.process.wait()
    for _ in range(100):  # until its worker has noticed
        if not sqlite.is_serving(settings_for(server.instance)):
            break
        threading.Event().wait(0.1)
    done(run(server.instance, "restore", copy))


@on_sqlite_only
def test_a_restore_is_refused_while_the_database_is_open(instance: Path, copy: Path) -> None:
    with closing(sqlite3.connect(instance / "lanyard.db")) as other:
        other.execute("SELECT * FROM agents").fetchall()
        result = run(instance, "restore", copy)
    assert (result.exit_code, result.stderr[:22]) == (1, "Error: Another process")
    assert not list(instance.glob("*replaced*"))


def rubbish(file: Path) -> None:
    file.write_bytes(b"rubbish" * 1000)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def changed(statement: str) -> Callable[[Path], None]:
    return lambda file: change(file, statement)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (rubbish, "cannot be"),
        (cut_short, "cannot be|is damaged"),
        (changed("DROP TABLE client_secrets"), "no such table: client_secrets"),
        (changed("ALTER TABLE agents DROP COLUMN owner"), "no such column: agents.owner"),
        (changed("DELETE FROM signing_keys"), "has no signing key"),
        (changed("DROP TABLE alembic_version"), "has tables, but no schema version"),
        (changed("UPDATE alembic_version SET version_num = '0999'"), "has schema 0999, which is newer"),
        (Path.unlink, "cannot be"),
    ],
    ids=["rubbish", "cut short", "a table less", "a column less", "no key", "no schema", "newer", "no file"],
)
def test_no_bad_file_is_restored(
    instance: Path, copy: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(copy)
    before = rows_of(instance)
    result = run(instance, "restore", copy)
    assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")
    assert any(text in result.stderr for text in told.split("|")), result.stderr
    assert rows_of(instance) == before
    assert not [path for path in instance.iterdir() if "draft" in path.name or "replaced" in path.name]


@on_postgresql_only
@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "UPDATE agents SET name = 'a' || char(0)",
            "rows of agents cannot be copied: PostgreSQL text .* NUL",
        ),
        ("UPDATE agents SET token_version = 'one'", "rows of agents cannot be copied"),
        ("UPDATE agents SET token_version = 4000000000", "rows of agents cannot be copied: integer out"),
        ("UPDATE agents SET metadata = '{'", "rows of agents cannot be copied"),
        ("UPDATE agents SET name = CAST(x'ff' AS TEXT)", "rows of agents cannot be copied"),
        ("DELETE FROM agents", "rows of client_secrets cannot be copied: .* foreign key"),
        ("UPDATE sqlite_sequence SET seq = 'many'", "rows of agents cannot be copied"),
    ],
    ids=["NUL", "text for number", "large number", "no JSON", "no UTF-8", "no agent", "no number"],
)
def test_a_file_that_postgresql_refuses_changes_nothing(
    filled: Path, there: Path, statement: str, told: str
) -> None:
    change(filled, statement)
    result = run(there, "restore", filled)
    assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")
    assert re.search(told, result.stderr), result.stderr
    with engine_of(there).connect() as connection:
        assert sa.inspect(connection).get_table_names() == []


@on_postgresql_only
@pytest.mark.parametrize("column", ["response_body", "error"])
def test_a_nul_that_a_receiver_sent_is_replaced(filled: Path, there: Path, column: str) -> None:
    webhook = ("a-webhook", "hook", "https://example.com", "agent.*", 8, True, "whsec_x", 0, 0)
    change(
        filled,
        "INSERT INTO webhooks (id, name, url, events, max_retries, is_active, secret, created_at, updated_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *webhook,
    )
    change(
        filled,
        f"INSERT INTO deliveries (webhook_pk, event_pk, status, attempts, created_at, {column})"  # noqa: S608
        " VALUES (1, 1, 'dead', 8, 0, ?)",
        "a\0b",
    )
    done(run(there, "restore", filled))
    assert "a\ufffdb" in rows_of(there)["deliveries"][0]


@pytest.mark.parametrize("started", [False, True], ids=["into nothing", "into a first start"])
def test_all_of_an_instance_works_in_another(
    make_app: Callable[..., Flask],
    tmp_path: Path,
    there: Path,
    first_start: Path,
    receiver: Receiver,
    started: bool,
) -> None:
    if started:
        copy_instance(first_start, there)
    moves(make_app(WEBHOOK_ALLOW_PRIVATE="1"), {}, tmp_path / "backup.db", there, {}, receiver)


@on_postgresql_only
@pytest.mark.parametrize("back", [False, True], ids=["to PostgreSQL", "to SQLite"])
def test_an_instance_moves_between_the_databases(
    tmp_path: Path, there: Path, receiver: Receiver, back: bool
) -> None:
    here = tmp_path / "instance"
    source, target = ({}, in_a_file(there)) if back else (in_a_file(here), {})
    app = create_app(settings_for(here, WEBHOOK_ALLOW_PRIVATE="1", **source), serving=True)
    moves(app, source, tmp_path / "backup.db", there, target, receiver)
    close(app)
    forget(here)


def moves(
    app: Flask, source: dict[str, str], file: Path, there: Path, target: dict[str, str], receiver: Receiver
) -> None:
    """Fill an instance, back it up, restore it there, and use all of it there."""
    here = file.parent / "instance"
    client, operator = app.test_client(), Operator(app)
    one, two, gone = (operator.create(name=name, metadata={"é": "☃"}) for name in ("one", "two", "gone"))
    token = json_of(ask_token(client, one))
    newer = json_of(ask_refresh(client, token["refresh_token"]))
    hook = {"name": "audit", "url": receiver.url, "events": ["agent.*"]}
    webhook = json_of(client.post("/api/webhooks", json=hook, headers=OPERATOR))
    rotated = json_of(operator.act(two, "rotate", grace_period=3600))
    operator.call("DELETE", f"/{gone['agent']['id']}")
    done(run(here, "backup", file, **source))
    before = rows_of(here, **source)

    told = done(run(there, "restore", file, **target)).stderr
    assert all(what in told for what in ("admin_token", "LANYARD_SECRET_KEY", "LANYARD_ISSUER"))
    assert rows_of(there, **target) == before, "the audit log, and all the rest"
    app = create_app(settings_for(there, WEBHOOK_ALLOW_PRIVATE="1", **target), serving=True)
    client, operator = app.test_client(), Operator(app)
    assert json_of(client.get("/api/agents/me", headers=bearer(newer)))["agent"]["name"] == "one"
    assert ask_refresh(client, newer["refresh_token"]).status_code == 200
    assert ask_refresh(client, token["refresh_token"]).status_code == 400, "it was used before"
    for secret in (two["client_secret"], rotated["client_secret"]):
        assert ask_token(client, {**two, "client_secret": secret}).status_code == 200
    assert ask_token(client, gone).status_code == 401
    assert number_of(app, operator.create(name="four")) == 4, "the deleted agent's is not given again"
    take_deliveries(app, receiver, 3)
    types = {body["type"] for body in receiver.bodies()}
    assert types == {"agent.credentials_rotated", "agent.deleted", "agent.created"}
    for headers, body in receiver.taken:
        Verifier(webhook["secret"]).verify(body, headers)


def number_of(app: Flask, made: dict[str, Any]) -> int:
    with app.app_context():
        return db.session.scalars(sa.select(Agent.pk).where(Agent.id == made["agent"]["id"])).one()


def take_deliveries(app: Flask, receiver: Receiver, count: int) -> None:
    """Deliver until so many have arrived."""
    working = Deliverer(app)
    working.start()
    try:
        receiver.wait_for(lambda: len(receiver.taken) == count)
    finally:
        working.stop()


@on_postgresql_only
def test_a_backup_of_postgresql_is_one_snapshot(
    make_app: Callable[..., Flask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BATCH", 1)
    operator = Operator(make_app())
    steps: list[tuple[int, int]] = []
    operator.create(name="before")
    operator.create(name="also before")

    def write(done: int, total: int) -> None:
        operator.create(name="meanwhile")
        steps.append((done, total))

    file = tmp_path / "backup.db"
    transfer.back_up(settings_for(tmp_path / "instance"), file, overwrite=False, progress=write)
    assert [done for done, total in steps] == [*range(1, steps[-1][1] + 1)]
    with closing(sqlite.open_read_only(file)) as connection:
        assert connection.execute("SELECT name FROM agents").fetchall() == [("before",), ("also before",)]
    assert "meanwhile" in str(rows_of(tmp_path / "instance"))


@on_postgresql_only
def test_postgresql_is_restored_into_a_new_database_only(sample: Path, there: Path) -> None:
    done(run(there, "restore", sample))
    before = rows_of(there)
    result = run(there, "restore", sample)
    assert result.exit_code == 1
    assert "this one has 1 agents" in result.stderr
    assert rows_of(there) == before


def test_encrypted_secrets_need_their_key(
    make_app: Callable[..., Flask], tmp_path: Path, there: Path
) -> None:
    app = make_app(SECRET_KEY=KEY)
    token = json_of(ask_token(app.test_client(), Operator(app).create()))
    file = tmp_path / "encrypted.db"
    done(run(tmp_path / "instance", "backup", file))
    assert b'"d"' not in file.read_bytes(), "no private key is in it in clear"
    for variables in ({}, {"SECRET_KEY": Fernet.generate_key().decode()}):
        result = run(there, "restore", file, **variables)
        assert (result.exit_code, "LANYARD_SECRET_KEY must hold" in result.stderr) == (1, True)
        assert not (there / "lanyard.db").exists()
    done(run(there, "restore", file, SECRET_KEY=KEY))
    moved = create_app(settings_for(there, SECRET_KEY=KEY), serving=True).test_client()
    assert moved.get("/api/agents/me", headers=bearer(token)).status_code == 200


def test_secrets_in_clear_are_encrypted_by_the_next_start(sample: Path, there: Path) -> None:
    done(run(there, "restore", sample, SECRET_KEY=KEY))
    create_app(settings_for(there, SECRET_KEY=KEY), serving=True)
    assert "fernet:" in str(rows_of(there)["signing_keys"])
    assert b"fernet:" not in sample.read_bytes()


def test_an_older_backup_is_upgraded(
    filled: Path,
    there: Path,
    next_release: Callable[[str], Path],
) -> None:
    next_release(GOOD)
    before = filled.read_bytes()
    done(run(there, "restore", filled))
    with engine_of(there).connect() as connection:
        assert connection.exec_driver_sql("SELECT name, colour FROM agents").all() == [("an agent", "blue")]
        schema = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    assert schema == upgrade.revisions()[-1]
    assert filled.read_bytes() == before


def test_a_database_of_an_older_schema(
    instance: Path,
    tmp_path: Path,
    next_release: Callable[[str], Path],
) -> None:
    next_release(GOOD)
    result = run(instance, "backup", tmp_path / "older.db")
    if on_postgresql.is_used():
        assert "start the server once" in result.stderr
        assert not (tmp_path / "older.db").exists()
    else:
        done(result)
        assert "start the server once" in done(run(instance, "doctor")).stdout


@pytest.mark.parametrize("upgrading", ["raise ValueError('no')", "op.drop_table('signing_keys')"])
def test_an_older_backup_that_cannot_be_upgraded_is_refused(
    filled: Path,
    instance: Path,
    next_release: Callable[[str], Path],
    upgrading: str,
) -> None:
    before = rows_of(instance)
    next_release(f"    {upgrading}\n")
    assert re.search(r"cannot be brought|no such table", run(instance, "restore", filled).stderr)
    assert rows_of(instance) == before
