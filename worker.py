"""gunicorn's threaded worker, but that one thread listens and answers, and lets another when it must wait."""

from __future__ import annotations

import json
import math
import selectors
import signal
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from gunicorn.http import errors, wsgi
from gunicorn.util import http_date
from gunicorn.workers.gthread import TConn, ThreadWorker

import app
import waiting
from arrival import Arrival, Refused
from models import new_id
from ops import access_log
from wire import MAX_BODY

ARRIVAL = 15  # seconds a request may take to arrive, from its connection's last answer on
LINGER = 2  # seconds for a client to read its answer before the connection goes
MOST_LEAVING = 1000  # connections that linger at once; more are closed right away
AT_THE_DOOR = 1  # seconds that a stopping worker lets a new connection's first request be on its way
AT_ONCE = 8  # connections
HESITATION = 0.0002  # seconds: without it one worker may take all that come, and keep them
DEPARTURE = 60  # seconds a client may take to read its answer

_REFUSALS = {
    400: ("invalid_request", "This is not a request that HTTP/1.1 knows."),
    408: ("invalid_request", "The request took too long to arrive."),
    413: ("payload_too_large", f"A body may hold at most {MAX_BODY} bytes."),
    414: ("invalid_request", "The address is too long."),
    417: ("invalid_request", "The only expectation known here is 100-continue."),
    431: ("invalid_request", "The headers are too long."),
    500: ("server_error", "Lanyard failed to answer. Its log says why."),
    501: ("invalid_request", "Send the body with a Content-Length, or in chunks."),
}
_STATUS_OF = {
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.ExpectationFailed: 417,
    errors.UnsupportedTransferCoding: 501,
}


class Response(wsgi.Response):
    """gunicorn's, without its name."""

    def default_headers(self) -> list[str]:
        """gunicorn's first lines, without `Server`."""
        return [line for line in super().default_headers() if not line.startswith("Server:")]

    def close(self) -> None:
        """gunicorn's; then it goes, before anything is done that can come after an answer."""
        super().close()
        self.sock.send_more()


# gunicorn has no setting for it: its `wsgi.create` makes whatever goes by this name.
wsgi.Response = Response


class Socket(socket.socket):
    """A client's socket on which nothing waits: what is to be sent is kept until the client takes it."""

    unsent: bytes = b""

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Keep it: a packet for the headers alone costs as much as parsing a request."""
        self.unsent += bytes(data)

    def send_more(self) -> None:
        """Send what goes of what was kept."""
        with suppress(BlockingIOError):
            self.unsent = self.unsent[self.send(self.unsent, socket.MSG_DONTWAIT) :]

    def close(self) -> None:
        """What was not taken is nobody's any more."""
        self.unsent = b""
        super().close()


class Done(NamedTuple):
    """How a request ended, as gunicorn's worker asks a future of its thread pool."""

    keep_alive: bool

    def result(self) -> bool:
        """Whether the connection is good for another request."""
        return self.keep_alive

    def cancelled(self) -> bool:
        """Never."""
        return False


