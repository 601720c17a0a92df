"""Export and import: all of an instance works in another, and no bad file gets in."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import on_postgresql
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from conftest import (
    OPERATOR,
    Operator,
    Server,
    ask_refresh,
    ask_token,
    bearer,
    close,
    copy_instance,
    database_variables,
    settings_for,
)
from cryptography.fernet import Fernet
from flask import Flask
from standardwebhooks import Webhook as Verifier
from test_deliverer import Receiver
from werkzeug.test import TestResponse

import crate
import database
import transfer
import upgrade
from app import create_app
from deliverer import Deliverer
from main import lanyard
from models import Agent, Base, Delivery, db

KEY = Fernet.generate_key().decode()


def run(folder: Path, *arguments: str | Path, **variables: str) -> Result:
    """Run a command as ./lanyard does, on the instance in `folder`."""
    env = {"INSTANCE": str(folder), "BCRYPT_COST": "4", **database_variables(folder), **variables}
    told = {f"LANYARD_{name}": value for name, value in env.items()}
    return CliRunner().invoke(lanyard, list(map(str, arguments)), env=told)


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def rows_of(folder: Path, **variables: str) -> dict[str, list[Any]]:
    """Every row of every table of an instance."""
    settings = settings_for(folder, **variables)
    engine = sa.create_engine(database.ways(settings).url(settings), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(sa.select(table))), key=str)
            for table in Base.metadata.sorted_tables
        }


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, first_start: Path) -> Iterator[Path]:
    """What was exported of an instance with an agent that got a token."""
    folder = tmp_path_factory.mktemp("sample")
    copy_instance(first_start, folder)
    app = create_app(settings_for(folder), serving=True)
    json_of(ask_token(app.test_client(), Operator(app).create()))
    done(run(folder, "export", folder / "lanyard.jsonl"))
    yield folder / "lanyard.jsonl"
    forget(folder)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """The folder of an instance that is not there yet."""
    yield tmp_path / "there"
    forget(tmp_path / "there")


def forget(folder: Path) -> None:
    if on_postgresql.is_used():
        on_postgresql.drop(folder)


def on_sqlite(folder: Path) -> dict[str, str]:
    """Settings for a SQLite file there, whatever the tests run on."""
    return {"DATABASE_URL": f"sqlite:///{folder}/lanyard.db"}


@pytest.fixture
def exported(sample: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copy(sample, tmp_path))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    listening = Receiver()
    yield listening
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
@pytest.mark.parametrize("started", [False, True], ids=["into nothing", "into a first start"])
def test_all_of_an_instance_works_in_another(
    make_app: Callable[..., Flask],
    tmp_path: Path,
    there: Path,
    first_start: Path,
    receiver: Receiver,
    name: str,
    started: bool,
) -> None:
    if started:
        copy_instance(first_start, there)
    moves(make_app(WEBHOOK_ALLOW_PRIVATE="1"), {}, tmp_path / name, there, {}, receiver)


@pytest.mark.skipif(not on_postgresql.is_used(), reason="it takes both databases")
@pytest.mark.parametrize("back", [False, True], ids=["to PostgreSQL", "to SQLite"])
def test_an_instance_moves_between_the_databases(
    tmp_path: Path, there: Path, receiver: Receiver, back: bool
) -> None:
    here = tmp_path / "instance"
    source, target = ({}, on_sqlite(there)) if back else (on_sqlite(here), {})
    app = create_app(settings_for(here, WEBHOOK_ALLOW_PRIVATE="1", **source), serving=True)
    moves(app, source, tmp_path / "all.jsonl", there, target, receiver)
    close(app)
    forget(here)


def moves(
    app: Flask, source: dict[str, str], file: Path, there: Path, target: dict[str, str], receiver: Receiver
) -> None:
    """Fill an instance, export it, import it there, and use all of it there."""
    here = file.parent / "instance"
    client, operator = app.test_client(), Operator(app)
    one, two, gone = (operator.create(name=name, metadata={"é": "☃"}) for name in ("one", "two", "gone"))
    token = json_of(ask_token(client, one))
    newer = json_of(ask_refresh(client, token["refresh_token"]))
    hook = {"name": "audit", "url": receiver.url, "events": ["agent.*"]}
    webhook = json_of(client.post("/api/webhooks", json=hook, headers=OPERATOR))
    rotated = json_of(operator.act(two, "rotate", grace_period=3600))
    operator.call("DELETE", f"/{gone['agent']['id']}")
    done(run(here, "export", file, **source))
    before = rows_of(here, **source)

    told = done(run(there, "import", file, **target)).stderr
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


def json_of(response: TestResponse) -> dict[str, Any]:
    assert response.status_code < 300, response.text
    return dict(response.json or {})


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


def test_an_export_is_the_operators_alone_and_replaces_nothing(app: Flask, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert "--force" in run(tmp_path / "instance", "export", file).stderr
    assert file.read_text() == "precious"
    result = done(run(tmp_path / "instance", "export", file, "--force", "--json"))
    assert json.loads(result.stdout)["rows"]["signing_keys"] == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".*"))


def test_an_export_is_one_snapshot(app: Flask, operator: Operator, tmp_path: Path) -> None:
    def write(done: int, total: int) -> None:
        operator.create(name="meanwhile")

    file = tmp_path / "lanyard.jsonl"
    with app.app_context():
        header = transfer.export(file, overwrite=False, progress=write)
    assert header.rows["agents"] == 0
    assert b"meanwhile" not in file.read_bytes()
    assert "meanwhile" in str(rows_of(tmp_path / "instance"))


def test_an_imported_instance_exports_the_same(exported: Path, tmp_path: Path, there: Path) -> None:
    file = tmp_path / "again.jsonl.gz"
    assert json.loads(done(run(there, "import", exported, "--json")).stdout)["rows"]["agents"] == 1
    done(run(there, "export", file))
    again = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    assert again[1:-1] == exported.read_bytes().splitlines(keepends=True)[1:-1]


def test_an_import_is_for_a_new_database(exported: Path, there: Path) -> None:
    done(run(there, "import", exported))
    result = run(there, "import", exported)
    assert result.exit_code == 1
    assert "there are 1 agents, 2 events" in result.stderr


def test_a_running_server_is_told_of_and_not_imported_under(
    serve: Callable[..., Server], exported: Path, tmp_path: Path
) -> None:
    running = tmp_path / "running"
    running.mkdir()
    server = Server(running, WORKERS="1", BCRYPT_COST="4").wait()
    try:
        result = run(server.instance, "import", exported)
        assert (result.exit_code, result.stderr) == (
            1,
            "Error: A server runs on this instance: stop it first.\n",
        )
        assert "A server runs" in done(run(server.instance, "export", tmp_path / "other")).stderr
    finally:
        server.stop()
    done(run(server.instance, "import", exported))


def test_sealed_secrets_need_their_key(make_app: Callable[..., Flask], tmp_path: Path, there: Path) -> None:
    app = make_app(SECRET_KEY=KEY)
    token = json_of(ask_token(app.test_client(), Operator(app).create()))
    file = tmp_path / "sealed.jsonl"
    done(run(tmp_path / "instance", "export", file, SECRET_KEY=KEY))
    assert b'"d\\"' not in file.read_bytes(), "no private key is in it in clear"
    for variables in ({}, {"SECRET_KEY": Fernet.generate_key().decode()}):
        result = run(there, "import", file, **variables)
        assert (result.exit_code, "LANYARD_SECRET_KEY" in result.stderr) == (1, True)
        assert not there.exists()
    done(run(there, "import", file, SECRET_KEY=KEY))
    moved = create_app(settings_for(there, SECRET_KEY=KEY), serving=True).test_client()
    assert moved.get("/api/agents/me", headers=bearer(token)).status_code == 200


def test_secrets_in_clear_are_sealed_on_arrival(exported: Path, there: Path) -> None:
    done(run(there, "import", exported, SECRET_KEY=KEY))
    assert "fernet:" in str(rows_of(there)["signing_keys"])
    assert "fernet:" not in exported.read_text()


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def sealed(lines: list[bytes]) -> bytes:
    """The lines with a new seal: whoever alters a file can do that, too."""
    body = b"".join(lines[:-1])
    return body + json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"


def with_agent(**values: Any) -> Callable[[list[bytes]], bytes]:
    """Change columns of the agent."""

    def alter(lines: list[bytes]) -> bytes:
        name, row = json.loads(lines[1])
        return sealed([lines[0], json.dumps([name, row | values]).encode() + b"\n", *lines[2:]])

    return alter


def with_header(**values: Any) -> Callable[[list[bytes]], bytes]:
    def alter(lines: list[bytes]) -> bytes:
        return sealed([json.dumps(json.loads(lines[0]) | values).encode() + b"\n", *lines[1:]])

    return alter


def with_line(line: bytes) -> Callable[[list[bytes]], bytes]:
    """Put another line in the place of the agent's."""
    return lambda lines: sealed([lines[0], line, *lines[2:]])


