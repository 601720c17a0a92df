"""The documentation is true: its commands and programs run, its links lead somewhere, its names exist."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask import Flask
from support.instances import engine_of
from support.programs import DEPLOY, NODE, needs_node, nginx, through_nginx
from support.servers import Server, access_token, free_port, issuer_of, register, token_body
from support.servers import running as running_server

from commands.__main__ import lanyard as commands
from config import HERE, Settings

PAGES = [HERE / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((HERE / "docs").glob("*.md"))
LOCAL = "http://localhost:8080"
CLIENT_ID = "cid_x"
needs_go = pytest.mark.skipif(not shutil.which("go"), reason="needs go")
needs_jq = pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")


def blocks(page: str, language: str, section: str = "") -> list[str]:
    """Return the fenced blocks of a language on a page, or in the section of a heading."""
    text = (HERE / page).read_text()
    if section:
        _, found, text = text.partition(f"\n## {section}\n")
        assert found, f"{page} has no section {section}"
        text = text.partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code(page: Path) -> str:
    """Return what is code on a page: fenced blocks, and the words in backquotes elsewhere."""
    text = page.read_text()
    fences = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n(.*?)^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fences, *re.findall(r"`([^`]+)`", rest)])


# Commands


@pytest.fixture(scope="module")
def session(lanyard: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run blocks in one shell, with this test's addresses and paths, up to the first failure."""
    folder = tmp_path_factory.mktemp("session")

    def run(pasted: list[str]) -> str:
        script = "\n".join(pasted).replace(LOCAL, issuer_of(lanyard)).replace("/backups", str(folder))
        script = script.replace("public_jwks.py", str(folder / "public_jwks.py"))
        env = {**os.environ, "LANYARD_INSTANCE": str(lanyard.instance), "HOME": str(folder)}
        (public_jwks,) = [text for text in blocks("docs/api.md", "python") if "public_jwks.py" in text]
        (folder / "public_jwks.py").write_text(public_jwks)
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


WALKTHROUGH = blocks("README.md", "bash", "Walkthrough")
# What the walkthrough prints, block by block: JSON documents behind each other.
PRINTED = [
    {"client_id", "client_secret", "agent"},
    {"access_token", "refresh_token", "expires_in"},
    {"token_count", "rotation_history"},
    {"access_token", "refresh_token", "expires_in"},
    {"active", "scope", "client_id", "exp"},
    set(),
    {"error", "error_description"},
]


@needs_jq
def test_the_walkthrough_can_be_pasted(session: Callable[..., str]) -> None:
    marks = [f"{block}\necho '=== {number}'\n" for number, block in enumerate(WALKTHROUGH)]
    answers = re.split(r"=== \d+\n", session([*marks, 'test ${#TOKEN} -gt 100 && echo "$CLIENT_SECRET"']))
    assert len(answers) == len(PRINTED) + 1
    for answer, expected in zip(answers, PRINTED, strict=False):
        assert {name for name in expected if f'"{name}"' not in answer} == set(), answer
    assert '"error"' not in "".join(answers[:-2])
    assert json.loads(answers[4])["active"] is True
    assert answers[6].rstrip().endswith("true")
    assert re.fullmatch(r"cs_[\w-]{50,}\n", answers[-1])


@needs_jq
def test_commands_of_other_pages_run_after_it(session: Callable[..., str]) -> None:
    register_webhook, _ = blocks("docs/webhooks.md", "bash", "Register one")
    (read_token,) = blocks("docs/troubleshooting.md", "bash", "A service refuses a good token")
    (introspect,) = blocks("docs/verify.md", "bash", "Ask Lanyard instead")
    make_key, register_keyed = blocks("docs/api.md", "bash", "Sign in with a private key")
    printed = session([*WALKTHROUGH, register_webhook, 'echo "$WEBHOOK_SECRET"', read_token])
    assert re.search(r"^whsec_\w+", printed, re.MULTILINE)
    assert '"agent_id": ' in printed
    printed = session([*WALKTHROUGH, introspect, make_key, register_keyed])
    assert '{"active":true' in printed.replace(" ", "")
    assert '"private_key_jwt"' in printed