class Connection(TConn):
    """A client's connection, which waits in the worker's poller for a request or for its end."""

    sock: Socket

    def __init__(self, worker: Worker, sock: Socket, client: Any) -> None:
        super().__init__(worker.cfg, sock, client, sock.getsockname())
        self.worker = worker
        self.arrival = Arrival()
        self.waits: dict[Connection, float] = {}  # those it waits among, with their deadlines
        self.is_leaving = False
        self.done = Done(False)

    def init(self) -> None:
        """gunicorn's; its parser is given whole requests, and must never wait for more of one."""
        super().init()
        self.parser.unreader.chunk = bytes

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully without gunicorn's two seconds of everybody's time, in the poller."""
        if graceful:
            self.worker.see_off(self)
        else:
            super().close()


class _Mine(threading.local):
    """What each thread knows of itself."""

    is_leading = False
    patience = -1.0  # seconds to wait for the lead before looking up; for ever


class Worker(ThreadWorker):
    """Slow, idle and silent clients cost a place in the poller, and no thread.

    One thread at a time leads: it looks what has arrived, and answers it then and there. Handing
    requests over to other threads costs more than most requests do, since all of them run under one
    lock of Python's. A leader that is about to wait steps aside, and one of the others leads.
    """

    alive: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By the seconds they were given: so the first of each are the first to end, and any is soon out.
        self._waits: dict[float, dict[Connection, float]] = {ARRIVAL: {}, LINGER: {}, DEPARTURE: {}}
        self._ready: deque[Connection] = deque()
        self._leaving: set[Connection] = set()
        self._no_room_until = -math.inf
        self._lead = threading.Lock()
        self._mine = _Mine()
        self._door_closed_at = math.inf

    def init_signals(self) -> None:
        """gunicorn's, but they end the main thread's wait for the lead: Python runs its handlers there."""
        super().init_signals()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.siginterrupt(number, True)

    def run(self) -> None:
        """Let every thread have its turn until the worker stops; then gunicorn's own `run` winds down."""
        queue = self.method_queue.fileno()
        self.poller.register(queue, selectors.EVENT_READ, self.method_queue.run_callbacks)
        for _ in range(self.cfg.threads - 1):
            threading.Thread(target=self._take_turns, daemon=True).start()
        # Python runs signals' handlers in this thread alone, but the kernel may give one to another thread.
        self._mine.patience = 1.0
        self._take_turns()
        self._take_lead()
        self.poller.unregister(queue)
        super().run()

    def _take_turns(self) -> None:
        try:
            while self.alive:
                self._take_lead()
                while self.alive and self._mine.is_leading:
                    self._do_round()
        except Exception:
            self.log.exception("A worker cannot go on.")
            self.alive = False
        finally:
            self._step_aside()

    def _do_round(self) -> None:
        self.notify()
        has_room = self.nr_conns < self.worker_connections and time.monotonic() > self._no_room_until
        self.set_accept_enabled(has_room)
        self.wait_for_and_dispatch_events(1.0)
        if self._mine.is_leading:
            self.alive = self.alive and self.is_parent_alive()
            self.murder_keepalived()
            self.murder_pending()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """gunicorn's hook: look what has come, then answer what is whole by now."""
        super().wait_for_and_dispatch_events(0 if self._ready else timeout)
        # No more than there are now: who sends many requests at once waits for the others between them.
        for _ in range(len(self._ready)):
            self._serve(self._ready.popleft())
            if not self._mine.is_leading:
                return  # the new leader goes on

    def _take_lead(self) -> None:
        while not self._lead.acquire(timeout=self._mine.patience):
            pass
        self._mine.is_leading = True
        waiting.before_waiting(self._step_aside)

    def _step_aside(self) -> None:
        if self._mine.is_leading:
            self._mine.is_leading = False
            self._lead.release()

    def accept(self, listener: socket.socket) -> bool:
        """Let some in, and no more before those are answered; returns whether there may be another."""
        return all(self._accept_one(listener) for _ in range(AT_ONCE))

    def _accept_one(self, listener: socket.socket) -> bool:
        if self.nr_conns and self.alive:
            time.sleep(HESITATION)
        try:
            sock, client = listener.accept()
        except BlockingIOError:
            return False
        except ConnectionAbortedError:
            return True
        except OSError as error:
            # No file descriptor or no memory is left: some come back when others leave.
            self.log.error("No connection can be accepted: %s", error)
            self._no_room_until = time.monotonic() + 1
            return False
        self.nr_conns += 1
        self.enqueue_req(Connection(self, Socket(fileno=sock.detach()), client))
        return True

    def set_accept_enabled(self, enabled: bool) -> None:
        """gunicorn's, and at the stop take in who stands at the door, then close it.

        Left open, it would let clients connect that nobody answers, and reset them in the end.
        """
        super().set_accept_enabled(enabled)
        if self.alive or self._door_closed_at < math.inf:
            return
        self._door_closed_at = time.monotonic()
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()

    def enqueue_req(self, conn: Connection) -> None:
        """There is something to read from it, or left of what was read."""
        self._ready.append(conn)

    def _serve(self, conn: Connection) -> None:
        """Answer when the request is whole; else the connection waits for more."""
        try:
            self._receive(conn)
        except Refused as refusal:
            self._refuse(conn, refusal.status)
        except OSError:
            self._drop(conn)

    def _receive(self, conn: Connection) -> None:
        conn.sock.setblocking(False)
        arrival = conn.arrival
        # What came behind the last request on this connection.
        whole = arrival.add(conn.parser.unreader.take_buffered() if conn.parser else b"")
        if not whole:
            try:
                data = conn.sock.recv(MAX_BODY)
            except BlockingIOError:
                pass
            else:
                if not data and not arrival.data:
                    self._drop(conn)
                    return
                # Nothing more comes: the parser knows what to say to what there is.
                whole = arrival.add(data) or not data
        if whole:
            conn.init()
            conn.parser.unreader.unread(arrival.take())
            conn.arrival = Arrival()
            _end_wait(conn)
            self._answer(conn)
            return
        if arrival.is_waiting_for_go_ahead:
            conn.sock.send(arrival.go_ahead())
        self._wait(conn, None if conn in conn.waits else ARRIVAL)

    def _answer(self, conn: Connection) -> None:
        done = Done(self.handle(conn))
        if self._mine.is_leading:
            self.finish_request(conn, done)
        else:
            # Whoever leads looks after the connections.
            self.method_queue.defer(self.finish_request, conn, done)

    def finish_request(self, conn: Connection, done: Done) -> None:
        """gunicorn's, once the client has taken its answer: until then it waits in the poller."""
        if not conn.sock.unsent:
            super().finish_request(conn, done)
            return
        conn.done = done
        self._wait(conn, DEPARTURE, selectors.EVENT_WRITE)

    def _on_writable(self, conn: Connection, sock: Socket) -> None:
        self.poller.unregister(sock)
        try:
            sock.send_more()
        except OSError:
            self._drop(conn)
            return
        if sock.unsent:
            self._wait(conn, None, selectors.EVENT_WRITE)
        else:
            _end_wait(conn)
            super().finish_request(conn, conn.done)

    def _wait(self, conn: Connection, seconds: float | None, event: int = selectors.EVENT_READ) -> None:
        """Let it wait in the poller; `seconds` sets its deadline, None leaves the one it has."""
        if seconds is not None:
            _end_wait(conn)
            conn.waits = self._waits[seconds]
            conn.waits[conn] = time.monotonic() + seconds
        act = self._on_readable if event == selectors.EVENT_READ else self._on_writable
        self.poller.register(conn.sock, event, partial(act, conn))

    def _on_readable(self, conn: Connection, sock: socket.socket) -> None:
        self.poller.unregister(sock)
        if conn.is_leaving:
            self._drain(conn)
        else:
            self.enqueue_req(conn)

    def murder_pending(self) -> None:
        """End the waits that have lasted too long; soon all that nothing came of when the worker stops."""
        now = time.monotonic()
        is_closed = not self.alive and now > self._door_closed_at + AT_THE_DOOR
        for waits in self._waits.values():
            for conn in list(waits) if is_closed else ():
                if not conn.arrival.data and not conn.sock.unsent:
                    self._give_up(conn)
            while waits and next(iter(waits.values())) <= now:
                self._give_up(next(iter(waits)))

    def _give_up(self, conn: Connection) -> None:
        _end_wait(conn)
        self.poller.unregister(conn.sock)
        if conn.arrival.data and not conn.is_leaving:
            self._refuse(conn, 408)
        else:
            self._drop(conn)

    def _refuse(self, conn: Connection, status: int) -> None:
        self._answer_alone(conn.sock, conn.client, status, origin=conn.arrival.origin())
        self.nr_conns -= 1
        self.see_off(conn)

    def _drop(self, conn: Connection) -> None:
        if not conn.is_leaving:
            self.nr_conns -= 1
        self._leaving.discard(conn)
        _end_wait(conn)
        conn.close()

    def see_off(self, conn: Connection) -> None:
        """Half-close, and close when the client has: it may still be reading (RFC 9112 §9.6)."""
        conn.is_leaving = True
        self._leaving.add(conn)
        if len(self._leaving) > MOST_LEAVING:
            self._drop(conn)
            return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self._wait(conn, LINGER)
        except (OSError, ValueError):
            self._drop(conn)

    def _drain(self, conn: Connection) -> None:
        try:
            if conn.sock.recv(MAX_BODY):
                self._wait(conn, None)
                return
        except BlockingIOError:
            self._wait(conn, None)
            return
        except OSError:
            pass
        self._drop(conn)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """What gunicorn's parser refuses, in the one error shape."""
        status = next((code for kind, code in _STATUS_OF.items() if isinstance(exc, kind)), None)
        request_id = new_id("req_")
        if status is None and not isinstance(exc, errors.ParseException):
            self.log.exception("Error handling the request %s", request_id)
        refused = status or (400 if isinstance(exc, errors.ParseException) else 500)
        self._answer_alone(client, addr, refused, request_id)

    def _answer_alone(
        self,
        sock: socket.socket,
        client: Any,
        status: int,
        request_id: str | None = None,
        origin: str | None = None,
    ) -> None:
        """Answer as the app does, without it."""
        request_id = request_id or new_id("req_")
        more = app.HEADERS
        size = _send_refusal(sock, status, {**more, "X-Request-Id": request_id})
        # Over a Unix socket there is no address.
        access_log.write_refusal(client[0] if isinstance(client, tuple) else None, status, size, request_id)
        # A crash has been counted where it happened.
        if status < 500 or status == 501:
            pass


def _end_wait(conn: Connection) -> None:
    # At once, not at its deadline: a flood of connections that come and go would pile up.
    conn.waits.pop(conn, None)


def _send_refusal(sock: socket.socket, status: int, more: dict[str, str]) -> int:
    """Send the one error shape, as far as it goes; the body's bytes."""
    error, description = _REFUSALS[status]
    body = json.dumps({"error": error, "error_description": description}).encode()
    told = {
        "Date": http_date(),
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        **more,
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in told.items()]
    try:
        sock.setblocking(False)
        sock.send("\r\n".join([*lines, "", ""]).encode() + body)
    except OSError:
        pass  # a client that is gone misses nothing
    return len(body)
