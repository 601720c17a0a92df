"""How gunicorn serves Lanyard. It reads the same LANYARD_* settings as the app."""

import gc
import os
import resource
import socket
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from ops import metrics_files

metrics_files.share()  # before anything else is imported that makes a metric

import auth
from config import SettingError, Settings, unknown_names
from webhooks.delivery import Deliverer

try:
    settings = Settings.from_env()
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.workers
worker_class = "worker.Worker"
threads = settings.threads
# The app is built once, before the workers: they share its memory, and start at once.
preload_app = True
# Lanyard itself decides, by LANYARD_TRUSTED_PROXIES, what to believe of forwarding headers.
forwarded_allow_ips = ""
control_socket_disable = True
umask = 0o077
# An access token of the largest agent there may be: 64 scopes of 128 characters, 16 audiences.
limit_request_field_size = 20_000
graceful_timeout = 10
loglevel = "warning"
# For --access-logfile: a query, a path, a referer or a user name may be a credential put there by mistake.
# LANYARD_ACCESS_LOG tells the routes and who called.
access_log_format = "%(t)s %(h)s %(m)s %(s)s %(b)s %(M)sms %({x-request-id}o)s"


def on_starting(server: Any) -> None:
    """Refuse an address that is taken, or that the command line gave against local mode."""
    # Connections are files: as many as there may be.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    addresses = server.cfg.address
    if settings.local and any(not isinstance(a, tuple) or a[0] != "127.0.0.1" for a in addresses):
        sys.exit(
            "Lanyard will not start: LANYARD_LOCAL=1 opens the management API, so it binds 127.0.0.1 only."
        )

    # A successor that takes over open sockets (USR2, socket activation) binds nothing.
    if not {"GUNICORN_FD", "LISTEN_FDS"} & set(os.environ):
        for address in addresses:
            _check_free(address)


def _check_free(address: Any) -> None:
    if not isinstance(address, tuple):
        return
    host, port = address[:2]
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Bound, but not listening: a client that came now would be let in and cut off.
            probe.bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        sys.exit(
            "Lanyard will not start: LANYARD_HOST and LANYARD_PORT must be an address that is free,"
            f" and {host}:{port} is not: {reason}."
        )


def when_ready(server: Any) -> None:
    """Say where it listens, who may manage agents, and what to try first."""
    # What is there now stays: no worker need look through it for rubbish, or copy its pages by looking.
    gc.collect()
    gc.freeze()
    url = ", ".join(str(socket) for socket in server.LISTENERS)
    for name in unknown_names():
        print(f"Lanyard knows no setting {name}: is it misspelt?", file=sys.stderr)
    print(f"Lanyard listens on {url}", file=sys.stderr)
    for line in _local_lines(url) if settings.local else _guarded_lines(url):
        print(line, file=sys.stderr, flush=True)


def pre_request(worker: Any, request: Any) -> None:
    """Nothing; gunicorn's own writes every path to the debug log, with whatever was put there by mistake."""


def post_worker_init(worker: Any) -> None:
    """Start this worker's deliverer; one of them all delivers, the others stand by."""
    if "LANYARD" not in worker.app.wsgi().config:
        return  # the benchmark's empty app
    worker.deliverer = Deliverer(worker.app.wsgi())
    worker.deliverer.start()


def worker_exit(server: Any, worker: Any) -> None:
    """Let the deliveries in flight finish."""
    if hasattr(worker, "deliverer"):
        worker.deliverer.stop()


def _local_lines(url: str) -> list[str]:
    body = """'{"name": "my-first-agent", "scopes": ["read"]}'"""
    return [
        "Local mode: the management API is open to this machine, and to this machine only.",
        f"Try: curl -X POST {url}/api/agents -H 'Content-Type: application/json' -d {body}",
    ]


def _guarded_lines(url: str) -> list[str]:
    where = "LANYARD_ADMIN_TOKEN" if settings.admin_token else str(auth.admin_token_file(settings))
    return [
        f"The management API wants the admin token, which is in {where}.",
        f"Tokens name the issuer {settings.issuer} (LANYARD_ISSUER).",
    ]
