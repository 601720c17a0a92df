"""Receivers of webhooks that do harm where they can."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def say_nothing(client: socket.socket) -> None:
    client.recv(1)
    time.sleep(30)


def drip(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X: y\r\n")
        time.sleep(0.1)


def drip_body(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 500 Oh No\r\n\r\n")
    while True:
        client.sendall(b"x")
        time.sleep(0.1)


def stop_halfway(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 2")
    time.sleep(30)


def flood_with_headers(client: socket.socket) -> None:
    while True:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def reset(client: socket.socket) -> None:
    client.recv(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer_late(client: socket.socket) -> None:
    client.recv(65_536)
    time.sleep(9)
    client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def ask_to_wait(retry_after: bytes) -> Callable[[socket.socket], None]:
    def answer(client: socket.socket) -> None:
        client.recv(65_536)
        client.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: %b\r\n\r\n" % retry_after)

    return answer


TEN = (
    say_nothing,
    stop_halfway,
    drip,
    drip_body,
    answer_late,
    flood_with_headers,
    reset,
    ask_to_wait(b"Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
    ask_to_wait(b"Mon, 01 Jan 2035 00:00:00 +99999999"),
    ask_to_wait(b"9" * 5000),
)


@contextmanager
def listening(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A receiver that behaves so on every connection; its URL."""

    def serve() -> None:
        with suppress(OSError):  # the end of the test
            while True:
                threading.Thread(target=talk, args=[listener.accept()[0]], daemon=True).start()

    def talk(client: socket.socket) -> None:
        with client, suppress(OSError):
            behave(client)

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://localhost:{listener.getsockname()[1]}/"
