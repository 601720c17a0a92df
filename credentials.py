"""Secrets: make, hash, check and remember them; throttle failed guesses."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import threading
import zlib
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cached_property
from string import ascii_letters, digits
from typing import Any, NamedTuple, NoReturn

import bcrypt
import sqlalchemy as sa
from flask import Flask, request
from gevent import monkey, threadpool
from joserfc.errors import UnsupportedAlgorithmError
from joserfc.jws import JWSRegistry
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # SQLite's compiler knows it too

import counters
from api import Problem
from config import state
from database import reading, writing
from models import FailedSignIns, Moment, new_id, now

# cs_ + hint (8) + 256 random bits (43) + CRC-32 (6) = 60 bytes, under bcrypt's limit of 72.
_CLIENT_ID = re.compile(r"cid_[A-Za-z0-9_-]{22}")
_CLIENT_SECRET = re.compile(r"cs_([A-Za-z0-9_-]{8})[A-Za-z0-9_-]{43}([A-Za-z0-9_-]{6})")
# rt_ + the family's name (128 random bits, 22) + 256 random bits (43).
_REFRESH_TOKEN = re.compile(r"rt_([A-Za-z0-9_-]{22})[A-Za-z0-9_-]{43}")


def init_app(app: Flask, *, bcrypt_cost: int) -> None:
    """Give the app its checker of client secrets."""
    state(app).client_secrets = SecretChecker(bcrypt_cost)


def checker() -> SecretChecker:
    """The running app's checker of client secrets."""
    return state().client_secrets


class NewSecret(NamedTuple):
    """A client secret just made: its text, the public hint in it that names its row, its hash."""

    text: str
    hint: str
    hash: bytes


class Algorithms(JWSRegistry):
    """The JWS algorithms that are accepted, named one by one (RFC 8725 §3.1).

    joserfc's own registry warns at every use of the name EdDSA, which JWT libraries still expect.
    """

    def get_alg(self, name: str) -> Any:
        """Return the algorithm, or refuse it."""
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError(f"Algorithm of {name!r} is not allowed")
        return self.algorithms[name]


def new_client_id() -> str:
    """A client id: `cid_` and 128 random bits."""
    return new_id("cid_")


def is_client_id(text: str) -> bool:
    """Whether the text is shaped like a client id."""
    return _CLIENT_ID.fullmatch(text) is not None


def begins_client_id(text: str) -> bool:
    """Whether the text can be the start of one client id rather than of all: four random characters tell."""
    return len(text) >= 8 and text.startswith("cid_")


def new_jti(family_id: str) -> str:
    """A token id, RFC 7519 §4.1.7: what all access tokens of a family share, a dot, 128 random bits."""
    return f"{grant_id(family_id)}.{secrets.token_urlsafe(16)}"


def grant_id(family_id: str) -> str:
    """What access tokens may show of their family: its id itself would let a service end it."""
    return urlsafe_b64encode(digest(family_id)[:12]).decode()


def new_webhook_secret() -> str:
    """A Standard Webhooks secret: `whsec_` and 44 letters and digits, the base64 of 33 random bytes."""
    return "whsec_" + "".join(secrets.choice(ascii_letters + digits) for _ in range(44))


def new_admin_token() -> str:
    """An operator's token: 256 random bits."""
    return secrets.token_urlsafe(32)


def client_secret_hint(text: str) -> str | None:
    """The hint of a well-formed client secret, or None: a malformed one is not worth a hash."""
    match = _CLIENT_SECRET.fullmatch(text)
    if match is None or match[2] != _checksum(text[:-6]):
        return None
    return match[1]


def new_family_id() -> str:
    """The name of a family of refresh tokens: 128 random bits."""
    return secrets.token_urlsafe(16)


def new_refresh_token(family_id: str) -> str:
    """A refresh token of the family named: 256 random bits of its own."""
    return f"rt_{family_id}{secrets.token_urlsafe(32)}"


