"""gunicorn's configuration. It reads the same LANYARD_* settings as the app."""

# Before every other import: modules imported earlier would block the worker's other requests.
from gevent import monkey

monkey.patch_all()

import errno
import gc
import logging
import os
import resource
import socket
import sys
import tempfile
from contextlib import suppress
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import gevent

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from config import LOOPBACK_NAMES, SettingError, Settings, ignored_variables
from ops import log_filters, metrics_files
from storage.files import describe_error, make_folder


def _find_temporary_folder() -> None:
    """Have gunicorn and SQLite use the instance's folder when no other one can be written."""
    with suppress(FileNotFoundError):
        tempfile.gettempdir()
        return
    make_folder(settings.instance)
    os.environ["TMPDIR"] = str(settings.instance)
    tempfile.gettempdir()


try:
    settings = Settings.from_env()
    _find_temporary_folder()
    metrics_files.share()  # before the import of modules that make metrics
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")
except OSError as error:
    reason = describe_error(error)
    sys.exit(f"Lanyard will not start: LANYARD_INSTANCE must be a folder that can be written: {reason}.")

import auth
import events
from webhooks import delivery

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.workers
worker_class = "gevent"
worker_connections = 5_000  # of each worker, 15 to 40 kB each
# Seconds that a connection may be idle, and that a request's head may take. Longer than in proxies and
# clients (nginx 60, Go 90): a request fails if the server closes the connection at the same moment.
keepalive = 95
# Seconds for a request from its head to the last byte of the response.
REQUEST_TIMEOUT = 60
# Build the app once, before the fork: workers share its memory and start at once.
preload_app = True
# The app itself decides which forwarding headers to trust (LANYARD_TRUSTED_PROXIES).
forwarded_allow_ips = ""
control_socket_disable = True
umask = 0o077
# The largest access token: 64 scopes of 128 characters, 16 audiences.
limit_request_field_size = 20_000
graceful_timeout = 10
loglevel = "warning"
# For --access-logfile: no path, query, referer or user name, which may hold a credential by mistake.
# LANYARD_ACCESS_LOG logs routes and callers.
access_log_format = "%(t)s %(h)s %(m)s %(s)s %(b)s %(M)sms %({x-request-id}o)s"
_log = logging.getLogger("gunicorn.error")
_log.addFilter(log_filters.shorten)
_log.addFilter(log_filters.limit_repeats)


def on_starting(server: Any) -> None:
    """Raise the limit of open files; exit if an address is in use, or not 127.0.0.1 in local mode."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    addresses = server.cfg.address
    if settings.local and any(not isinstance(a, tuple) or a[0] != "127.0.0.1" for a in addresses):
        sys.exit(
            "Lanyard will not start: LANYARD_LOCAL=1 opens the management API, so it binds 127.0.0.1 only."
        )

    # A server that inherits open sockets (USR2, socket activation) binds nothing.
    if not {"GUNICORN_FD", "LISTEN_FDS"} & set(os.environ):
        for address in addresses:
            if isinstance(address, tuple):
                _check_free(*address[:2])


def _check_free(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Bind without listening: no client can connect to the probe.
            probe.bind((host, port))
    except OSError as error:
        sys.exit(
            "Lanyard will not start: LANYARD_HOST and LANYARD_PORT must be an address that is free,"
            f" and {host}:{port} is not: {error.strerror}."
        )


def when_ready(server: Any) -> None:
    """Print where the server listens, who may manage agents, and a first command to try."""
    # Exempt the app from garbage collection, whose marks would make each worker copy the shared memory.
    gc.collect()
    gc.freeze()
    url = ", ".join(str(socket) for socket in server.LISTENERS)
    for sentence in ignored_variables():
        print(sentence, file=sys.stderr)
    print(f"Lanyard listens on {url}", file=sys.stderr)
    for line in [*_first_steps(url), *_warn_of_issuer(server.LISTENERS)]:
        print(line, file=sys.stderr, flush=True)


def post_worker_init(worker: Any) -> None:
    """Start the worker's webhook delivery; one worker delivers at a time, the others stand by."""
    worker.in_progress = 0
    # Duplicates outlive the listeners that gunicorn closes, and with them the queue of new connections.
    worker.listeners = [listener.dup() for listener in worker.sockets]
    gevent.get_hub().print_exception = _log_exception
    gevent.spawn(_exit_when_idle, worker)
    if "LANYARD" in worker.app.wsgi().config:  # not the benchmark's empty app
        delivery.start(worker.app.wsgi())