@needs_jq
def test_the_operators_commands_run(lanyard: Server, session: Callable[..., str], tmp_path: Path) -> None:
    back_up, _ = blocks("docs/operations.md", "bash", "Backup and restore")
    rotate, rotate_now = blocks("docs/operations.md", "bash", "Signing keys")
    (make_key,) = blocks("docs/operations.md", "bash", "Encryption at rest")
    (rotate_secret,) = blocks("docs/troubleshooting.md", "bash", "An agent's secret is lost")
    agent = "CLIENT_ID=$(./lanyard agents list --json | jq -r '.agents[0].client_id')"
    for block in [*blocks("docs/operations.md", "bash", "Commands"), back_up, rotate]:
        for line in block.replace("/backups", str(tmp_path)).splitlines():
            program, *arguments = shlex.split(line)
            assert program == "./lanyard"
            done = CliRunner().invoke(commands, arguments, env={"LANYARD_INSTANCE": str(lanyard.instance)})
            assert done.exit_code == 0, done.output
    printed = session([agent, rotate_secret.replace("CLIENT_ID", '"$CLIENT_ID"'), make_key])
    assert re.search(r"^cs_[\w-]{50,}$", printed, re.MULTILINE)
    key = printed.splitlines()[-1]
    assert Settings.from_env({"LANYARD_SECRET_KEY": key}).secret_keys == (key,)
    assert "--now" in rotate_now


@needs_jq
def test_an_agent_signs_in_with_a_private_key(
    lanyard: Server, session: Callable[..., str], tmp_path: Path
) -> None:
    make_key, register_keyed = blocks("docs/api.md", "bash", "Sign in with a private key")
    printed = session([f"BASE={LOCAL}", make_key, register_keyed, 'echo; echo "$HOME"'])
    created, home = printed.split("\n", 1)
    (program,) = [text for text in blocks("docs/api.md", "python") if "OAuth2Session" in text]
    program = program.replace("cid_…", json.loads(created)["client_id"])
    program = program.replace(LOCAL, issuer_of(lanyard))
    done = subprocess.run(
        [sys.executable, "-c", program],
        # Authlib asks for it to send anything over plain http.
        env={**os.environ, "HOME": home.strip()},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("3600\n", 0), done.stderr


def test_the_block_of_the_compose_file_is_the_file() -> None:
    (block,) = blocks("docs/deploy.md", "yaml")
    assert block == (DEPLOY / "compose.yaml").read_text()


@through_nginx
def test_nginx_serves_it_under_a_path(tmp_path: Path) -> None:
    port = free_port()
    base = f"https://127.0.0.1:{port}/lanyard"
    server = Server(tmp_path, WORKERS="1", TRUSTED_PROXIES="1", ISSUER=base)
    (block,) = blocks("docs/deploy.md", "nginx")
    try:
        server.wait()
        operator = {"Authorization": f"Bearer {(server.instance / 'admin_token').read_text().strip()}"}
        with nginx(tmp_path, port, server.port, locations=block), requests.Session() as session:
            session.verify = str(tmp_path / "certificate.pem")
            session.trust_env = False  # a bundle named there would take precedence
            path = "/.well-known/oauth-authorization-server/lanyard"
            metadata = session.get(f"https://127.0.0.1:{port}{path}").json()
            assert metadata["issuer"] == base
            answer = session.post(f"{base}/api/agents", json={"name": "x", "scopes": ["a"]}, headers=operator)
            assert answer.headers["Location"] == f"/lanyard/api/agents/{answer.json()['agent']['id']}"
            token = session.post(metadata["token_endpoint"], data=token_body(answer.json())).json()
            assert jwt.decode(token["access_token"], options={"verify_signature": False})["iss"] == base
            assert session.get(metadata["jwks_uri"]).json()["keys"]
            assert session.get(f"{base}/metrics", headers=operator).status_code == 404
    finally:
        server.kill()


# Verifiers

# Calls a page's `verify` for each line of its input; anything but the documented refusal ends it.
PYTHON_CALLER = """
import sys
import jwt
from verify import verify

for line in sys.stdin:
    try:
        print(verify(line.strip())["client_id"])
    except jwt.PyJWTError:
        print("refused")
"""
NODE_CALLER = """
import { createInterface } from 'node:readline'
import { errors } from 'jose'
import { verify } from './verify.mjs'

for await (const line of createInterface({ input: process.stdin })) {
  try {
    console.log((await verify(line)).client_id)
  } catch (error) {
    if (!(error instanceof errors.JOSEError)) throw error
    console.log('refused')
  }
}
"""
GO_CALLER = """
package main

import (
	"bufio"
	"fmt"
	"os"
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		claims, err := Verify(lines.Text())
		if err == nil {
			fmt.Println(claims.ClientID)
		} else if err == ErrInvalid {
			fmt.Println("refused")
		} else {
			panic(err)
		}
	}
}
"""


@pytest.fixture(scope="module")
def lanyard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("lanyard"), WORKERS="1", SIGNING_ALG="RS256") as server:
        yield server


@pytest.fixture(scope="module")
def good(lanyard: Server, forge: Callable[..., str]) -> dict[str, str]:
    """Tokens to accept, by what they are."""
    issuer = issuer_of(lanyard)
    return {
        "as Lanyard made it": access_token(lanyard, register(lanyard)),
        "with a list of audiences": forge(aud=["http://localhost:1", issuer]),
        "expired by a clock that is ahead": forge(exp=int(time.time()) - 10),
        "not issued yet by a clock that is behind": forge(iat=int(time.time()) + 5),
    }


