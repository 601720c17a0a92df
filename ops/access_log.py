"""The access log, one JSON line for each request if LANYARD_ACCESS_LOG is set; the format of warnings."""

from __future__ import annotations

import json
import logging
import sys
import time

from flask import Flask, Response, g, has_app_context, request

from api import rfc3339, route_name
from config import Settings
from events import NOBODY
from models import now
from ops import log_filters

_access = logging.getLogger("lanyard.access")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Formatter(logging.Formatter):
    """Format time, level, request id and message; indent further lines, so that none can be forged."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(request_id)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        record.request_id = g.get("request_id", "-") if has_app_context() else "-"
        return "\n    ".join(super().format(record).splitlines())


def open_log() -> None:
    """Send warnings and errors to standard error, one of a kind a minute."""
    handler = logging.StreamHandler()
    handler.addFilter(log_filters.limit_repeats)
    handler.setFormatter(Formatter())
    logging.basicConfig(handlers=[handler])


def init_app(app: Flask, settings: Settings) -> None:
    """Log every request on standard output if the settings say so.

    Call it after `metrics.init_app`, which sets `g.started`, and before other hooks are registered: the
    first one in sees the response last.
    """
    _access.handlers.clear()
    if not settings.access_log:
        return
    _access.addHandler(logging.StreamHandler(sys.stdout))
    _access.setLevel(logging.INFO)
    _access.propagate = False
    app.after_request(_log_request)


def _log_request(response: Response) -> Response:
    # A secret may be in the path by mistake, unless the route has no variable part or what it names exists.
    is_known = request.url_rule and not (request.view_args and response.status_code >= 400)
    has_body = request.method != "HEAD" and response.status_code not in (204, 304)
    line = {
        "time": rfc3339(now()),
        "request_id": g.request_id,
        "address": request.remote_addr,
        "method": request.method if request.method in _METHODS else None,
        "route": route_name(request.url_rule.rule) if request.url_rule else None,
        "path": request.path if is_known else None,
        "status": response.status_code,
        "bytes": response.calculate_content_length() if has_body else 0,
        "duration_ms": round((time.perf_counter() - g.started) * 1000, 1),
        "actor": g.get("actor", NOBODY),
        "client_id": g.get("client_id"),
    }
    # JSON escapes line breaks and all that is not ASCII.
    _access.info("%s", json.dumps(line))
    return response
