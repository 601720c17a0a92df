"""The examples as a user runs them: programs of their own, against real gunicorn in local mode."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
import sqlalchemy as sa
from joserfc.jwk import ECKey, OKPKey
from support.instances import engine_of
from support.programs import NODE, needs_node
from support.servers import Server, free_port, register, token_body

from config import HERE

pytestmark = pytest.mark.long

EXAMPLES = HERE / "examples"
# What version 1 of the MCP SDK calls the things that `mcp_client.mjs` imports from version 2.
VERSION_1 = """
import {
  ClientCredentialsProvider, PrivateKeyJwtProvider
} from '@modelcontextprotocol/sdk/client/auth-extensions.js'
import { Client } from '@modelcontextprotocol/sdk/client/index.js'
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js'
"""
FASTMCP_CLIENT = """
import asyncio
import os
import sys

from fastmcp import Client
from fastmcp.client.auth import ClientCredentialsOAuthProvider

issuer, url = sys.argv[1:]
auth = ClientCredentialsOAuthProvider(
    client_id=os.environ["CLIENT_ID"], client_secret=os.environ["CLIENT_SECRET"], issuer=issuer
)


async def main():
    async with Client(url, auth=auth) as client:
        print((await client.call_tool("whoami")).data)


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def lanyard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lanyard"), LOCAL="1")
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def issuer(lanyard: Server) -> str:
    return f"http://localhost:{lanyard.port}"


