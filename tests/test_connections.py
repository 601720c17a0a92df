"""Slow, idle and broken clients: they stop nobody, and nothing that arrived in part is acted on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from support.servers import Server

TOKEN = b"POST /oauth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = TOKEN + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FORM = b"POST /oauth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
# Seconds. Who waits behind a client that stalls waits for a minute; on a busy machine one second goes by.
STALLED = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("connections"), WORKERS="2", LOCAL="1")
    yield running.wait()
    assert "Traceback" not in running.stop()


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(sent)
    return connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def answer(server: Server, sent: bytes, *, half_close: bool = False) -> bytes:
    with connect(server, sent) as connection:
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def slowest_of(server: Server, count: int) -> float:
    """The longest of some requests beside whatever else goes on."""
    times = []
    for _ in range(count):
        started = time.monotonic()
        assert requests.get(f"{server.url}/health", timeout=5).status_code == 200
        times.append(time.monotonic() - started)
    return max(times)


def memory(server: Server) -> int:
    """Bytes that its one worker takes."""
    (worker,) = server.workers()
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def register(server: Server) -> dict[str, Any]:
    body = {"name": "an agent", "scopes": ["read", "write"]}
    return dict(requests.post(f"{server.url}/api/agents", json=body, timeout=60).json())


def agent_form(agent: dict[str, Any]) -> dict[str, str]:
    names = ("client_id", "client_secret")
    return {"grant_type": "client_credentials", **{name: agent[name] for name in names}}


def truncated_token_requests(agent: dict[str, Any]) -> Iterator[bytes]:
    """Requests that would give a token of all scopes if what is missing did not count."""
    form = "&".join(f"{name}={value}" for name, value in agent_form(agent).items()).encode()
    whole = form + b"&scope=read"
    for cut in (len(form), len(form) + 1, len(form) + 6, len(whole) - 1):
        yield FORM + b"Content-Length: %d\r\n\r\n" % len(whole) + whole[:cut]
    yield FORM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(form), form)
    yield FORM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(form), form)
    yield FORM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b" % (len(whole), form)
    body = json.dumps(agent_form(agent)).encode()
    yield TOKEN + b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body
    yield TOKEN + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-5]


def test_a_token_request_cut_short_gives_no_token(server: Server) -> None:
    agent = register(server)
    for sent in truncated_token_requests(agent):
        found = answer(server, sent, half_close=True)
        assert found == b"" or found.startswith(b"HTTP/1.1 400 "), sent
        assert b"access_token" not in found, sent
    shown = requests.get(f"{server.url}/api/agents/{agent['agent']['id']}", timeout=5).json()
    assert shown["agent"]["token_count"] == 0


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_route_that_ignores_its_body_waits_for_it_too(server: Server, method: str) -> None:
    agent = register(server)
    path = f"/api/agents/{agent['agent']['id']}" + ("/deactivate" if method == "POST" else "")
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    found = answer(server, head.encode() + b"Content-Length: 10\r\n\r\n{", half_close=True)
    assert found == b"" or found.startswith(b"HTTP/1.1 400 ")
    assert requests.post(f"{server.url}/oauth/token", json=agent_form(agent), timeout=5).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"G", b"POST /oauth/tok", TOKEN, b"\r\n", HEALTH + b"GET /hea"])
def test_a_head_cut_short_is_no_crash(server: Server, sent: bytes) -> None:
    assert b" 500 " not in answer(server, sent, half_close=True)
    connect(server, sent).close()
    assert requests.get(f"{server.url}/health", timeout=5).status_code == 200
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "sent", [b"x", TOKEN + b"Content-Length: 100\r\n\r\n{", HEALTH * 50, CHUNKED + b"5\r\na"]
)
def test_a_reset_is_no_crash(server: Server, sent: bytes) -> None:
    for _ in range(5):
        with connect(server, sent) as client:
            time.sleep(0.02)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert slowest_of(server, 4) < 1
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"POST /oauth/tok", id="half-a-request-line"),
        pytest.param(b"\r\n\r\n", id="empty-lines"),
        pytest.param(TOKEN, id="half-a-head"),
        pytest.param(TOKEN + b'Content-Length: 100\r\n\r\n{"grant', id="half-a-body"),
        pytest.param(
            TOKEN + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n", id="no-body-at-go-ahead"
        ),
        pytest.param(CHUNKED + b"5\r\nab", id="half-a-chunk"),
        pytest.param(CHUNKED + b"5\r\nabcde\r\n", id="no-last-chunk"),
        pytest.param(CHUNKED + b"0\r\nTrailer: x\r\n", id="no-end-of-trailers"),
        pytest.param(HEALTH + b"GET /heal", id="half-a-second-one"),
        pytest.param(TOKEN + b"Content-Length: 1000000\r\n\r\nx", id="the-start-of-too-large-a-body"),
        pytest.param(LAST, id="never-closing"),
    ],
)
def test_clients_that_stall_do_not_stop_the_others(server: Server, sent: bytes) -> None:
    with ExitStack() as open_connections:
        for _ in range(40):
            open_connections.enter_context(connect(server, sent))
        assert slowest_of(server, 20) < STALLED


@pytest.mark.parametrize(
    "sent",
    [TOKEN, TOKEN + b'Content-Length: 100\r\n\r\n{"grant'],
    ids=["half a head", "half a body"],
)
def test_1000_clients_that_stall_do_not_stop_the_others(server: Server, sent: bytes) -> None:
    allow_files(4096)
    with ExitStack() as open_connections:
        for _ in range(1000):
            open_connections.enter_context(connect(server, sent))
        assert slowest_of(server, 20) < STALLED


def allow_files(count: int) -> None:
    """Raise this process's limit of open files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, most), most))