def refresh_token_family(text: str) -> str | None:
    """The id of the family a well-formed refresh token belongs to, or None."""
    match = _REFRESH_TOKEN.fullmatch(text)
    return match[1] if match else None


def digest(text: str) -> bytes:
    """What is stored of a refresh token: it is 256 random bits, so a plain SHA-256 guards it."""
    return hashlib.sha256(text.encode()).digest()


def same(one: str, other: str) -> bool:
    """Whether two secrets are equal, in constant time whatever their lengths."""
    return hmac.compare_digest(digest(one), digest(other))


def _at_low_priority(work: Callable[..., Any], *arguments: bytes) -> Any:
    """Run bcrypt so that the kernel prefers all other threads: most requests need no bcrypt."""
    with suppress(OSError):  # only Linux has priorities for threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    return work(*arguments)


def _checksum(body: str) -> str:
    return urlsafe_b64encode(zlib.crc32(body.encode()).to_bytes(4, "big")).decode().rstrip("=")


class Busy(Exception):
    """Too many secrets wait to be checked for one that cannot be right to wait too."""


class SecretChecker:
    """Hashes client secrets with bcrypt and remembers, in this process, which ones matched.

    bcrypt takes tens of milliseconds, so a secret that matched a stored hash once is known again by
    a keyed digest of it. The caller reads the stored hash from the database at every request: a
    hash that is gone cannot be asked about, so a rotated secret is dead at once in every worker.
    Failures are never remembered.
    """

    def __init__(self, cost: int, size: int = 16_384) -> None:
        self._cost = cost
        self._size = size
        self._key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        # A hash nothing matches, checked for unknown clients so that they cost what known ones do.
        self._decoy = bcrypt.gensalt(cost) + b"." * 31

    @cached_property
    def _thread(self) -> Executor:
        """One native thread for all hashes, each of which takes tens of milliseconds of a core.

        Not made before a worker is forked: gevent's pools drop what is queued when they notice the fork.
        """
        is_patched = monkey.is_module_patched("threading")
        return threadpool.ThreadPoolExecutor(1) if is_patched else ThreadPoolExecutor(1, "bcrypt")

    def make(self) -> NewSecret:
        """A client secret: `cs_`, an 8-character hint, 256 random bits and a checksum; 60 bytes."""
        hint = secrets.token_urlsafe(6)
        body = f"cs_{hint}{secrets.token_urlsafe(32)}"
        text = body + _checksum(body)
        salt = bcrypt.gensalt(self._cost)
        hashed = self._thread.submit(_at_low_priority, bcrypt.hashpw, text.encode(), salt).result()
        return NewSecret(text, hint, hashed)

    def remembers(self, secret: str, stored: bytes | None) -> bool:
        """Whether `secret` matched the hash `stored` before, in this process."""
        if stored is None:
            return False
        with self._lock:
            known = self._verified.get(stored)
        return known is not None and hmac.compare_digest(known, self._keyed(secret))

    def check(self, secret: str, stored: bytes | None) -> bool:
        """Whether `secret` is the one hashed as `stored`; None (no such row) takes as long as a wrong one.

        :raises Busy: when there is no such row, and others wait: this one cannot be right.
        """
        if not self._turn.acquire(blocking=stored is not None):
            raise Busy
        try:
            hashed = stored or self._decoy
            running = self._thread.submit(_at_low_priority, bcrypt.checkpw, secret.encode(), hashed)
            matches: bool = running.result()
        finally:
            self._turn.release()
        if matches and stored is not None:
            self._remember(stored, self._keyed(secret))
        return matches and stored is not None

    def _keyed(self, secret: str) -> bytes:
        return hashlib.blake2b(secret.encode(), key=self._key, digest_size=32).digest()

    def _remember(self, stored: bytes, keyed: bytes) -> None:
        with self._lock:
            self._verified[stored] = keyed
            while len(self._verified) > self._size:
                self._verified.popitem(last=False)


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
    counters.count_failure("throttled")
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
