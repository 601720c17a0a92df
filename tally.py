"""What only processes know, counted in memory that all of gunicorn's workers share."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flask import Flask, current_app, g, has_request_context

from config import Settings
from wire import route_name

_EXTENSION = "lanyard.tally"

# Processes that may count at once: 64 workers, twice that while a reload replaces them, and room.
PLACES = 256
# Seconds; the last bucket, which has no bound, takes what is longer.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STATUSES = ("2xx", "3xx", "4xx", "5xx")
UNMATCHED = ("unmatched", "any")  # the route and method of a request that no route answers
FAILURES = (
    "wrong_secret",
    "unknown_client",
    "malformed",
    "assertion",
    "inactive_agent",
    "admin_token",
    "access_token",
    "throttled",
)
TOKENS = ("issued", "refreshed", "revoked", "reused")
ATTEMPTS = ("delivered", "retrying", "dead")

_CELL = len(BUCKETS) + 2  # the buckets, the one without a bound, and the sum of seconds


class Timing(NamedTuple):
    """How long the requests of one kind took: how many fell in each bucket, and all their seconds."""

    route: str
    method: str
    status: str
    buckets: list[float]
    seconds: float


class Board:
    """Numbers that only go up. Each process has a place of its own on it, so none waits for another.

    The memory is made before gunicorn forks. A place outlives its process, and the next one counts
    on in it: nothing is lost with a worker that is killed, and nothing piles up.
    """

    def __init__(self, length: int, folder: Path) -> None:
        """Room for `length` numbers; whose place is whose is told by locks on a nameless file in `folder`."""
        self._stride = length + 1  # the first tells whose place it is
        self._cells = memoryview(mmap.mmap(-1, PLACES * self._stride * 8)).cast("d")
        # A command on PostgreSQL may have no folder, and is one process only.
        claims = tempfile.TemporaryFile(dir=folder if folder.is_dir() else None)  # noqa: SIM115
        self._claims = claims  # open as long as the board is
        weakref.finalize(self, self._claims.close)
        self._lock = threading.Lock()
        self._process = 0
        self._first = 0
        self.maker = os.getpid()

    def add(self, *amounts: tuple[int, float]) -> None:
        """Add to some of the numbers, each given by its index."""
        with self._lock:
            if self._process != os.getpid():
                self._move_in()
            for index, amount in amounts:
                self._cells[self._first + index] += amount

    def totals(self) -> list[float]:
        """Each number, summed over all places that were ever used."""
        starts = [at for at in range(0, len(self._cells), self._stride) if self._cells[at]]
        places = [self._cells[at + 1 : at + self._stride].tolist() for at in starts]
        return [sum(column) for column in zip(*places, strict=True)] or [0.0] * (self._stride - 1)

    def processes(self) -> set[int]:
        """The ids of the processes that ever counted, dead ones whose place is free among them."""
        return {int(self._cells[at]) for at in range(0, len(self._cells), self._stride)} - {0}

    def _move_in(self) -> None:
        # A lock of this kind is a process's own, not inherited, and the kernel frees it at any death.
        for place in range(PLACES):
            try:
                fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                continue
            break
        self._process = os.getpid()
        self._cells[place * self._stride] = self._process
        self._first = place * self._stride + 1


class Tally:
    """The board of one app, and what each number on it stands for."""

    def __init__(self, routes: Iterable[tuple[str, str]], folder: Path) -> None:
        names = [*(("failure", name) for name in FAILURES), *(("token", name) for name in TOKENS)]
        names += [("attempt", name) for name in ATTEMPTS]
        self._indices = {name: index for index, name in enumerate(names)}
        kinds = [(*route, status) for route in [UNMATCHED, *routes] for status in STATUSES]
        self._kinds = {kind: len(names) + index * _CELL for index, kind in enumerate(kinds)}
        self.board = Board(len(names) + len(kinds) * _CELL, folder)
        self.began_at = time.time()

    def count(self, kind: str, name: str) -> None:
        """Count one."""
        self.board.add((self._indices[kind, name], 1))

    def time_request(self, route: str, method: str, status: str, seconds: float) -> None:
        """Count an answered request, and how long it took."""
        kinds = self._kinds
        # A route that came after, as tests add them, is among the unmatched.
        cell = kinds.get((route, method, status)) or kinds[(*UNMATCHED, status)]
        self.board.add((cell + bisect_left(BUCKETS, seconds), 1), (cell + _CELL - 1, seconds))

    def counted(self, totals: list[float], kind: str) -> Iterator[tuple[str, float]]:
        """The counts of a kind by name, out of the board's totals."""
        return ((name, totals[index]) for (of, name), index in self._indices.items() if of == kind)

    def timings(self, totals: list[float]) -> Iterator[Timing]:
        """The kinds of requests that there were, out of the board's totals."""
        for (route, method, status), at in self._kinds.items():
            buckets = totals[at : at + _CELL - 1]
            if any(buckets):
                yield Timing(route, method, status, buckets, totals[at + _CELL - 1])


def init_app(app: Flask, settings: Settings) -> None:
    """Count and time every request of the app, whose routes are all there."""
    routes = [
        (route_name(rule.rule), method)
        for rule in app.url_map.iter_rules()
        for method in sorted(rule.methods or ())
    ]
    tally = app.extensions[_EXTENSION] = Tally(dict.fromkeys(routes), settings.instance)
    app.wsgi_app = _timed(app.wsgi_app, tally)  # type: ignore[method-assign]


def tally() -> Tally:
    """The running app's."""
    found: Tally = current_app.extensions[_EXTENSION]
    return found


def count_failure(reason: str) -> None:
    """Count a failed authentication, one of FAILURES; of a request, only the first that it runs into."""
    if has_request_context() and not g.get("has_failed"):
        g.has_failed = True
        tally().count("failure", reason)


def count_token(what: str) -> None:
    """Count a token, or a family of refresh tokens, to which one of TOKENS has happened."""
    tally().count("token", what)


def count_attempt(status: str) -> None:
    """Count an attempt at a webhook delivery by the status it left it in, one of ATTEMPTS."""
    tally().count("attempt", status)


def _timed(wsgi_app: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """The same WSGI app, timed from the call to the last header: where the bytes go is the client's time."""

    def timed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        began = time.perf_counter()
        kind = (*UNMATCHED, "5xx")

        def start(status: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal kind
            # The rule, never the raw path: strangers make no new series. Flask drops its request soon after.
            request = environ.get("werkzeug.request")
            route = UNMATCHED
            if request and request.url_rule:
                route = route_name(request.url_rule.rule), request.method
            kind = (*route, f"{status[0]}xx")
            return start_response(status, *args, **kwargs)

        try:
            return wsgi_app(environ, start)
        finally:
            tally.time_request(*kind, time.perf_counter() - began)

    return timed
