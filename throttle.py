"""Guessing costs the guesser: failed sign-ins are counted by address, for all workers and over restarts."""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta
from typing import NamedTuple, NoReturn

import sqlalchemy as sa
from flask import request
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # SQLite's compiler knows it too

import tally
from database import reading, writing
from models import FailedSignIns, Moment, now
from wire import Problem


class Limit(NamedTuple):
    """How many failures are let by at once, and the seconds after which each is forgotten."""

    failures: int
    seconds: int

    @property
    def window(self) -> timedelta:
        """The time in which all of them are forgotten."""
        return timedelta(seconds=self.failures * self.seconds)


# For guesses at one client secret, or at the admin token, from one address: fifty, then ten a minute.
SECRET = Limit(50, 6)
# For whatever names no live secret, from one address: two hundred, then one a second.
ADDRESS = Limit(200, 1)

_LOOK = sa.select(FailedSignIns.clear_at).where(FailedSignIns.key == bindparam("key"))
_NOW, _LATEST = bindparam("now", type_=Moment), bindparam("latest", type_=Moment)
_KEPT = FailedSignIns.clear_at.between(_NOW, _LATEST)
_PAUSE = bindparam("pause", type_=sa.BigInteger)  # seconds
_LATER = sa.type_coerce(FailedSignIns.clear_at, sa.BigInteger) + _PAUSE
# In one statement, so that none of those who fail at the same time goes uncounted.
_COUNT = (
    insert(FailedSignIns)
    .values(key=bindparam("key"), clear_at=bindparam("clear_at", type_=Moment))
    .on_conflict_do_update(
        index_elements=[FailedSignIns.key],
        set_={"clear_at": sa.case((_KEPT, _LATER), else_=bindparam("clear_at", type_=Moment))},
    )
)


class Guess:
    """A sign-in that may fail, from the caller's address at something.

    A wrong guess at a secret that is there, known by its hint, is counted apart from all others: who
    does not know the hint cannot lock out who does, not even from the same address.
    """

    def __init__(self, at: str, *, known: bool) -> None:
        address = _network(request.remote_addr or "")
        self._buckets = [(f"{address} {at}", SECRET)]
        if not known:
            self._buckets.append((address, ADDRESS))

    def refuse_if_throttled(self) -> None:
        """Before anything is hashed or compared.

        :raises Problem: 429, when too many before it were wrong.
        """
        moment = now()
        with reading() as connection:
            clear_at = [connection.scalar(_LOOK, {"key": key}) for key, _ in self._buckets]
        for stored, (_, limit) in zip(clear_at, self._buckets, strict=True):
            wait = _clear_at(stored, moment, limit) - moment - limit.window
            if wait >= timedelta(0):
                refuse(int(wait.total_seconds()) + 1)

    def failed(self) -> None:
        """Count it."""
        moment = now()
        with writing(durable=False, exclusive=False) as connection:
            for key, limit in self._buckets:
                clear_at = moment + timedelta(seconds=limit.seconds)
                values = {"now": moment, "latest": _latest(moment, limit), "pause": limit.seconds}
                connection.execute(_COUNT, {"key": key, "clear_at": clear_at, **values})


def refuse(seconds: int) -> NoReturn:
    """Tell the caller to come again.

    :raises Problem: 429 (RFC 6585 §4).
    """
    tally.count_failure("throttled")
    text = "Too many sign-ins have failed. Try again when Retry-After has passed."
    raise Problem(429, "too_many_requests", text, headers={"Retry-After": str(seconds)})


def _clear_at(stored: datetime | None, moment: datetime, limit: Limit) -> datetime:
    """When the last of the failures is forgotten; a time that a clock since set back wrote does not count."""
    clear_at = stored or moment
    return max(moment, clear_at) if clear_at <= _latest(moment, limit) else moment


def _latest(moment: datetime, limit: Limit) -> datetime:
    return moment + limit.window + timedelta(seconds=limit.seconds)


def _network(address: str) -> str:
    """The address, or the /64 that an IPv6 client has all of."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)
    if ip.version == 4 or mapped:
        return str(mapped or ip)
    return str(ipaddress.ip_network((ip, 64), strict=False))
