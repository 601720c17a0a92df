"""The real thing: gunicorn started as a user starts it, asked over HTTP by real clients."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session
from joserfc import jwt as jose
from joserfc.jwk import ECKey
from support.servers import COMMAND, Server, register, token_body

from config import HERE

Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One in local mode with default algorithm for the file; each test has agents of its own."""
    running = Server(tmp_path_factory.mktemp("local"), LOCAL="1", SIGNING_ALG="")
    yield running.wait()
    assert "Traceback" not in running.stop()


def test_the_walkthrough(local: Server) -> None:
    def curl(*arguments: str) -> Any:
        command = ["curl", "--silent", "--show-error", *arguments]
        return json.loads(subprocess.check_output(command, text=True))

    def post(path: str, body: str) -> Any:
        return curl("-X", "POST", f"{local.url}{path}", "-H", "Content-Type: application/json", "-d", body)

    created = post(
        "/api/agents",
        '{\n"name": "night-reporter",\n"scopes": ["read", "write"],\n"expires_in": 7776000\n}',
    )
    agent, client_id, secret = created["agent"], created["client_id"], created["client_secret"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", agent["id"])
    assert agent["client_id"] == client_id
    assert client_id.startswith("cid_")
    assert secret.startswith("cs_")
    assert (agent["name"], agent["scopes"], agent["is_active"]) == (
        "night-reporter",
        ["read", "write"],
        True,
    )
    expires_at = datetime.strptime(agent["expires_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs((expires_at - datetime.now(UTC)).total_seconds() - 90 * 86_400) < 60

    credentials = f'"client_id": "{client_id}", "client_secret": "{secret}"'
    ask = f'{{"grant_type": "client_credentials", {credentials}, "scope": "read write"}}'
    token = post("/oauth/token", ask)
    assert token["access_token"].startswith("eyJhbGciOiJSUzI1NiIs")
    assert token["refresh_token"].startswith("rt_")
    assert {**token, "access_token": "", "refresh_token": ""} == {
        "access_token": "",
        "token_type": "Bearer",
        "expires_in": 3600,
        "scope": "read write",
        "refresh_token": "",
    }

    header = ("-H", f"Authorization: Bearer {token['access_token']}")
    assert curl(f"{local.url}/api/agents/me", *header)["agent"]["id"] == agent["id"]
    assert curl(f"{local.url}/api/agents/me/usage", *header)["token_count"] == 1

    refresh = f'{{"grant_type": "refresh_token", "refresh_token": "{token["refresh_token"]}"}}'
    assert post("/oauth/refresh", refresh)["access_token"].startswith("eyJhbGciOiJSUzI1NiIs")

    rotated = post(f"/api/agents/{agent['id']}", '{"action": "rotate"}')
    assert set(rotated) == {"client_secret"}
    assert rotated["client_secret"].startswith("cs_")
    assert post("/oauth/token", ask)["error"] == "invalid_client"
    assert post("/oauth/token", ask.replace(secret, rotated["client_secret"]))["token_type"] == "Bearer"
    assert curl(f"{local.url}/api/agents/me", *header)["agent"]["id"] == agent["id"]

    me = f"{local.url}/api/agents/me"
    assert curl("-X", "POST", f"{me}/rotate", *header)["client_secret"].startswith("cs_")
    assert curl("-X", "POST", f"{me}/deactivate", *header)["agent"]["is_active"] is False
    assert curl(me, *header)["error"] == "invalid_token"


def test_local_mode_prints_its_address_and_a_first_command(serve: Serve) -> None:
    server = serve(program=COMMAND, LOCAL="1").wait()
    lines = server.stop().splitlines()
    assert len(lines) == 5
    assert server.url in lines[0]
    assert "management API is open to this machine" in lines[1]
    assert lines[2] == f"Tokens name the issuer http://localhost:{server.port} (LANYARD_ISSUER)."
    assert lines[3] == f"The API is described at http://localhost:{server.port}/docs"
    assert lines[4].startswith(f"Try: curl -X POST {server.url}/api/agents ")


@pytest.mark.parametrize(
    ("host", "issuer", "is_warned"),
    [
        ("0.0.0.0", "", True),  # noqa: S104
        ("::", "", True),
        ("0.0.0.0", "https://id.example.com/lanyard", False),  # noqa: S104
        ("127.0.0.1", "", False),
    ],
)
def test_the_start_warns_when_others_get_an_issuer_of_localhost(
    serve: Serve, host: str, issuer: str, is_warned: bool
) -> None:
    server = serve(HOST=host, ISSUER=issuer).wait()
    lines = server.stop().splitlines()
    issuer = issuer or f"http://localhost:{server.port}"
    warning = f"Other machines can connect, but tokens name {issuer}: set LANYARD_ISSUER."
    assert lines[2:] == [
        f"Tokens name the issuer {issuer} (LANYARD_ISSUER).",
        f"The API is described at {issuer}/docs",
        *([warning] if is_warned else []),
    ]


def test_the_first_curl_it_suggests_works(local: Server) -> None:
    command = local.log.read_text().splitlines()[4].removeprefix("Try: ")
    answer = subprocess.check_output(command, shell=True, text=True, stderr=subprocess.DEVNULL)  # noqa: S602
    assert "client_secret" in answer


def test_plain_gunicorn_shuts_the_management_api(serve: Serve) -> None:
    server = serve(program=COMMAND).wait()
    url = f"{server.url}/api/agents"
    claims = {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    for headers in ({}, claims, {"Host": "localhost"}, {"Authorization": "Bearer guess"}):
        assert requests.post(url, json={"name": "x"}, headers=headers).status_code == 401
    token = (server.instance / "admin_token").read_text().strip()
    assert requests.post(url, json={"name": "x"}, auth=("admin", token)).status_code == 201
    log = server.stop()
    assert str(server.instance / "admin_token") in log
    assert token not in log


def test_python_app_py_serves_too_and_shuts_the_management_api(serve: Serve) -> None:
    server = serve(program=("app.py",)).wait()
    assert requests.get(f"{server.url}/api/agents").status_code == 401


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "unix:/tmp/lanyard-test.sock"])
def test_local_mode_does_not_start_on_another_address(serve: Serve, address: str) -> None:
    server = serve("--bind", address, LOCAL="1")
    assert server.process.wait(20) != 0
    assert "LANYARD_LOCAL" in server.log.read_text()


def test_a_bad_setting_stops_the_start_with_one_sentence(serve: Serve) -> None:
    server = serve(program=COMMAND, BCRYPT_COST="99")
    assert server.process.wait(20) != 0
    assert server.log.read_text() == (
        "Lanyard will not start: LANYARD_BCRYPT_COST must be a whole number from 4 to 16, not '99'.\n"
    )


def test_an_unwritable_instance_stops_the_start_with_one_sentence(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    server = serve(INSTANCE=str(tmp_path / "a-file"))
    assert server.process.wait(20) != 0
    text = "Lanyard will not start: LANYARD_INSTANCE must be a folder that can be written: "
    assert server.log.read_text().startswith(text)
    assert server.log.read_text().count("\n") == 1


@pytest.mark.sqlite
def test_a_file_that_is_no_database_stops_the_start(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "instance").mkdir()
    (tmp_path / "instance" / "lanyard.db").write_text("this is a letter to my aunt, and no database" * 100)
    server = serve(program=COMMAND)
    assert server.process.wait(20) != 0
    told = r"Lanyard will not start: The database \S+ cannot be used: .*\n"
    assert re.fullmatch(told, server.log.read_text())


def test_a_misspelt_setting_is_pointed_out(serve: Serve) -> None:
    assert "LANYARD_PROXIES" in serve(PROXIES="1").wait().stop()


def test_authlibs_client_gets_and_refreshes_a_token(local: Server) -> None:
    agent = register(local)
    for method in ("client_secret_basic", "client_secret_post"):
        session = OAuth2Session(
            agent["client_id"],
            agent["client_secret"],
            token_endpoint_auth_method=method,
            scope="read",
        )
        token = session.fetch_token(f"{local.url}/oauth/token", grant_type="client_credentials")
        assert token["scope"] == "read"
        assert session.get(f"{local.url}/api/agents/me").status_code == 200
        again = session.refresh_token(f"{local.url}/oauth/token", refresh_token=token["refresh_token"])
        assert again["access_token"] != token["access_token"]


def test_pyjwt_verifies_a_token_offline_from_the_jwks(local: Server) -> None:
    agent = register(local)
    token = requests.post(f"{local.url}/oauth/token", json=token_body(agent)).json()["access_token"]
    key = jwt.PyJWKClient(f"{local.url}/.well-known/jwks.json").get_signing_key_from_jwt(token)
    issuer = f"http://localhost:{local.port}"
    claims = jwt.decode(token, key, algorithms=["RS256"], audience=issuer, issuer=issuer)
    assert claims["client_id"] == agent["client_id"]


def test_bodies_over_the_limit_are_refused_however_they_come(local: Server) -> None:
    headers = {"Content-Type": "application/json"}
    large = b'{"name": "' + b"x" * 70_000 + b'"}'
    for data in (large, iter([large[:50_000], large[50_000:]])):  # an iterator is sent in chunks
        response = requests.post(f"{local.url}/api/agents", data=data, headers=headers)
        assert (response.status_code, response.json()["error"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"Content-Length: 22\r\n\r\n",
        b'Content-Length: 22\r\n\r\n{"grace_period"',
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n",
    ],
    ids=["no body", "half a body", "no chunk size", "a chunk without an end", "a negative chunk"],
)
def test_an_incomplete_body_changes_nothing(local: Server, sent: bytes) -> None:
    agent = register(local)
    with socket.create_connection(("127.0.0.1", local.port), timeout=10) as connection:
        path = f"/api/agents/{agent['agent']['id']}/rotate"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + sent)
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in connection.recv(1000)
    assert requests.post(f"{local.url}/oauth/token", json=token_body(agent)).status_code == 200


def test_the_largest_access_token_can_be_used(local: Server) -> None:
    scopes = [f"{number:0>128}" for number in range(64)]
    audiences = [f"http://localhost:{local.port}", *(f"{number:0>255}" for number in range(15))]
    agent = register(local, scopes=scopes, audiences=audiences)
    token = requests.post(
        f"{local.url}/oauth/token", json={**token_body(agent), "resource": audiences}
    ).json()
    header = {"Authorization": f"Bearer {token['access_token']}"}
    assert requests.get(f"{local.url}/api/agents/me", headers=header).status_code == 200


def test_a_deletion_leaves_the_connection_in_order(local: Server) -> None:
    with requests.Session() as session:
        for _ in range(3):
            agent_id = session.post(f"{local.url}/api/agents", json={"name": "x"}).json()["agent"]["id"]
            response = session.delete(f"{local.url}/api/agents/{agent_id}")
            assert (response.status_code, response.content) == (204, b"")


def each_worker(server: Server, call: Callable[[], requests.Response], times: int = 24) -> set[int]:
    """The statuses of many calls on connections of their own, so that every worker answers some."""
    return {call().status_code for _ in range(times)}


def test_a_secret_or_token_ended_in_one_worker_is_dead_in_all(local: Server) -> None:
    agent = register(local)
    url = f"{local.url}/api/agents/{agent['agent']['id']}"

    def ask() -> requests.Response:
        return requests.post(f"{local.url}/oauth/token", json=token_body(agent))

    assert each_worker(local, ask) == {200}, "every worker remembers the secret now"
    header = {"Authorization": f"Bearer {ask().json()['access_token']}"}

    def use() -> requests.Response:
        return requests.get(f"{local.url}/api/agents/me", headers=header)

    agent |= {"old": agent["client_secret"]}
    new = requests.post(f"{url}/rotate").json()["client_secret"]
    assert each_worker(local, ask) == {401}
    agent["client_secret"] = new
    assert each_worker(local, ask) == {200}
    assert each_worker(local, use) == {200}
    requests.post(f"{url}/deactivate")
    assert each_worker(local, use) == each_worker(local, ask) == {401}


def test_twelve_uses_of_one_refresh_token_have_one_winner_at_most(local: Server) -> None:
    agent = register(local)
    for _ in range(5):
        token = requests.post(f"{local.url}/oauth/token", json=token_body(agent)).json()
        together = threading.Barrier(12)

        def use(refresh_token: str = token["refresh_token"], together: threading.Barrier = together) -> Any:
            together.wait()
            return requests.post(f"{local.url}/oauth/refresh", json={"refresh_token": refresh_token})

        with ThreadPoolExecutor(12) as pool:
            answers = [future.result() for future in [pool.submit(use) for _ in range(12)]]
        winners = [answer for answer in answers if answer.status_code == 200]
        assert len(winners) <= 1
        assert {answer.status_code for answer in answers} <= {200, 400}
        for winner in winners:
            following = {"refresh_token": winner.json()["refresh_token"]}
            assert requests.post(f"{local.url}/oauth/refresh", json=following).status_code == 400


def test_a_key_rotation_under_load_fails_no_verification(
    serve: Serve,
) -> None:
    server = serve(LOCAL="1").wait()
    agent = register(server)
    keys = jwt.PyJWKClient(f"{server.url}/.well-known/jwks.json")
    issuer = f"http://localhost:{server.port}"
    until = time.monotonic() + 2

    def ask_and_verify(number: int) -> int:
        verified = 0
        with requests.Session() as session:
            while time.monotonic() < until:
                token = session.post(f"{server.url}/oauth/token", json=token_body(agent)).json()[
                    "access_token"
                ]
                key = keys.get_signing_key_from_jwt(token)
                jwt.decode(token, key, algorithms=["ES256"], audience=issuer, issuer=issuer)
                header = {"Authorization": f"Bearer {token}"}
                assert session.get(f"{server.url}/api/agents/me", headers=header).status_code == 200
                verified += 1
        return verified

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask_and_verify, number) for number in range(8)]
        for _ in range(2):
            time.sleep(0.5)
            assert requests.post(f"{server.url}/api/keys/rotate").status_code == 200
        assert min(future.result() for future in running) > 0
    assert len(requests.get(f"{server.url}/.well-known/jwks.json").json()["keys"]) == 3


