"""The log in a flood: a line a minute for each kind of problem, and no traceback for what strangers do."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
import requests
from support.instances import lock
from support.servers import Server, register, token_body

from ops import log_filters

Serve = Callable[..., Server]
TOKEN = b"POST /oauth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = TOKEN + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The filter's clock."""
    moment = [100.0]
    monkeypatch.setattr(log_filters, "monotonic", lambda: moment[0])
    return moment


@pytest.fixture
def log() -> io.StringIO:
    """What `logger` has written."""
    return io.StringIO()


@pytest.fixture
def logger(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    monkeypatch.setattr(log_filters, "_kinds", {})
    made = logging.Logger("lanyard")
    handler = logging.StreamHandler(log)
    handler.addFilter(log_filters.limit_repeats)
    made.addHandler(handler)
    return made


def test_a_repeated_warning_is_logged_once_a_minute_with_its_count(
    logger: logging.Logger, log: io.StringIO, now: list[float]
) -> None:
    for number in range(1000):
        logger.warning("Agent %s failed: %s.", number, "50%")
        now[0] += 0.05
    assert log.getvalue() == "Agent 0 failed: 50%.\n"
    for number in range(3):
        now[0] += 60
        logger.warning("Agent %s failed: %s.", number, "50%")
    assert log.getvalue().splitlines()[1:] == [
        "Agent 0 failed: 50%. (999 more like this were left out)",
        "Agent 1 failed: 50%.",
        "Agent 2 failed: 50%.",
    ]


def test_every_different_problem_is_logged(logger: logging.Logger, log: io.StringIO) -> None:
    def fail(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:
            logger.exception("A request failed.")

    for _ in range(10):
        logger.warning("A problem.")
        logger.error("A problem.")
        logger.error("Another problem.")
        fail(lambda: int("x"))
        fail(lambda: {}["x"])
        fail(lambda: int("y"))
    lines = log.getvalue().splitlines()
    assert lines.count("A problem.") == 2
    assert lines.count("Another problem.") == 1
    assert lines.count("A request failed.") == 3


def test_recursion_of_any_depth_is_one_problem(logger: logging.Logger, log: io.StringIO) -> None:
    def descend(depth: int) -> int:
        return descend(depth - 1) if depth else int("x")

    for depth in (1, 2, 30):
        try:
            descend(depth)
        except ValueError:
            logger.exception("A request failed.")
    assert log.getvalue().count("A request failed.") == 1


def test_details_are_not_left_out(logger: logging.Logger, log: io.StringIO) -> None:
    for _ in range(10):
        logger.info("A detail.")
    assert log.getvalue() == "A detail.\n" * 10


def test_a_network_error_is_one_line_without_traceback(logger: logging.Logger, log: io.StringIO) -> None:
    logger.addFilter(log_filters.shorten)
    for number in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            logger.exception("Socket error processing request.")
    assert log.getvalue().splitlines() == [
        "Socket error processing request: [Errno 110] Connection timed out",
        "Socket error processing request: [Errno 113] No route to host",
    ]


def added(server: Server, before: str) -> list[str]:
    return server.log.read_text().removeprefix(before).splitlines()


@pytest.mark.long
def test_a_database_that_does_not_answer_has_one_line(serve: Serve, tmp_path: Any) -> None:
    server = serve(LOCAL="1", WORKERS="1").wait()
    before = server.log.read_text()
    with closing(lock(tmp_path)), ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda _: requests.get(f"{server.url}/health/ready"), range(16)))
    assert {response.status_code for response in asked} == {503}
    (line,) = added(server, before)
    assert "The database does not answer" in line


def test_refresh_tokens_used_twice_have_one_line(serve: Serve) -> None:
    server = serve(LOCAL="1", WORKERS="1").wait()
    body = token_body(register(server))
    before = server.log.read_text()
    for _ in range(5):
        token = requests.post(f"{server.url}/oauth/token", json=body).json()["refresh_token"]
        for _ in range(2):
            requests.post(f"{server.url}/oauth/refresh", json={"refresh_token": token})
    (line,) = added(server, before)
    assert "was used twice" in line


def send(server: Server, sent: bytes, *, reset: bool) -> None:
    """Send something, and reset the connection, or end it and read."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(sent)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            client.shutdown(socket.SHUT_WR)
            client.recv(65_536)


@pytest.mark.long
def test_5000_broken_connections_leave_a_line_and_no_traceback(serve: Serve) -> None:
    server = serve(LOCAL="1", WORKERS="1").wait()
    before = server.log.read_text()
    (worker,) = server.workers()
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (60, 60))
    with ExitStack() as connections:
        for _ in range(100):
            connections.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(2)
    for number in range(1000):
        chunks = (b"zz\r\n", b"-1\r\na", b"5\r\nabcdefgh\r\n")[number % 3]
        half_head, half_body = TOKEN[: number % len(TOKEN)], TOKEN + b"Content-Length: 100\r\n\r\n{"
        for sent in (b"x", half_head, half_body, CHUNKED + chunks, os.urandom(50) + b"\r\n\r\n"):
            send(server, sent, reset=number % 2 == 0)
    first, *more = added(server, before)
    assert first.endswith("[ERROR] Error outside a request: [Errno 24] Too many open files")
    # On PostgreSQL, the deliverer lacks descriptors too.
    assert [line for line in more if "The outbox cannot be read" not in line] == []
    assert len(more) <= 1
