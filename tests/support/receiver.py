"""A receiver of webhooks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(ThreadingHTTPServer):
    """Takes webhooks, and answers as `decide` says; what it answered with 2xx is `taken`."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, decide: Callable[[str], int] = lambda event_id: 204) -> None:
        self.decide = decide
        self.taken: list[tuple[dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}/hook"

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in list(self.taken)]

    def ids(self) -> set[str]:
        return {headers["webhook-id"] for headers, _ in list(self.taken)}

    def wait_for(self, done: Callable[[], bool], seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, f"{len(self.taken)} deliveries arrived"
            time.sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.decide(self.headers["webhook-id"])
        if status < 300:
            self.server.taken.append((dict(self.headers), body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass
