"""The log: a line for each request when the settings ask for it, and in which request a warning was."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from flask import Flask, Response, g, has_app_context, request

from api import rfc3339, route_name
from config import Settings
from events import NOBODY
from models import now

_lines = logging.getLogger("lanyard.access")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Formatter(logging.Formatter):
    """Time, level, the request's id, the message; every further line is indented, so none can be forged."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(request_id)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        record.request_id = g.get("request_id", "-") if has_app_context() else "-"
        return "\n    ".join(super().format(record).splitlines())


def open_log() -> None:
    """Send warnings and errors to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(handlers=[handler])


def init_app(app: Flask, settings: Settings) -> None:
    """Log every request on standard output, when the settings say so; otherwise no request pays for it.

    It comes before the other rooms: its clock starts first, and it sees the answer last.
    """
    _lines.handlers.clear()
    if not settings.access_log:
        return
    _lines.addHandler(logging.StreamHandler(sys.stdout))
    _lines.setLevel(logging.INFO)
    _lines.propagate = False
    app.before_request(_start)
    app.after_request(_write_down)


def _start() -> None:
    g.started = time.perf_counter()


def _write_down(response: Response) -> Response:
    _write(
        request_id=g.request_id,
        address=request.remote_addr,
        method=request.method if request.method in _METHODS else None,
        route=route_name(request.url_rule.rule) if request.url_rule else None,
        path=_harmless_path(response),
        status=response.status_code,
        bytes=_size(response),
        duration_ms=round((time.perf_counter() - g.started) * 1000, 1),
        actor=g.get("actor", NOBODY),
        client_id=g.get("client_id"),
    )
    return response


def _harmless_path(response: Response) -> str | None:
    """The path, where it is sure to hold no secret put there by mistake.

    That is where the route has no variable part, or what stands in it was found.
    """
    if request.url_rule is None or (request.view_args and response.status_code >= 400):
        return None
    return request.path


def _size(response: Response) -> int | None:
    """The body's bytes."""
    if request.method == "HEAD" or response.status_code in (204, 304):
        return 0
    return response.calculate_content_length()


def _write(**known: Any) -> None:
    line: dict[str, Any] = {"time": rfc3339(now())}
    names = ("request_id", "address", "method", "route", "path", "status", "bytes", "duration_ms")
    line |= {name: known.get(name) for name in names}
    line |= {"actor": known.get("actor", NOBODY), "client_id": known.get("client_id")}
    # JSON escapes whatever could end the line, and all that is not ASCII.
    _lines.info("%s", json.dumps(line))