@pytest.fixture(scope="module")
def bad(lanyard: Server, forge: Callable[..., str]) -> dict[str, str]:
    """Tokens to refuse, by what is wrong with them."""
    agent = register(lanyard, audiences=["http://localhost:1"])
    elsewhere = {"grant_type": "client_credentials", "resource": "http://localhost:1"}
    basic = (agent["client_id"], agent["client_secret"])
    answer = requests.post(f"{lanyard.url}/oauth/token", data=elsewhere, auth=basic).json()
    header, claims, signature = forge().split(".")
    stranger = rsa.generate_private_key(65537, 2048)
    more = encoded({**json.loads(base64.urlsafe_b64decode(claims + "==")), "scope": "admin"})
    return {
        "expired": forge(exp=int(time.time()) - 31),
        "for ever": forge(exp=None),
        "for another audience": answer["access_token"],
        "for other audiences": forge(aud=["http://localhost:1", "http://localhost:2"]),
        "for nobody": forge(aud=None),
        "of another issuer": forge(iss="http://localhost:1"),
        "of no issuer": forge(iss=None),
        "no access token": forge(head={"typ": "JWT"}),
        "of no type": forge(head={"typ": None}),
        "foreign, with a kid of ours": forge(key=stranger),
        "foreign": forge(key=stranger, head={"kid": "x"}),
        "tampered with": f"{header}.{more}.{signature}",
        "with another signature": f"{header}.{claims}.{'A' * 8}{signature[8:]}",
        "with no signature": f"{header}.{claims}.",
        "alg none": forge(head={"alg": "none"}).rpartition(".")[0] + ".",
        "alg HS256 with the public key": forge(head={"alg": "HS256"}),
        "alg RS512": forge(head={"alg": "RS512"}),
        "alg changed": forge(head={"alg": "ES256"}),
        "alg missing": forge(head={"alg": None}),
        "nothing": "",
        "rubbish": "x.y.z",
        "no objects": "W10.W10.W10",
    }


@pytest.fixture(scope="module")
def forge(lanyard: Server) -> Callable[..., str]:
    """Make a token with any claims, signed as its header says; None leaves a field out."""
    with engine_of(lanyard.instance).connect() as connection:
        kid, jwk = connection.exec_driver_sql("SELECT kid, jwk FROM signing_keys ORDER BY pk").first()
    ours: rsa.RSAPrivateKey = jwt.PyJWK.from_json(jwk, algorithm="RS256").key
    issuer = issuer_of(lanyard)

    def make(key: rsa.RSAPrivateKey = ours, head: dict[str, Any] | None = None, **claims: Any) -> str:
        now = int(time.time())
        header = {"alg": "RS256", "typ": "at+jwt", "kid": kid, **(head or {})}
        usual = {"iss": issuer, "aud": issuer, "sub": CLIENT_ID, "client_id": CLIENT_ID, "exp": now + 60}
        text = f"{encoded(header)}.{encoded({'scope': 'read', **usual, **claims})}"
        return f"{text}.{encoded_bytes(signature_of(text.encode(), key, header['alg']))}"

    return make


def signature_of(text: bytes, key: rsa.RSAPrivateKey, alg: str | None) -> bytes:
    if alg == "HS256":
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return hmac.digest(public, text, hashlib.sha256)
    algorithm: HashAlgorithm = SHA512() if alg == "RS512" else SHA256()
    return key.sign(text, padding.PKCS1v15(), algorithm)


def encoded(fields: dict[str, Any]) -> str:
    return encoded_bytes(json.dumps({k: v for k, v in fields.items() if v is not None}).encode())


