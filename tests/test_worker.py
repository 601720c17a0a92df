"""The worker's waiting room: slow, idle and broken clients stop nobody."""

from __future__ import annotations

import ctypes
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import headers
import pytest
import requests
from conftest import Server

from arrival import Arrival, Refused
from wire import MAX_BODY

TOKEN = b"POST /oauth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = TOKEN + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers of one thread each: two clients would be enough to stop a server without a waiting room."""
    running = Server(tmp_path_factory.mktemp("worker"), WORKERS="2", THREADS="1", BCRYPT_COST="4", LOCAL="1")
    yield running.wait()
    running.stop()


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(sent)
    return connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def answer(server: Server, sent: bytes) -> bytes:
    with connect(server, sent) as connection:
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
        pytest.param(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal", id="half-a-second-one"),
        pytest.param(TOKEN + b"Content-Length: 1000000\r\n\r\nx", id="the-start-of-too-large-a-body"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", id="never-closing"),
    ],
)
def test_clients_that_stall_do_not_stop_the_others(server: Server, sent: bytes) -> None:
    with ExitStack() as open_connections:
        for _ in range(40):
            open_connections.enter_context(connect(server, sent))
        assert slowest_of(server, 20) < 1


def test_200_idle_connections_do_not_stop_the_others(server: Server) -> None:
    with ExitStack() as open_connections:
        for _ in range(200):
            connection = open_connections.enter_context(connect(server))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert slowest_of(server, 20) < 1


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
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert answer(server, one + one + last).count(b"HTTP/1.1 200 OK") == 3