def test_clients_that_pipeline_and_read_nothing_do_not_stop_the_others(server: Server) -> None:
    asking = HEALTH.replace(
        b"\r\n\r\n", b"\r\nExpect: 100-continue\r\nX-Request-Id: %b\r\n\r\n" % (b"r" * 38)
    )
    sent = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20 + asking * 400
    with ExitStack() as open_connections:
        for _ in range(8):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            open_connections.enter_context(client)
            client.setblocking(False)
            client.send(sent)
        time.sleep(0.2)
        assert slowest_of(server, 20) < 1


@pytest.mark.parametrize(
    ("head", "block"),
    [
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000000000\r\n\r\n", b"a" * 500_000),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000000000\r\n\r\n", b"a" * 500_000),
        (CHUNKED, b"1\r\na\r\n" * 100_000),
        (CHUNKED.replace(b"POST", b"GET"), b"1\r\na\r\n" * 100_000),
    ],
    ids=["POST", "GET", "chunked POST", "chunked GET"],
)
def test_a_body_without_an_end_is_not_read_to_it(server: Server, head: bytes, block: bytes) -> None:
    with connect(server, head) as connection, pytest.raises(ConnectionError):
        for _ in range(200):  # 100 MB
            connection.sendall(block)
    assert slowest_of(server, 5) < 1


def test_200_idle_connections_do_not_stop_the_others(server: Server) -> None:
    with ExitStack() as open_connections:
        for _ in range(200):
            connection = open_connections.enter_context(connect(server, HEALTH))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert slowest_of(server, 20) < STALLED


def test_a_connection_may_be_idle(server: Server) -> None:
    """Its configuration says for how long; once the default of two seconds was in force."""
    configuration = Path("gunicorn.conf.py").read_text()
    assert int(re.findall(r"^keepalive = (\d+)$", configuration, re.MULTILINE)[0]) >= 75
    with connect(server, HEALTH) as connection:
        time.sleep(2.5)
        connection.sendall(LAST)
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 2


def test_a_request_that_never_ends_is_given_up(serve: Callable[..., Server], tmp_path: Path) -> None:
    impatient = tmp_path / "impatient.py"
    impatient.write_text(Path("gunicorn.conf.py").read_text() + "\nREQUEST_TIMEOUT = 0.5\nkeepalive = 1\n")
    running = serve("--config", str(impatient), LOCAL="1").wait()
    endless = (b"", TOKEN, CHUNKED + b"5\r\nab", TOKEN + b"Content-Length: 100\r\n\r\n{")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(partial(answer, running), endless):
            assert found == b"" or found.startswith(b"HTTP/1.1 400 ")
    with connect(running, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100) as client:
        time.sleep(1.5)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                client.sendall(HEALTH)
                time.sleep(0.01)
    assert "Traceback" not in running.stop()


def test_a_hash_that_takes_long_does_not_stop_the_others(serve: Callable[..., Server]) -> None:
    running = serve(WORKERS="1", LOCAL="1", BCRYPT_COST="12").wait()  # a quarter of a second
    with ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        creating = [pool.submit(register, running) for _ in range(3)]
        time.sleep(0.1)
        slowest = slowest_of(running, 10)
        assert not all(one.done() for one in creating)
        assert all("client_secret" in one.result(60) for one in creating)
        taken = time.monotonic() - started
    assert slowest < taken / 4


def test_a_request_that_trickles_in_is_answered(server: Server) -> None:
    body = b'{"grant_type": "client_credentials"}'
    request = TOKEN + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with connect(server) as connection:
        for byte in request:
            connection.send(bytes([byte]))
        assert b"invalid_client" in read_all(connection)


def test_a_chunked_request_that_trickles_in_is_answered(server: Server) -> None:
    request = CHUNKED.replace(b"Transfer", b"Connection: close\r\nTransfer")
    with connect(server) as connection:
        for piece in (request, b"1", b"\r\n{\r", b"\n1\r\n}\r\n", b"0\r", b"\nX-Sum: 1\r\n\r", b"\n"):
            connection.send(piece)
            time.sleep(0.02)
        assert b"Send grant_type" in read_all(connection)


def test_requests_sent_behind_each_other_are_answered_in_turn(server: Server) -> None:
    assert answer(server, HEALTH * 2 + LAST).count(b"HTTP/1.1 200 OK") == 3


