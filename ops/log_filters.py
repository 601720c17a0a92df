"""Filters of the log: strangers must not fill the disk with lines, nor have their requests quoted."""

from __future__ import annotations

import logging
from time import monotonic
from traceback import walk_tb
from typing import Any

INTERVAL = 60.0  # seconds in which one warning of a kind is logged
# gunicorn quotes malformed requests, which may hold a credential.
_QUOTING = ("Invalid request from ip=", "Ignored premature client disconnection.")
MOST_KINDS = 1000
_kinds: dict[Any, tuple[float, int]] = {}  # until when to leave a kind out, and how many have been


def limit_repeats(record: logging.LogRecord) -> bool:
    """Let one warning or error of a kind through in INTERVAL, with the number of those left out before it.

    A kind is a logger, a level, a message without its arguments, and the lines of code an exception came by.
    """
    if record.levelno < logging.WARNING:
        return True
    kind = (record.name, record.levelno, str(record.msg), _origin(record))
    until, left_out = _kinds.get(kind, (0.0, 0))
    if monotonic() < until:
        _kinds[kind] = (until, left_out + 1)
        return False
    _kinds[kind] = (monotonic() + INTERVAL, 0)
    if len(_kinds) > MOST_KINDS:
        del _kinds[next(iter(_kinds))]
    if left_out:
        record.msg, record.args = f"{record.getMessage()} ({left_out} more like this were left out)", ()
    return True


def _origin(record: logging.LogRecord) -> Any:
    if not record.exc_info:
        return None
    kind, _, trace = record.exc_info
    # A set: recursion of any depth is one kind.
    return kind, frozenset((frame.f_code.co_filename, line) for frame, line in walk_tb(trace))


def shorten(record: logging.LogRecord) -> bool:
    """Drop gunicorn's quotes of requests, and the tracebacks of network errors, whose text says as much."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, OSError):
        record.msg, record.args, record.exc_info = f"{record.getMessage().rstrip('.')}: {error}", (), None
    return not record.getMessage().startswith(_QUOTING)