@pytest.fixture(scope="module")
def api(issuer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `verify_offline.py`, running."""
    url = f"http://localhost:{free_port()}"
    with running(tmp_path_factory.mktemp("api"), "verify_offline.py", issuer, url):
        yield url


@pytest.fixture(scope="module")
def mcp(issuer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `mcp_server.py`, running."""
    url = f"http://localhost:{free_port()}/tools/mcp"
    with running(tmp_path_factory.mktemp("mcp"), "mcp_server.py", issuer, url):
        yield url


@pytest.fixture(scope="module")
def fastmcp(issuer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `fastmcp_server.py`, running; it has no path, which FastMCP spells as a slash."""
    url = f"http://localhost:{free_port()}/"
    with running(tmp_path_factory.mktemp("fastmcp"), "fastmcp_server.py", issuer, url):
        yield url


@contextmanager
def running(folder: Path, name: str, issuer: str, url: str) -> Iterator[None]:
    """Run an example that serves `url` until the end of the block."""
    log = folder / "log"
    with log.open("w") as file:
        env = {**os.environ, "SIGNING_ALGORITHM": "ES256"}
        process = subprocess.Popen(command(name, issuer, url), stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        until = time.monotonic() + 20
        while not answers(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        requests.get(url, timeout=5)
    except requests.ConnectionError:
        return False
    return True


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    return run_program(command(name, *arguments), **variables)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MCP client in JavaScript beside what it imports, also with version 1 of the SDK."""
    folder = tmp_path_factory.mktemp("javascript")
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    text = (EXAMPLES / "mcp_client.mjs").read_text()
    older, count = re.subn(r"import \{[^}]+\} from '@modelcontextprotocol/client'\n", VERSION_1, text)
    assert count == 1
    (folder / "2.mjs").write_text(text)
    (folder / "1.mjs").write_text(older)
    return folder


def run_program(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


def credentials(agent: dict[str, Any]) -> dict[str, str]:
    return {"CLIENT_ID": agent["client_id"], "CLIENT_SECRET": agent["client_secret"]}


def bearer(lanyard: Server, agent: dict[str, Any], **fields: str) -> dict[str, str]:
    answer = requests.post(f"{lanyard.url}/oauth/token", json={**token_body(agent), **fields}).json()
    return {"Authorization": f"Bearer {answer['access_token']}"}


def counts(lanyard: Server, agent: dict[str, Any]) -> tuple[int, int]:
    """Tokens given to the agent by its credentials, and by refresh tokens."""
    now = requests.get(f"{lanyard.url}/api/agents/{agent['agent']['id']}").json()["agent"]
    return now["token_count"], now["refresh_count"]


def sign(lanyard: Server, typ: str = "at+jwt", **claims: Any) -> dict[str, str]:
    """A token with Lanyard's own signature that says whatever it is told to."""
    with engine_of(lanyard.instance).connect() as connection:
        kid, jwk = connection.execute(sa.text("SELECT kid, jwk FROM signing_keys")).one()
    now = int(time.time())
    usual = {
        "iss": f"http://localhost:{lanyard.port}",
        "sub": "cid_x",
        "client_id": "cid_x",
        "scope": "read",
        "iat": now,
        "exp": now + 60,
    }
    key = jwt.PyJWK.from_json(jwk, algorithm="ES256")
    token = jwt.encode({**usual, **claims}, key, headers={"typ": typ, "kid": kid})
    return {"Authorization": f"Bearer {token}"}


def test_the_client_calls_the_api_that_verifies_offline(lanyard: Server, issuer: str, api: str) -> None:
    agent = register(lanyard, audiences=[api])
    done = run("client.py", issuer, api, **credentials(agent))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"reports": [], "read_by": agent["client_id"]}
    assert counts(lanyard, agent) == (1, 0)


def test_the_client_signs_in_again_when_its_token_has_run_out(lanyard: Server, issuer: str, api: str) -> None:
    # Authlib counts a token's last minute as over.
    agent = register(lanyard, audiences=[api], token_ttl=30)
    done = run("client.py", issuer, api, **credentials(agent))
    assert done.returncode == 0, done.stderr
    assert counts(lanyard, agent) == (2, 0)


def test_the_client_fails_when_the_api_is_not_its_audience(lanyard: Server, issuer: str, api: str) -> None:
    done = run("client.py", issuer, api, **credentials(register(lanyard)))
    assert done.returncode != 0
    assert "invalid_target" in done.stderr


def test_the_api_refuses_as_rfc_6750_says(lanyard: Server, issuer: str, api: str) -> None:
    agent = register(lanyard, audiences=[api])
    good = bearer(lanyard, agent, resource=api)
    assert requests.get(f"{api}/reports", headers=good).status_code == 200
    assert requests.get(f"{api}/reports", headers=sign(lanyard, aud=api)).status_code == 200
    invalid = (401, 'Bearer realm="reports", error="invalid_token"')
    for headers, refusal in (
        ({}, (401, 'Bearer realm="reports"')),
        ({"Authorization": "Basic eDp5"}, (401, 'Bearer realm="reports"')),
        ({"Authorization": "Bearer"}, invalid),
        ({"Authorization": "Bearer x.y.z"}, invalid),
        ({"Authorization": good["Authorization"][:-8] + "AAAAAAAA"}, invalid),
        (bearer(lanyard, agent), invalid),  # for Lanyard itself
        (sign(lanyard, aud=api, typ="JWT"), invalid),
        (sign(lanyard, aud=api, exp=int(time.time()) - 31), invalid),
        (sign(lanyard, aud=api, iss="http://localhost:1"), invalid),
        (sign(lanyard), invalid),
        (
            bearer(lanyard, agent, resource=api, scope="write"),
            (403, 'Bearer realm="reports", error="insufficient_scope", scope="read"'),
        ),
    ):
        answer = requests.get(f"{api}/reports", headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == refusal, headers


def test_an_mcp_client_signs_in_by_secret(lanyard: Server, issuer: str, mcp: str) -> None:
    agent = register(lanyard, audiences=[mcp])
    done = run("mcp_client.py", "secret", issuer, mcp, **credentials(agent))
    assert done.returncode == 0, done.stderr
    assert agent["client_id"] in done.stdout
    assert counts(lanyard, agent) == (1, 0)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(ECKey.generate_key("P-256"), "ES256"), (OKPKey.generate_key("Ed25519"), "EdDSA")],
    ids=["ES256", "EdDSA"],
)
def test_an_mcp_client_signs_in_by_private_key(
    lanyard: Server, issuer: str, mcp: str, tmp_path: Path, key: ECKey | OKPKey, algorithm: str
) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(key.as_pem(private=True))
    agent = register(
        lanyard,
        audiences=[mcp],
        token_endpoint_auth_method="private_key_jwt",
        jwks={"keys": [key.as_dict(private=False)]},
    )
    mine = {"CLIENT_ID": agent["client_id"], "PRIVATE_KEY": str(file), "SIGNING_ALGORITHM": algorithm}
    done = run("mcp_client.py", "key", issuer, mcp, **mine)
    assert done.returncode == 0, done.stderr
    assert agent["client_id"] in done.stdout


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"audiences": []}, "invalid_target"), ({"scopes": ["write"]}, "invalid_scope")],
    ids=["without the audience", "without the scope"],
)
def test_an_mcp_client_fails_when_its_agent_may_not(
    lanyard: Server, issuer: str, mcp: str, fields: dict[str, Any], error: str
) -> None:
    agent = register(lanyard, **{"audiences": [mcp], **fields})
    done = run("mcp_client.py", "secret", issuer, mcp, **credentials(agent))
    assert done.returncode != 0
    assert error in done.stderr


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key as `openssl ecparam` writes it."""
    file = tmp_path_factory.mktemp("key") / "key.pem"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(file)]
    subprocess.run(make, check=True)
    return file


@needs_node
@pytest.mark.parametrize("method", ["secret", "key"])
@pytest.mark.parametrize(("version", "server"), [("2", "mcp"), ("1", "fastmcp")])
def test_an_mcp_client_in_javascript_signs_in(
    lanyard: Server,
    issuer: str,
    javascript: Path,
    key_file: Path,
    request: pytest.FixtureRequest,
    version: str,
    server: str,
    method: str,
) -> None:
    url = request.getfixturevalue(server)
    keys = {"keys": [ECKey.import_key(key_file.read_text()).as_dict(private=False)]}
    agent = register(lanyard, audiences=[url.removesuffix("/")], jwks=keys)
    program = ["node", str(javascript / f"{version}.mjs"), method, issuer, url]
    done = run_program(program, **credentials(agent), PRIVATE_KEY=str(key_file))
    assert done.returncode == 0, done.stderr
    assert agent["client_id"] in done.stdout
    assert counts(lanyard, agent) == (1, 0)


def test_fastmcps_client_signs_in_by_secret(lanyard: Server, issuer: str, fastmcp: str) -> None:
    agent = register(lanyard, audiences=[fastmcp.removesuffix("/")])
    program = [sys.executable, "-W", "error", "-c", FASTMCP_CLIENT, issuer, fastmcp]
    done = run_program(program, **credentials(agent))
    assert (done.returncode, done.stdout) == (0, f"{agent['client_id']}\n"), done.stderr
    assert counts(lanyard, agent) == (1, 0)


@pytest.mark.parametrize("server", ["mcp", "fastmcp"])
def test_the_mcp_servers_refuse_as_rfc_6750_says(
    lanyard: Server, request: pytest.FixtureRequest, server: str
) -> None:
    url = request.getfixturevalue(server)
    agent = register(lanyard, audiences=[url])
    invalid = (401, 'error="invalid_token"')
    for headers, (status, error) in (
        ({}, (401, "Bearer ")),
        ({"Authorization": "Bearer x.y.z"}, invalid),
        (bearer(lanyard, agent), invalid),  # for Lanyard itself
        (sign(lanyard, aud=url, typ="JWT"), invalid),
        (sign(lanyard, aud=url, exp=int(time.time()) - 31), invalid),
        (bearer(lanyard, agent, resource=url, scope="write"), (403, 'error="insufficient_scope"')),
    ):
        answer = requests.post(url, json={}, headers=headers)
        challenge = answer.headers["WWW-Authenticate"]
        assert (answer.status_code, error in challenge) == (status, True), (headers, challenge)
        assert "/.well-known/oauth-protected-resource" in challenge


@pytest.mark.parametrize(("server", "path"), [("api", "/reports"), ("mcp", ""), ("fastmcp", "")])
def test_a_server_whose_clock_is_behind_accepts_a_fresh_token(
    lanyard: Server, request: pytest.FixtureRequest, server: str, path: str
) -> None:
    url = request.getfixturevalue(server)
    fresh = sign(lanyard, aud=url, iat=int(time.time()) + 5)
    assert requests.get(f"{url}{path}", headers=fresh).status_code not in (401, 403)


def test_the_receiver_takes_each_signed_event_once(lanyard: Server, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://localhost:{port}/hook"
    hook = {"name": "example", "url": url, "events": ["agent.created"]}
    made = requests.post(f"{lanyard.url}/api/webhooks", json=hook).json()
    env = {**os.environ, "WEBHOOK_SECRET": made["secret"]}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("webhook_receiver.py", str(port)), stdout=file, stderr=subprocess.STDOUT, env=env
        )
    try:
        until = time.monotonic() + 20
        while not answers(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        agent = register(lanyard)
        path = f"{lanyard.url}/api/webhooks/{made['webhook']['id']}/deliveries"

        def settled(attempts: int) -> bool:
            (delivery,) = requests.get(path).json()["deliveries"]
            return bool((delivery["status"], delivery["attempts"]) == ("delivered", attempts))

        while not settled(1):
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        (delivery,) = requests.get(path).json()["deliveries"]
        requests.post(f"{path}/{delivery['id']}/redeliver")
        while not settled(1) or log.read_text().count("POST /hook") < 2:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        assert requests.post(url, data=b"{}", headers={"webhook-id": "evt_x"}).status_code == 401
        assert log.read_text().count(agent["agent"]["id"]) == 1
    finally:
        process.terminate()
        process.wait(20)