def test_many_requests_sent_at_once_are_answered_one_by_one_and_all(server: Server) -> None:
    with connect(server, HEALTH * 999 + LAST) as connection:
        assert slowest_of(server, 5) < 1
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 1000


def test_a_client_that_expects_100_continue_gets_it(server: Server) -> None:
    body = b'{"grant_type": "client_credentials"}'
    head = TOKEN + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(server, head) as connection:
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 401")
    assert b"100 Continue" not in found


def test_an_http_1_0_client_gets_no_100_continue(server: Server) -> None:
    sent = TOKEN.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    assert b"100 Continue" not in answer(server, sent)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 414, id="address"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431, id="many-headers"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"b" * 30_000 + b"\r\n\r\n", 431, id="a-long-header"),
        pytest.param(TOKEN + b"Content-Length: 65537\r\n\r\n", 413, id="a-large-body"),
        pytest.param(CHUNKED + b"FFFFF\r\n" + b"a" * 70_000, 413, id="a-large-chunk"),
        pytest.param(TOKEN + b"Transfer-Encoding: x\r\n\r\nx\r\n", 501, id="another-coding"),
        pytest.param(TOKEN + b"Expect: a-miracle\r\nContent-Length: 0\r\n\r\n", 417, id="a-miracle"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, id="tls"),
        pytest.param(b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n", 400, id="bad-header"),
    ],
)
def test_a_malformed_request_is_refused(server: Server, sent: bytes, status: int) -> None:
    with connect(server, sent) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(TOKEN + b"Content-Length: +5\r\n\r\n", 400, id="length-with-a-sign"),
        pytest.param(TOKEN + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, id="two-lengths"),
        pytest.param(CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n", 400, id="length-and-chunks"),
        pytest.param(TOKEN + b"Transfer-Encoding: gzip\r\n\r\n", 400, id="not-chunked"),
        pytest.param(TOKEN + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 400, id="chunked-twice"),
    ],
)
def test_a_request_with_ambiguous_length_is_refused_at_once(server: Server, sent: bytes, status: int) -> None:
    started = time.monotonic()
    assert answer(server, sent).startswith(b"HTTP/1.1 %d " % status)
    assert time.monotonic() - started < 2


def test_idle_connections_do_not_hold_up_a_stop(serve: Callable[..., Server], tmp_path: Path) -> None:
    running = serve().wait()
    with ExitStack() as open_connections:
        for sent in (b"", TOKEN, HEALTH, TOKEN + b"Content-Length: 100\r\n\r\n{"):
            open_connections.enter_context(connect(running, sent))
        time.sleep(0.2)
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 9.5


def test_a_request_in_progress_is_answered_before_a_stop(serve: Callable[..., Server]) -> None:
    running = serve(WORKERS="1", LOCAL="1", BCRYPT_COST="12").wait()
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(register, running)
        time.sleep(0.2)
        running.process.terminate()
        assert "client_secret" in creating.result(10)


def test_a_reload_and_a_killed_worker_lose_no_request(serve: Callable[..., Server]) -> None:
    running = serve(LOCAL="1").wait()
    agent = register(running)

    def ask() -> int:
        return requests.post(f"{running.url}/oauth/token", json=agent_form(agent), timeout=5).status_code

    old = running.workers()
    running.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 6
    while time.monotonic() < until and (set(old) & set(running.workers()) or len(running.workers()) < 2):
        assert ask() == 200
    assert not set(old) & set(running.workers())
    killed = running.workers()[0]
    signal.pidfd_send_signal(pidfd := os.pidfd_open(killed), signal.SIGKILL)
    os.close(pidfd)
    running.wait()
    assert {ask() for _ in range(24)} == {200}
    assert killed not in running.workers()


def test_no_memory_is_kept_for_clients_that_broke_off(serve: Callable[..., Server]) -> None:
    running = serve(WORKERS="1").wait()
    before = memory(running)
    for _ in range(600):
        with connect(running, b"GET /health HTTP/1.1\r\nA: " + b"b" * 50_000) as client:
            time.sleep(0.0005)
            # Closed so, it is reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert requests.get(f"{running.url}/health", timeout=5).status_code == 200
    assert memory(running) < before + 10 * 2**20  # bytes; they sent 30 MB


def test_a_large_answer_reaches_a_slow_reader_whole(server: Server) -> None:
    with connect(
        server, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    ) as client:
        found = b""
        while data := client.recv(4096):
            found += data
            time.sleep(0.002)
    head, _, body = found.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head


def test_a_worker_recovers_from_running_out_of_file_descriptors(
    serve: Callable[..., Server],
) -> None:
    running = serve(WORKERS="1").wait()
    (worker,) = running.workers()
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (40, 40))
    with ExitStack() as open_connections:
        for _ in range(60):
            open_connections.enter_context(connect(running))
        time.sleep(0.5)
    assert requests.get(f"{running.url}/health", timeout=5).status_code == 200
    assert Path(f"/proc/{worker}").exists()
