"""The examples as a user runs them: programs of their own, against real gunicorn in local mode."""

from __future__ import annotations

import json
import os
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
from support.servers import Server, free_port, register, token_body

from config import HERE

EXAMPLES = HERE / "examples"


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
    url = f"http://localhost:{free_port()}/mcp"
    with running(tmp_path_factory.mktemp("mcp"), "mcp_server.py", issuer, url):
        yield url


@contextmanager
def running(folder: Path, name: str, issuer: str, url: str) -> Iterator[None]:
    """Run an example that serves `url` until the end of the block."""
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command(name, issuer, url), stdout=file, stderr=subprocess.STDOUT)
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
    env = {**os.environ, **variables}
    return subprocess.run(command(name, *arguments), env=env, capture_output=True, text=True, timeout=30)


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


def test_the_mcp_server_refuses_as_rfc_6750_says(lanyard: Server, mcp: str) -> None:
    agent = register(lanyard, audiences=[mcp])
    for headers, refusal in (
        ({}, (401, "invalid_token")),
        ({"Authorization": "Bearer x.y.z"}, (401, "invalid_token")),
        (bearer(lanyard, agent), (401, "invalid_token")),  # for Lanyard itself
        (sign(lanyard, aud=mcp, typ="JWT"), (401, "invalid_token")),
        (sign(lanyard, aud=mcp, exp=int(time.time()) - 31), (401, "invalid_token")),
        (bearer(lanyard, agent, resource=mcp, scope="write"), (403, "insufficient_scope")),
    ):
        answer = requests.post(mcp, json={}, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == refusal, headers
        assert "/.well-known/oauth-protected-resource/mcp" in answer.headers["WWW-Authenticate"]


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
