"""Secrets: make, verify and compare them; throttle sign-ins that fail."""

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
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from string import ascii_letters, digits
from typing import Any, NamedTuple

import bcrypt
import sqlalchemy as sa
from flask import request
from gevent import monkey, threadpool
from joserfc.errors import UnsupportedAlgorithmError, UnsupportedHeaderError
from joserfc.jws import JWSRegistry
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # compiles for SQLite too

from api import Problem
from config import settings, state
from database import reading, writing
from models import FailedSignIns, RateSecond, Timestamp, new_id, now

# cs_ + hint (8) + 256 random bits (43) + CRC-32 (6) = 60 bytes, under bcrypt's limit of 72.
_CLIENT_ID = re.compile(r"cid_[A-Za-z0-9_-]{22}")
_CLIENT_SECRET = re.compile(r"cs_([A-Za-z0-9_-]{8})[A-Za-z0-9_-]{43}([A-Za-z0-9_-]{6})")
# rt_ + the id of the family (128 random bits, 22) + 256 random bits (43).
_REFRESH_TOKEN = re.compile(r"rt_([A-Za-z0-9_-]{22})[A-Za-z0-9_-]{43}")
# Verified secrets that a process remembers, by digests with its own key.
VERIFIED_CACHE_SIZE = 16_384
_KEY = secrets.token_bytes(32)
MINUTE = timedelta(minutes=1)


class NewSecret(NamedTuple):
    """A new client secret: text, the public hint in the text (a database key), bcrypt hash."""

    text: str
    hint: str
    hash: bytes


class Throttled(Problem):
    """429 (RFC 6585 §4): too many sign-ins have failed, or too many secrets wait to be verified."""

    reason = "throttled"

    def __init__(self, seconds: int) -> None:
        text = "Too many sign-ins have failed. Try again when Retry-After has passed."
        super().__init__(429, "too_many_requests", text, headers={"Retry-After": str(seconds)})


class Algorithms(JWSRegistry):
    """The JWS algorithms that are accepted, named one by one (RFC 8725 §3.1).

    joserfc's own registry warns at every use of the name EdDSA, which JWT libraries still expect.
    """

    def get_alg(self, name: str) -> Any:
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError(f"Algorithm of {name!r} is not allowed")
        return self.algorithms[name]

    def check_header(self, header: Any) -> None:
        """Refuse every `crit` (RFC 7515 §4.1.11): no extension is known here."""
        if "crit" in header:
            raise UnsupportedHeaderError("No critical extension is known here")
        super().check_header(header)


def new_client_id() -> str:
    """Return a client id: `cid_` and 128 random bits."""
    return new_id("cid_")


def is_client_id(text: str) -> bool:
    """Whether the text has the form of a client id."""
    return _CLIENT_ID.fullmatch(text) is not None


def new_jti(family_id: str) -> str:
    """Return a token id (RFC 7519 §4.1.7): the grant id of the family, a dot, 128 random bits."""
    return f"{grant_id(family_id)}.{secrets.token_urlsafe(16)}"


def grant_id(family_id: str) -> str:
    """Return the public id of a family. The family id itself would let any service end the family."""
    return urlsafe_b64encode(digest(family_id)[:12]).decode()


def new_webhook_secret() -> str:
    """Return a Standard Webhooks secret: `whsec_` and the base64 of 33 random bytes, letters and digits."""
    return "whsec_" + "".join(secrets.choice(ascii_letters + digits) for _ in range(44))


def new_family_id() -> str:
    """Return an id for a family of refresh tokens: 128 random bits."""
    return secrets.token_urlsafe(16)


def new_refresh_token(family_id: str) -> str:
    """Return a refresh token of the family: `rt_`, the family id, 256 random bits."""
    return f"rt_{family_id}{secrets.token_urlsafe(32)}"


def refresh_token_family(text: str) -> str | None:
    """Return the family id in a well-formed refresh token, or None."""
    match = _REFRESH_TOKEN.fullmatch(text)
    return match[1] if match else None


def digest(text: str) -> bytes:
    """Return the SHA-256 of a refresh token, to store: a slow hash is for fewer than 256 random bits."""
    return hashlib.sha256(text.encode()).digest()


def same(one: str, other: str) -> bool:
    """Whether two secrets are equal, in constant time whatever their lengths."""
    return hmac.compare_digest(digest(one), digest(other))


def new_client_secret(bcrypt_cost: int) -> NewSecret:
    """Return a client secret: `cs_`, an 8-character hint, 256 random bits and a checksum; 60 bytes."""
    hint = secrets.token_urlsafe(6)
    body = f"cs_{hint}{secrets.token_urlsafe(32)}"
    text = body + _checksum(body)
    return NewSecret(text, hint, _run_bcrypt(bcrypt.hashpw, text.encode(), bcrypt.gensalt(bcrypt_cost)))