def encoded_bytes(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def verifier(page: str, language: str, issuer: str) -> str:
    """Return the page's one block in the language, for the issuer given."""
    (block,) = blocks(page, language)
    assert LOCAL in block
    return block.replace(LOCAL, issuer)


def python(folder: Path, issuer: str) -> list[str]:
    (folder / "verify.py").write_text(verifier("README.md", "python", issuer))
    (folder / "main.py").write_text(PYTHON_CALLER)
    return [sys.executable, "-W", "error", "main.py"]


def node(folder: Path, issuer: str) -> list[str]:
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    (folder / "verify.mjs").write_text(verifier("docs/verify.md", "js", issuer))
    (folder / "main.mjs").write_text(NODE_CALLER)
    return ["node", "main.mjs"]


def go(folder: Path, issuer: str) -> list[str]:
    (folder / "go.mod").write_text("module example\n\ngo 1.19\n")
    (folder / "verify.go").write_text(verifier("docs/verify.md", "go", issuer))
    (folder / "main.go").write_text(GO_CALLER)
    done = subprocess.run(["go", "build", "-o", "main"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["./main"]


@pytest.mark.parametrize(
    "language", [python, pytest.param(node, marks=needs_node), pytest.param(go, marks=needs_go)]
)
def test_the_verifier_takes_good_tokens_and_no_others(
    lanyard: Server,
    good: dict[str, str],
    bad: dict[str, str],
    tmp_path: Path,
    language: Callable[[Path, str], list[str]],
) -> None:
    command = language(tmp_path, issuer_of(lanyard))
    tokens = {**good, **bad}
    text = "".join(f"{token}\n" for token in tokens.values())
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    accepted = [
        name
        for name, said in zip(tokens, done.stdout.splitlines(), strict=True)
        if re.fullmatch("cid_.+", said)
    ]
    assert accepted == list(good)


# Names and links


def slug(heading: str) -> str:
    """Return a heading's anchor, as repository hosts make it."""
    text = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (HERE / "README.md").read_text())
    missing = {page for page in PAGES if str(page.relative_to(HERE)) not in links} - {HERE / "README.md"}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_has_no_prompts(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= (180 if page.name == "README.md" else 210)
    assert [line for line in lines if line.startswith("$ ")] == []


def test_every_setting_is_documented_and_no_other() -> None:
    names = {f"LANYARD_{name.upper()}" for name in Settings.__dataclass_fields__} - {"LANYARD_SECRET_KEYS"}
    names |= {"LANYARD_SECRET_KEY"}
    table = re.findall(r"^\| `(LANYARD_\w+)` \|", (HERE / "docs/settings.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(names)
    named = {name for page in PAGES for name in re.findall(r"LANYARD_[A-Z_]*[A-Z]", page.read_text())}
    assert named - names == set()


def test_every_make_target_is_documented_and_no_other() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (HERE / "Makefile").read_text(), re.MULTILINE))
    table = re.findall(r"^\| `make ([a-z-]+)` \|", (HERE / "docs/development.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(targets)
    pattern = r"^(?:.*`)?make (?:-C \S+ )?([a-z][a-z-]*)"
    named = {name for page in PAGES for name in re.findall(pattern, code(page), re.MULTILINE)}
    assert named - targets == set()


@cache
def commands_of(*group: str) -> frozenset[str]:
    """Return what `./lanyard` lists as commands, of a group if one is given."""
    told = CliRunner().invoke(commands, [*group, "--help"])
    assert told.exit_code == 0, told.output
    _, _, listed = told.stdout.partition("\nCommands:\n")
    return frozenset(re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE))


def test_every_command_is_documented_and_no_other() -> None:
    named = [
        found
        for page in PAGES
        for found in re.findall(r"(?:\./|/opt/lanyard/)lanyard ([a-z][a-z-]*)(?: ([a-z]+))?", code(page))
    ]
    assert {name for name, _ in named} == commands_of()
    for name, sub in named:
        assert not sub or not commands_of(name) or sub in commands_of(name), f"{name} {sub}"


def test_every_endpoint_named_exists(make_app: Callable[..., Flask]) -> None:
    there = {
        f"{method} {re.sub('<[^>]+>', '{}', rule.rule)}"
        for rule in make_app().url_map.iter_rules()
        for method in rule.methods or ()
    }
    named = set()
    for page in PAGES:
        for method, path in re.findall(r"\b(GET|POST|PUT|PATCH|DELETE) (/[^\s`?,)…]*)", page.read_text()):
            named.add(f"{method} {re.sub(r'{[^}]+}', '{}', path)}")
    assert len(named) > 30
    assert named - there == set()


def test_every_promise_names_tests_that_exist() -> None:
    promises, _, limits = (HERE / "SECURITY.md").read_text().partition("\n## Known limits\n")
    rows = [row for row in re.findall(r"^\| (.+) \|$", promises, re.MULTILINE) if not row.startswith("---")]
    rows = [row for row in rows if row != "promise | how | test"]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", row.split(" | ")[2])
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (HERE / file).read_text(), re.MULTILINE), f"{file}::{test}"
    assert limits.count("\n| ") > 5


def test_every_dependency_is_explained() -> None:
    explained = {name.lower() for name in re.findall(r"^\| ([\w-]+) \|", _dependencies(), re.MULTILINE)}
    files = ("requirements.txt", "requirements-postgresql.txt")
    pinned = {name for file in files for name in re.findall(r"^[a-z][\w-]*", (HERE / file).read_text(), re.M)}
    assert pinned - explained == set()


def _dependencies() -> str:
    return (HERE / "docs/development.md").read_text().partition("\n## Dependencies\n")[2]