def _log_exception(context: Any, *exc_info: Any) -> None:
    """Log what gevent would print: an exception outside a request, as when file descriptors run out."""
    _log.error("Error outside a request.", exc_info=exc_info)


def pre_request(worker: Any, request: Any) -> None:
    """Bound the request's time. (gunicorn's own hook logs paths, which may hold a credential.)"""
    worker.in_progress += 1
    reset = ConnectionResetError(errno.ECONNRESET, "The request took too long.")
    request.timeout = gevent.Timeout.start_new(REQUEST_TIMEOUT, reset)


def post_request(worker: Any, request: Any, environ: Any, response: Any) -> None:
    """Yield: a connection with many pipelined requests would block the worker's other connections."""
    worker.in_progress -= 1
    request.timeout.close()
    if not _is_read(request.body):
        request.force_close()
    # Not 0: gevent would look for data on the other connections after 50 such sleeps only.
    gevent.sleep(1e-6)


def _is_read(body: Any) -> bool:
    """Whether a body ends within 64 KiB and two seconds: gunicorn would read any length without yielding."""
    with suppress(Exception), gevent.Timeout(2, False):
        return len(body.read(65_536)) < 65_536
    return False


def _exit_when_idle(worker: Any) -> None:
    """Exit soon after SIGTERM: gunicorn would wait for idle connections until `graceful_timeout`."""
    while worker.alive:
        gevent.sleep(0.1)
    # gunicorn closes its listeners within a second, and a client whose request began before that may send its
    # next one on the same connection: answer both.
    idle = 0.0  # seconds
    with gevent.Timeout(7, False):
        while idle < 2:
            gevent.sleep(0.1)
            idle = 0.0 if worker.in_progress else idle + 0.1
    sys.exit(0)


def worker_exit(server: Any, worker: Any) -> None:
    """Answer the connections that nobody has accepted; record failures; let deliveries in flight finish."""
    for listener in getattr(worker, "listeners", ()):
        _answer_queue(worker, listener)
    if worker.app.callable and "LANYARD" in worker.app.callable.config:
        with worker.app.callable.app_context():
            events.report_failures(everything=True)
    delivery.stop()


def _answer_queue(worker: Any, listener: socket.socket) -> None:
    """Close the listener without having the kernel reset the connections in its queue."""
    listener.settimeout(0)
    name = listener.getsockname()
    clients = []
    with suppress(OSError):  # the queue is empty
        while True:
            clients.append(listener.accept())
    listener.close()
    closed = SimpleNamespace(getsockname=lambda: name)  # all that gunicorn asks of it
    gevent.joinall([gevent.spawn(worker.handle, closed, *client) for client in clients], timeout=1)


def _first_steps(url: str) -> list[str]:
    names = [
        f"Tokens name the issuer {settings.issuer} (LANYARD_ISSUER).",
        f"The API is described at {settings.url('/docs')}",
    ]
    if not settings.local:
        where = "LANYARD_ADMIN_TOKEN" if settings.admin_token else auth.admin_token_file(settings)
        return [f"The management API requires the admin token, which is in {where}.", *names]
    body = """'{"name": "my-first-agent", "scopes": ["read"]}'"""
    return [
        "Local mode: the management API is open to this machine, and to this machine only.",
        *names,
        f"Try: curl -X POST {url}/api/agents -H 'Content-Type: application/json' -d {body}",
    ]


def _warn_of_issuer(listeners: list[Any]) -> list[str]:
    """Warn when other machines can connect, whose own `localhost` is not this server."""
    hosts = [address[0] for listener in listeners if isinstance(address := listener.getsockname(), tuple)]
    is_open = any(not ip_address(host.partition("%")[0]).is_loopback for host in hosts)
    if is_open and urlsplit(settings.issuer).hostname in LOOPBACK_NAMES:
        return [f"Other machines can connect, but tokens name {settings.issuer}: set LANYARD_ISSUER."]
    return []