def client_secret_hint(text: str) -> str | None:
    """Return the hint in a well-formed client secret, or None."""
    match = _CLIENT_SECRET.fullmatch(text)
    return match[1] if match and match[2] == _checksum(text[:-6]) else None


def verify(secret: str, stored: bytes | None, client_id: str) -> bool:
    """Whether a client secret matches the stored hash.

    bcrypt takes tens of milliseconds, so each process remembers which secrets matched. The caller reads
    the hash from the database at every request: a rotated secret is refused at once in every worker.

    :param stored: None when the client has no such secret, which takes as long as a wrong one.
    :raises Throttled: when too many sign-ins have failed.
    """
    remembered = state().verified_secrets
    keyed = hashlib.blake2b(secret.encode(), key=_KEY, digest_size=32).digest()
    if stored and hmac.compare_digest(remembered.get(stored, b""), keyed):
        return True
    name = client_id if is_client_id(client_id) else "-"
    hint = client_secret_hint(secret)
    if not stored:
        # A malformed secret matches nothing: refuse it without bcrypt.
        return throttle(lambda: hint is not None and _matches(secret, None), name, known=False)
    # One at a time for each secret and address, so that the failures before are counted, and so that many
    # wrong secrets delay nobody else.
    with _turns[hash((stored, _address())) % len(_turns)]:
        if hmac.compare_digest(remembered.get(stored, b""), keyed):
            return True
        is_right = throttle(lambda: _matches(secret, stored), f"{name} {hint}", known=True)
        if is_right:  # a failure is never remembered
            remembered[stored] = keyed
            if len(remembered) > VERIFIED_CACHE_SIZE:
                remembered.popitem(last=False)
    return is_right


def _matches(secret: str, stored: bytes | None) -> bool:
    if not _bcrypt_lock.acquire(blocking=stored is not None):
        raise Throttled(1)  # others wait, and this secret matches nothing
    try:
        # The second hash matches nothing; with it an unknown client costs what a known one does.
        hashed = stored or bcrypt.gensalt(settings().bcrypt_cost) + b"." * 31
        matches: bool = _run_bcrypt(bcrypt.checkpw, secret.encode(), hashed)
    finally:
        _bcrypt_lock.release()
    return matches and stored is not None


_turns = [threading.Lock() for _ in range(256)]
_bcrypt_lock = threading.Lock()  # one hash at a time: bcrypt takes tens of milliseconds of a core


@cache  # not made before a worker is forked: gevent's pools drop what is queued when they notice the fork
def _bcrypt_executor() -> Executor:
    """Return one native thread, also where gevent makes greenlets of Python's threads."""
    is_patched = monkey.is_module_patched("threading")
    return threadpool.ThreadPoolExecutor(1) if is_patched else ThreadPoolExecutor(1, "bcrypt")


def _run_bcrypt(work: Callable[[bytes, bytes], Any], *arguments: bytes) -> Any:
    """Run bcrypt so that the kernel prefers all other threads: most requests need no bcrypt."""

    def run() -> Any:
        with suppress(OSError):  # only Linux has priorities for threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        return work(*arguments)

    return _bcrypt_executor().submit(run).result()


def _checksum(body: str) -> str:
    return urlsafe_b64encode(zlib.crc32(body.encode()).to_bytes(4, "big")).decode().rstrip("=")


class Limit(NamedTuple):
    """The number of failures allowed at once, and the time after which each is forgotten."""

    failures: int
    pause: timedelta

    @property
    def most(self) -> timedelta:
        """How far ahead of the clock failures may set `clear_at`, however many are counted together."""
        return (self.failures + 1) * self.pause


# For one client secret, or the admin token, from one address: fifty, then ten a minute.
SECRET = Limit(50, timedelta(seconds=6))
# For everything that names no valid secret, from one address: two hundred, then one a second.
ADDRESS = Limit(200, timedelta(seconds=1))

_NOW, _FIRST, _MOST = (bindparam(name, type_=Timestamp) for name in ("now", "first", "most"))
_READ = sa.select(FailedSignIns.clear_at).where(FailedSignIns.key == bindparam("key"))
_CAP = sa.update(FailedSignIns).where(FailedSignIns.key == bindparam("of")).values(clear_at=_MOST)
_NEXT = sa.type_coerce(FailedSignIns.clear_at, sa.BigInteger) + bindparam("pause", type_=sa.BigInteger)
_LATER = sa.case((FailedSignIns.clear_at < _NOW, _FIRST), (_NEXT > _MOST, _MOST), else_=_NEXT)
# In one statement, so that failures at the same time are all counted.
_COUNT = (
    insert(FailedSignIns)
    .values(key=bindparam("key"), clear_at=_FIRST)
    .on_conflict_do_update(index_elements=[FailedSignIns.key], set_={"clear_at": _LATER})
)