def with_second_agent(**values: Any) -> Callable[[list[bytes]], bytes]:
    """Have the agent there twice, with these differences."""

    def alter(lines: list[bytes]) -> bytes:
        header, (name, row) = json.loads(lines[0]), json.loads(lines[1])
        header["rows"]["agents"] = 2
        told = [json.dumps(document).encode() + b"\n" for document in (header, [name, row | values])]
        return sealed([told[0], lines[1], told[1], *lines[2:]])

    return alter


def without_agent(lines: list[bytes]) -> bytes:
    header = json.loads(lines[0])
    header["rows"]["agents"] = 0
    return sealed([json.dumps(header).encode() + b"\n", *lines[2:]])


BAD: dict[str, tuple[Callable[[list[bytes]], bytes], str]] = {
    "nothing": (lambda lines: b"", "cut short"),
    "rubbish": (lambda lines: b"rubbish" * 1000, "cut short"),
    "another JSON": (lambda lines: b'{"a": 1}\n', "no export of Lanyard's"),
    "a database": (lambda lines: b"SQLite format 3\0\n\xff", "no JSON"),
    "cut in a line": (lambda lines: b"".join(lines)[:-80], "cut short"),
    "cut after a line": (lambda lines: b"".join(lines[:-1]), "cut short"),
    "cut in gzip": (lambda lines: gzip.compress(b"".join(lines))[:-20], "gzip"),
    "damaged in gzip": (lambda lines: gzip.compress(b"".join(lines))[:-8] + b"12345678", "gzip"),
    "a row less": (lambda lines: b"".join([*lines[:2], *lines[3:]]), "was to be there"),
    "a letter altered": (lambda lines: b"".join(lines).replace(b"an agent", b"an Agent"), "altered"),
    "more after its end": (lambda lines: b"".join([*lines, b"\n"]), "altered"),
    "not UTF-8": (with_line(b'["agents", {"name": "\xff"}]\n'), "not UTF-8"),
    "an endless line": (with_line(b" " * 2**21), "longer than any"),
    "a gzip bomb": (lambda lines: gzip.compress(lines[0] + b" " * 2**26), "longer than any"),
    "too deep": (with_line(b"[" * 100_000 + b"\n"), "no JSON"),
    "too deep for a row": (with_agent(metadata={"a": json.loads("[" * 200 + "]" * 200)}), "too deeply"),
    "not a number": (with_line(b'["agents", NaN]\n'), "no JSON"),
    "too large a number": (with_line(b'["agents", ' + b"9" * 5000 + b"]\n"), "no JSON"),
    "no row": (with_line(b'["agents", 7]\n'), "no object"),
    "another table's row": (with_line(b'["webhooks", {}]\n'), "a row of agents was to be there"),
    "an unknown table's row": (with_line(b'["robots", {}]\n'), "does not have"),
    "an unknown table": (with_header(rows={"robots": 1}), "table too few or too many"),
    "a count that is none": (with_header(rows={"agents": "1"}), "no numbers"),
    "a number that is none": (with_header(numbers={"agents": -1}), "no numbers"),
    "another header": (with_header(odd=1), "no export of Lanyard's"),
    "a newer schema": (with_header(schema="0999", lanyard="9.0"), "Lanyard 9.0 with schema 0999"),
    "a column more": (with_agent(colour="blue"), "'colour'"),
    "a text for a number": (with_agent(token_version="1"), "agents.token_version is no whole number"),
    "a flag for a number": (with_agent(token_version=True), "agents.token_version is no whole number"),
    "a number for a flag": (with_agent(is_active=1), "agents.is_active is neither"),
    "a number for a text": (with_agent(name=7), "agents.name is no text"),
    "nothing for a name": (with_agent(name=None), "agents.name is no text"),
    "a list for an object": (with_agent(metadata=[]), "agents.metadata is no object"),
    "infinity in an object": (
        lambda lines: with_line(lines[1].replace(b'"metadata":{}', b'"metadata":{"a":1e999}'))(lines),
        "too large",
    ),
    "a moment after the last": (with_agent(created_at=10**12), "agents.created_at is no whole number"),
    "too long an id": (with_agent(id="x" * 37), "agents.id is no text"),
    "half a character": (with_agent(name="\ud800"), "half a character"),
    "the same agent twice": (
        with_second_agent(),
        "refuses one of lines 2 to 3, of agents: (UNIQUE|duplicate)",
    ),
    "the same name twice": (with_second_agent(pk=2), "UNIQUE constraint failed: agents|violates unique"),
    "a secret without its agent": (without_agent, "FOREIGN KEY|foreign key"),
}


