"""Signing keys: made at the first start, kept in the database, published, rotated without a gap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from flask import current_app
from joserfc.errors import InvalidKeyIdError, UnsupportedAlgorithmError
from joserfc.jwk import ECKey, GuestProtocol, Key, KeySet, OKPKey, RSAKey, import_key
from joserfc.jws import JWSRegistry

import clock
import events
import vault
from config import DAY, settings
from models import SigningKey, db
from prepared import Prepared

_EXTENSION = "lanyard.keys"

JWKS_MAX_AGE = 300  # seconds a verifier may keep the key set
# A new key signs when every cache that could lack it has expired; a minute is for clocks and slow answers.
LEAD = JWKS_MAX_AGE + 60
LONGEST_TOKEN = DAY

# Selected with whatever is read before signing: it tells whether this worker has seen the newest key.
NEWEST_KEY = sa.select(sa.func.max(SigningKey.pk)).scalar_subquery()
_NEWEST_KEY = Prepared(sa.select(NEWEST_KEY.label("newest")))


NEWEST_FIRST = sa.select(SigningKey.__table__).order_by(SigningKey.pk.desc())


class Algorithms(JWSRegistry):
    """The signature algorithms let through, named one by one (RFC 8725 §3.1).

    joserfc's own registry warns at every use of EdDSA's old name, which JWT libraries still expect.
    """

    def get_alg(self, name: str) -> Any:
        """joserfc's hook."""
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError(f"Algorithm of {name!r} is not allowed")
        return self.algorithms[name]


SIGNING_ALGORITHMS = Algorithms(algorithms=("RS256", "ES256", "EdDSA"))


class HeldKey(NamedTuple):
    """A key as a process has read and parsed it: parsing one costs more than a signature."""

    key: Key
    public: str  # the public half, as JSON
    signs_from: datetime
    gone_at: datetime | None


@dataclass
class Keyring:
    """The keys that a process holds, oldest first."""

    held: list[HeldKey]
    newest: int

    def alive(self, now: datetime) -> list[HeldKey]:
        """The keys that are not gone."""
        return [held for held in self.held if held.gone_at is None or held.gone_at > now]


def ensure_signing_key(*, follow_setting: bool) -> None:
    """Make the first key; in the caller's transaction.

    :param follow_setting: make the next key, too, when the newest is not of the configured algorithm.
    """
    alg = _newest_alg()
    if alg is None:
        _add_key(settings().signing_alg, clock.now())
    elif follow_setting and alg != settings().signing_alg:
        rotate(settings().signing_alg)


def rotate(alg: str | None = None, *, at_once: bool = False) -> None:
    """Publish a new key, which signs when every verifier knows it; in the caller's transaction.

    :param alg: its algorithm; that of the newest key unless given.
    :param at_once: it signs now, and all others are gone with every token they signed: for a leak.
    """
    alg = alg or _newest_alg() or settings().signing_alg
    signs_from = clock.now() if at_once else clock.now() + timedelta(seconds=LEAD)
    if at_once:
        db.session.execute(sa.delete(SigningKey))
    else:
        # The others stay until the last token that one of them may sign has expired.
        gone_at = signs_from + timedelta(seconds=LONGEST_TOKEN)
        db.session.execute(sa.update(SigningKey).where(SigningKey.gone_at.is_(None)).values(gone_at=gone_at))
    kid = _add_key(alg, signs_from)
    events.record("key.rotated", kid=kid, alg=alg, at_once=at_once)


class ListedKey(NamedTuple):
    """A key and where it is in its life: `published`, `signing`, `retired` or `gone`."""

    kid: str
    alg: str
    state: str
    created_at: datetime
    signs_from: datetime
    gone_at: datetime | None


def list_keys() -> list[ListedKey]:
    """Every key, newest first."""
    return lives(db.session.execute(NEWEST_FIRST).all())


def lives(rows: Sequence[Any]) -> list[ListedKey]:
    """Where each key is in its life; `rows` as NEWEST_FIRST finds them."""
    now = clock.now()
    signing = next((row.pk for row in rows if row.signs_from <= now), rows[-1].pk if rows else None)
    return [
        ListedKey(row.kid, row.alg, _state(row, now, signing), row.created_at, row.signs_from, row.gone_at)
        for row in rows
    ]


def _state(row: Any, now: datetime, signing: int | None) -> str:
    if row.gone_at is not None and row.gone_at <= now:
        return "gone"
    if row.pk == signing:
        return "signing"
    return "published" if row.signs_from > now else "retired"


def signing_key(newest: int) -> Key:
    """The key that signs now.

    :param newest: what NEWEST_KEY was in this request's own read of the database.
    """
    now = clock.now()
    ring = _keyring(newest)
    signing = [held.key for held in ring.held if held.signs_from <= now]
    # None signs yet when the clock was set back: then the oldest goes on.
    return signing[-1] if signing else ring.held[0].key


def find_key(signature: GuestProtocol) -> KeySet:
    """The key that a token names by its `kid`, for joserfc to verify with.

    :raises InvalidKeyIdError: when it is none of ours, or gone.
    """
    kid = signature.headers().get("kid")
    for ring in (_keyring, _read_keys):
        found = [held.key for held in ring().alive(clock.now()) if held.key.kid == kid]
        if found:
            return KeySet(found)
    raise InvalidKeyIdError("No key has this kid.")


def published() -> tuple[str, ...]:
    """The public halves of all keys that are not gone, as JSON."""
    ring = _keyring(_NEWEST_KEY.first().newest or 0)
    return tuple(held.public for held in ring.alive(clock.now()))


def _newest_alg() -> str | None:
    return db.session.scalar(sa.select(SigningKey.alg).order_by(SigningKey.pk.desc()).limit(1))


def _keyring(newest: int | None = None) -> Keyring:
    """The keys as this process knows them, read again unless the newest of them is `newest`, if given."""
    ring: Keyring | None = current_app.extensions.get(_EXTENSION)
    return ring if ring and newest in (None, ring.newest) else _read_keys()


def _read_keys() -> Keyring:
    # Plain rows: objects of the session would not outlive it.
    rows = db.session.execute(sa.select(SigningKey.__table__).order_by(SigningKey.pk)).all()
    old: Keyring | None = current_app.extensions.get(_EXTENSION)
    parsed = {held.key.kid: held.key for held in old.held} if old else {}
    held = [_hold(row, parsed.get(row.kid) or _parse(row)) for row in rows]
    ring = current_app.extensions[_EXTENSION] = Keyring(held, max((row.pk for row in rows), default=0))
    return ring


def _hold(row: sa.Row[Any], key: Key) -> HeldKey:
    return HeldKey(key, json.dumps(key.as_dict(private=False)), row.signs_from, row.gone_at)


def _parse(row: sa.Row[Any]) -> Key:
    return import_key(
        json.loads(vault.unseal(row.jwk)), parameters={"kid": row.kid, "alg": row.alg, "use": "sig"}
    )


def _add_key(alg: str, signs_from: datetime) -> str:
    key = _generate(alg)
    # RFC 7638: the thumbprint names the key the same way everywhere.
    kid = key.thumbprint()
    jwk = vault.seal(json.dumps(key.as_dict(private=True)))
    db.session.add(SigningKey(kid=kid, alg=alg, jwk=jwk, created_at=clock.now(), signs_from=signs_from))
    db.session.flush()
    return kid


def _generate(alg: str) -> Key:
    if alg == "ES256":
        return ECKey.generate_key("P-256")
    if alg == "EdDSA":
        return OKPKey.generate_key("Ed25519")
    return RSAKey.generate_key(2048)