def throttle(check: Callable[[], bool], name: str, *, known: bool) -> bool:
    """Return the result of a check of credentials; count it by the caller's address when it fails.

    Failures at a known secret count apart from all others: a caller who does not know its hint cannot
    lock out one who does, not even from the same address.

    :param name: the credentials to check.
    :raises Throttled: before the check, when too many have failed.
    """
    address = _address()
    buckets = {f"{address} {name}": SECRET} | ({} if known else {address: ADDRESS})
    excess = (
        max(_clear_at(key, limit) - limit.failures * limit.pause for key, limit in buckets.items()) - now()
    )
    if excess >= timedelta(0):
        raise Throttled(int(excess.total_seconds()) + 1)
    if check():
        return True
    moment = now()
    with writing(durable=False, exclusive=False) as connection:
        for key, limit in buckets.items():
            times = {"now": moment, "first": moment + limit.pause, "most": moment + limit.most}
            connection.execute(_COUNT, {"key": key, "pause": limit.pause.seconds, **times})
    return False


def _clear_at(key: str, limit: Limit) -> datetime:
    """Return when the failures in a bucket are forgotten; before now if there are none."""
    with reading() as connection:
        clear_at: datetime = connection.scalar(_READ, {"key": key}) or now()
    # Another process may have read the clock a little later.
    if clear_at <= now() + limit.most + limit.pause:
        return clear_at
    # The clock was set back: without a cap, one failure would count for as long as that. One attempt is left.
    capped = now() + (limit.failures - 1) * limit.pause
    with writing(durable=False, exclusive=False) as connection:
        connection.execute(_CAP, {"of": key, "most": capped})
    return capped


_RECENT = (
    sa.select(RateSecond.second, RateSecond.count)
    .where(
        RateSecond.agent_pk == bindparam("agent"),
        RateSecond.second.between(bindparam("since", type_=Timestamp), bindparam("until", type_=Timestamp)),
    )
    .order_by(RateSecond.second.desc())
)
_FORGET = sa.delete(RateSecond).where(
    RateSecond.agent_pk == bindparam("agent"), RateSecond.second < bindparam("since", type_=Timestamp)
)
_COUNT_IN_SECOND = (
    insert(RateSecond)
    .values(agent_pk=bindparam("agent"), second=bindparam("second", type_=Timestamp), count=1)
    .on_conflict_do_update(
        index_elements=(RateSecond.agent_pk, RateSecond.second), set_={"count": RateSecond.count + 1}
    )
)


def refuse_over_limit(connection: sa.Connection, agent: Any) -> None:
    """Refuse an agent that has used up its rate limit.

    :raises Problem: 429.
    """
    if agent.rate_limit is None:
        return
    moment = now()
    # A little of the future: another process may have read the clock later. More was written before the
    # clock was set back.
    window = {"agent": agent.pk, "since": moment - MINUTE, "until": moment + MINUTE}
    left = agent.rate_limit
    for second, count in connection.execute(_RECENT, window):
        left -= count
        if left <= 0:
            # A window of 60 seconds overlaps 61 of the counted seconds.
            wait = second + MINUTE - moment + timedelta(seconds=1)
            text = f"This agent may have {agent.rate_limit} tokens and rotations a minute."
            raise too_many_requests(text, wait)


def count_against_limit(connection: sa.Connection, agent: Any) -> None:
    """Count a token or a rotation. The caller's transaction has changed the agent's row, which locks it.

    :raises Problem: 429, when the agent has used up its rate limit.
    """
    if agent.rate_limit is not None:
        refuse_over_limit(connection, agent)
        connection.execute(_FORGET, {"agent": agent.pk, "since": now() - MINUTE})
        connection.execute(_COUNT_IN_SECOND, {"agent": agent.pk, "second": now()})


def too_many_requests(text: str, wait: timedelta) -> Problem:
    """Return a refusal (RFC 6585 §4) that names the time to wait."""
    seconds = max(1, int(wait.total_seconds()))
    return Problem(429, "too_many_requests", text, headers={"Retry-After": str(seconds)})


def _address() -> str:
    """Return the caller's address as sign-ins are counted by it."""
    return str(_network(request.remote_addr or ""))


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address, without a zone and as IPv4 if it is mapped into IPv6; None for other text."""
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def _network(text: str) -> object:
    """Return the address, or the /64 of an IPv6 address, all of which one client has."""
    ip = parse_address(text)
    return ipaddress.ip_network((ip, 64), strict=False) if ip and ip.version == 6 else ip or text