@pytest.mark.parametrize(("spoil", "told"), BAD.values(), ids=BAD)
def test_no_bad_file_is_imported(
    exported: Path, there: Path, first_start: Path, spoil: Callable[[list[bytes]], bytes], told: str
) -> None:
    exported.write_bytes(spoil(lines_of(exported)))
    copy_instance(first_start, there)
    before = rows_of(there)
    result = run(there, "import", exported)
    assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")
    assert re.search(told, result.stderr), result.stderr
    assert rows_of(there) == before


@pytest.mark.sqlite
def test_a_bad_file_makes_no_database(exported: Path, there: Path) -> None:
    os.truncate(exported, exported.stat().st_size - 1)
    assert run(there, "import", exported).exit_code == 1
    assert not there.exists()


@pytest.mark.parametrize("nul", [True, False], ids=["SQLite", "PostgreSQL"])
def test_a_nul_goes_only_where_it_can_be_kept(exported: Path, nul: bool) -> None:
    exported.write_bytes(with_agent(name="a\0b", metadata={"a": "\0"})(lines_of(exported)))
    with crate.unpacking(exported, nul=nul) as unpacked:
        if nul:
            assert next(unpacked.rows()).values["name"] == "a\0b"
        else:
            with pytest.raises(crate.CrateError, match=r"Line 2 .*: agents.name holds a NUL"):
                list(unpacked.rows())


@pytest.mark.parametrize("column", ["response_body", "error"])
def test_a_nul_of_a_receivers_keeps_no_instance_from_moving(column: str) -> None:
    read = crate._reader(Delivery.__table__.c[column], nul=False)
    assert read("a\0b") == "a\ufffdb"


def test_an_older_schema_is_upgraded_where_it_is(
    exported: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "revisions", lambda: ["0001", "0002"])
    told = run(there, "import", exported).stderr
    assert "with schema 0001, and this Lanyard" in told
    assert "upgrade the instance that it is of" in told