def test_a_leaked_key_is_dead_in_every_worker(local: Server) -> None:
    agent = register(local)

    def ask() -> requests.Response:
        return requests.post(f"{local.url}/oauth/token", json=token_body(agent))

    assert each_worker(local, ask) == {200}
    header = {"Authorization": f"Bearer {ask().json()['access_token']}"}

    def use() -> requests.Response:
        return requests.get(f"{local.url}/api/agents/me", headers=header)

    assert each_worker(local, use) == {200}
    requests.post(f"{local.url}/api/keys/rotate", json={"now": True})
    assert each_worker(local, use) == {401}
    fresh = [ask().json()["access_token"] for _ in range(12)]
    assert len({jwt.get_unverified_header(token)["kid"] for token in fresh}) == 1


def test_an_assertion_works_once_across_workers(local: Server) -> None:
    key = ECKey.generate_key("P-256")
    jwks = {"keys": [key.as_dict(private=False)]}
    agent = register(local, token_endpoint_auth_method="private_key_jwt", jwks=jwks)
    claims = {"iss": agent["client_id"], "sub": agent["client_id"], "jti": "once"}
    claims |= {"aud": f"http://localhost:{local.port}", "exp": int(time.time()) + 60}
    body = {
        "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": jose.encode({"alg": "ES256"}, claims, key),
    }
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: requests.post(f"{local.url}/oauth/token", data=body), range(12)))
    assert sorted(answer.status_code for answer in answers) == [200, *[401] * 11]