def test_a_client_that_asks_for_a_go_ahead_gets_one(server: Server) -> None:
    body = b'{"grant_type": "client_credentials"}'
    head = TOKEN + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(server, head) as connection:
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 401")
    assert b"100 Continue" not in found


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 414, id="address"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431, id="many-headers"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"b" * 30_000 + b"\r\n\r\n", 431, id="a-long-header"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000, 431, id="an-endless-head"),
        pytest.param(TOKEN + b"Content-Length: 65537\r\n\r\n", 413, id="a-large-body"),
        pytest.param(CHUNKED + b"FFFFF\r\n", 413, id="a-large-chunk"),
        pytest.param(CHUNKED + b"1\r\na\r\n" * 30_000, 413, id="many-small-chunks"),
        pytest.param(TOKEN + b"Transfer-Encoding: x\r\n\r\nx\r\n", 501, id="another-coding"),
        pytest.param(TOKEN + b"Expect: a-miracle\r\nContent-Length: 0\r\n\r\n", 417, id="a-miracle"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, id="tls"),
        pytest.param(b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n", 400, id="bad-header"),
    ],
)
def test_what_is_no_request_gets_the_one_error_shape(server: Server, sent: bytes, status: int) -> None:
    head, _, body = answer(server, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Content-Type: application/json" in head
    assert body.startswith(b'{"error": "')
    for name, value in headers.EVERYWHERE.items():
        assert f"\r\n{name}: {value}\r\n".encode() in head
    assert b"\r\nX-Request-Id: req_" in head
    assert b"\r\nDate: " in head
    assert b"Server:" not in head


def test_refusals_are_counted_and_a_page_that_is_let_in_may_read_them(serve: Callable[..., Server]) -> None:
    running = serve(CORS_ORIGINS="https://page.example", ADMIN_TOKEN="a-token-for-the-test", LOCAL="0").wait()
    large = TOKEN + b"Origin: %b\r\nContent-Length: 65537\r\n\r\n"
    let_in = b"\r\nAccess-Control-Allow-Origin: https://page.example\r\n"
    assert let_in in answer(running, large % b"https://page.example")
    for origin in (b"https://page.example.com", b"null", b"https://page.example\r\nOrigin: https://x"):
        refusal = answer(running, large % origin)
        assert b"\r\nVary: Origin\r\n" in refusal
        assert b"Access-Control" not in refusal
    # This one the parser refuses.
    assert answer(running, b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n").startswith(b"HTTP/1.1 400")
    bearer = {"Authorization": "Bearer a-token-for-the-test"}
    counted = requests.get(f"{running.url}/metrics", headers=bearer, timeout=5).text
    name = "lanyard_http_request_duration_seconds_count"
    assert f'{name}{{method="any",route="unmatched",status="4xx"}} 5.0' in counted


@pytest.mark.parametrize(
    ("sent", "origin"),
    [
        (TOKEN + b"Origin: https://a.example\r\n", "https://a.example"),
        (TOKEN + b"Origin: https://a.exam", None),
        (TOKEN + b"Content-Length: 65537\r\n\r\nOrigin: https://a.example\r\n", None),
        (TOKEN, None),
    ],
    ids=["in half a head", "not whole", "in the body", "none"],
)
def test_the_origin_is_read_as_far_as_the_request_has_come(sent: bytes, origin: str | None) -> None:
    arrival = Arrival()
    with suppress(Refused):
        arrival.add(sent)
    assert arrival.origin() == origin


def test_no_answer_says_what_serves_it(server: Server) -> None:
    for path in ("/", "/nowhere"):
        assert "Server" not in requests.get(server.url + path).headers


def test_a_request_that_never_ends_is_given_up(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--pythonpath=tests")
    running = serve("--worker-class=impatient.Worker").wait()
    with connect(running, TOKEN) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    with connect(running) as connection:
        assert read_all(connection) == b""


def test_idle_connections_do_not_hold_up_a_stop(serve: Callable[..., Server], tmp_path: Path) -> None:
    running = serve().wait()
    with ExitStack() as open_connections:
        for sent in (b"", b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            open_connections.enter_context(connect(running, sent))
        time.sleep(0.2)
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 8


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_an_arrival_is_whole_at_its_last_byte_and_not_before(size: int) -> None:
    for request in (
        TOKEN + b"Content-Length: 10\r\n\r\n0123456789",
        CHUNKED + b"a\r\n0123456789\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        arrival = Arrival()
        pieces = [request[at : at + size] for at in range(0, len(request), size)]
        assert [arrival.add(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert arrival.take() == request


def test_small_chunks_are_read_through_once() -> None:
    arrival = Arrival()
    arrival.add(CHUNKED)
    started = time.process_time()
    with pytest.raises(Refused):
        for _ in range(MAX_BODY):
            arrival.add(b"1\r\na\r\n")
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(TOKEN + b"Content-Length: 00000000000000000010\r\n\r\n", 400, id="length-of-20-digits"),
        pytest.param(TOKEN + b"Content-Length: +5\r\n\r\n", 400, id="length-with-a-sign"),
        pytest.param(TOKEN + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, id="two-lengths"),
        pytest.param(CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n", 400, id="length-and-chunks"),
        pytest.param(CHUNKED + b"000000005\r\n", 400, id="chunk-size-of-9-digits"),
        pytest.param(TOKEN + b"Transfer-Encoding: gzip\r\n\r\n", 501, id="unknown-coding"),
        pytest.param(TOKEN + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, id="two-codings"),
    ],
)
def test_a_request_whose_end_two_could_see_differently_is_refused_at_once(
    server: Server, sent: bytes, status: int
) -> None:
    started = time.monotonic()
    assert answer(server, sent).startswith(b"HTTP/1.1 %d " % status)
    assert time.monotonic() - started < 2


def test_a_client_of_http_1_0_is_not_told_to_go_ahead(server: Server) -> None:
    sent = TOKEN.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    assert b"100 Continue" not in answer(server, sent)


def test_clients_that_do_not_read_their_answers_do_not_stop_the_others(server: Server) -> None:
    with ExitStack() as open_connections:
        for _ in range(20):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            open_connections.enter_context(client)
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        assert slowest_of(server, 20) < 1


def test_of_clients_that_broke_off_nothing_is_kept(serve: Callable[..., Server]) -> None:
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


def test_many_requests_sent_at_once_are_answered_one_by_one_and_all(server: Server) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = one * 999 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert answer(server, sent).count(b"HTTP/1.1 200 OK") == 1000


def test_a_worker_without_file_descriptors_goes_on_when_some_are_free_again(
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
    assert "No connection can be accepted" in running.stop()


def test_a_worker_stops_whichever_of_its_threads_the_signal_reaches(serve: Callable[..., Server]) -> None:
    running = serve(WORKERS="1", THREADS="4").wait()
    (worker,) = running.workers()
    threads = [int(path.name) for path in Path(f"/proc/{worker}/task").iterdir()]
    ctypes.CDLL(None).tgkill(worker, max(threads), signal.SIGTERM)
    until = time.monotonic() + 5  # gunicorn would wait for ten
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists()
