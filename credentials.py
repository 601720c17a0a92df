"""Make, hash and check secrets, and remember the ones already verified; knows no database."""

from __future__ import annotations

import hashlib
import hmac
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
from string import ascii_letters, digits
from typing import Any, NamedTuple

import bcrypt
from flask import Flask, current_app
from gevent import monkey, threadpool

_EXTENSION = "lanyard.secrets"

# cs_ + hint (8) + 256 random bits (43) + CRC-32 (6) = 60 bytes, under bcrypt's limit of 72.
_CLIENT_ID = re.compile(r"cid_[A-Za-z0-9_-]{22}")
_CLIENT_SECRET = re.compile(r"cs_([A-Za-z0-9_-]{8})[A-Za-z0-9_-]{43}([A-Za-z0-9_-]{6})")
# rt_ + the family's name (128 random bits, 22) + 256 random bits (43).
_REFRESH_TOKEN = re.compile(r"rt_([A-Za-z0-9_-]{22})[A-Za-z0-9_-]{43}")


def init_app(app: Flask, *, bcrypt_cost: int) -> None:
    """Give the app its checker of client secrets."""
    app.extensions[_EXTENSION] = SecretChecker(bcrypt_cost)


def checker() -> SecretChecker:
    """The running app's checker of client secrets."""
    found: SecretChecker = current_app.extensions[_EXTENSION]
    return found


class NewSecret(NamedTuple):
    """A client secret just made: its text, the public hint in it that names its row, its hash."""

    text: str
    hint: str
    hash: bytes


def new_client_id() -> str:
    """A client id: `cid_` and 128 random bits."""
    return "cid_" + secrets.token_urlsafe(16)


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


def new_event_id() -> str:
    """An event's id: `evt_` and 128 random bits."""
    return "evt_" + secrets.token_urlsafe(16)


def new_request_id() -> str:
    """A request's id: `req_` and 128 random bits."""
    return "req_" + secrets.token_urlsafe(16)


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


def _native_thread() -> Executor:
    """Return an executor of one native thread, also where gevent makes greenlets of Python's threads."""
    is_patched = monkey.is_module_patched("threading")
    return threadpool.ThreadPoolExecutor(1) if is_patched else ThreadPoolExecutor(1, "bcrypt")


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
        # One hash at a time: bcrypt takes tens of milliseconds of a core.
        self._thread = _native_thread()
        # A hash nothing matches, checked for unknown clients so that they cost what known ones do.
        self._decoy = bcrypt.gensalt(cost) + b"." * 31

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