def test_a_port_that_is_taken_stops_the_start_with_one_sentence(serve: Serve, local: Server) -> None:
    second = serve(PORT=str(local.port))
    assert second.process.wait(20) != 0
    assert second.log.read_text().startswith("Lanyard will not start: LANYARD_HOST and LANYARD_PORT must")
    assert second.log.read_text().count("\n") == 1


@pytest.mark.sqlite
def test_files_that_vanish_are_a_503_and_no_new_database(serve: Serve) -> None:
    server = serve(LOCAL="1").wait()
    for path in server.instance.glob("lanyard.db*"):
        path.unlink()
    assert {requests.get(f"{server.url}/api/agents").status_code for _ in range(12)} <= {200, 503}
    assert not (server.instance / "lanyard.db").exists()


def test_many_connections_see_no_error(serve: Serve) -> None:
    server = serve(LOCAL="1").wait()
    agents = [register(server) for _ in range(4)]
    until = time.monotonic() + 1.5

    def ask(number: int) -> set[int]:
        statuses: set[int] = set()
        with requests.Session() as session:
            while time.monotonic() < until:
                body = token_body(agents[number % 4])
                answer = session.post(f"{server.url}/oauth/token", json=body)
                statuses.add(answer.status_code)
                if number % 8 == 0:
                    refresh = {"refresh_token": answer.json()["refresh_token"]}
                    statuses.add(session.post(f"{server.url}/oauth/refresh", json=refresh).status_code)
        return statuses

    with ThreadPoolExecutor(64) as pool:
        seen = set().union(*pool.map(ask, range(64)))
    assert seen == {200}
    assert "locked" not in server.stop()


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_secret_is_in_the_log_even_at_debug_level(serve: Serve, tmp_path: Path, level: str) -> None:
    chatty = tmp_path / "chatty.py"
    chatty.write_text(
        (HERE / "gunicorn.conf.py").read_text()
        + f"\nimport logging\nlogging.basicConfig(level={level.upper()!r})\n"
    )
    server = serve("--config", str(chatty), "--log-level", level, "--access-logfile", "-", LOCAL="1").wait()
    agent = register(server)
    token = requests.post(f"{server.url}/oauth/token", json=token_body(agent)).json()
    basic = requests.post(
        f"{server.url}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(agent["client_id"], agent["client_secret"]),
    ).json()
    refresh = {"refresh_token": token["refresh_token"]}
    newest = requests.post(f"{server.url}/oauth/refresh", json=refresh).json()
    requests.post(f"{server.url}/oauth/refresh", json=refresh)
    header = {"Authorization": f"Bearer {basic['access_token']}"}
    rotated = requests.post(f"{server.url}/api/agents/me/rotate", headers=header).json()["client_secret"]
    requests.post(f"{server.url}/oauth/token", json={**token_body(agent), "scope": 5})
    requests.get(f"{server.url}/api/agents/me", headers={"Authorization": f"Bearer {rotated}"})
    admin = (server.instance / "admin_token").read_text().strip()
    log = server.stop()
    assert "used twice" in log
    basic_header = base64.b64encode(f"{agent['client_id']}:{agent['client_secret']}".encode()).decode()
    for secret in (agent["client_secret"], rotated, admin, basic_header):
        assert secret[12:] not in log
    for answer in (token, basic, newest):
        assert answer["refresh_token"][25:] not in log
        assert answer["access_token"][-40:] not in log
    assert "$2b$" not in log


def test_the_package_is_all_the_readme_needs() -> None:
    for name in ("help", "run", "install", "test", "check"):
        assert re.search(rf"^{name}:.*## ", (HERE / "Makefile").read_text(), re.MULTILINE)
