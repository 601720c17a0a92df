"""Signing keys: make, publish, use and rotate them; the JWKS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from joserfc.errors import InvalidKeyIdError
from joserfc.jwk import ECKey, GuestProtocol, Key, KeySet, OKPKey, RSAKey, import_key

import credentials
import events
import schemas
from api import BY_OPERATOR, Blueprint
from config import DAY, settings, state
from database import reading, writing
from models import NEWEST_KEY, SigningKey, now

JWKS_MAX_AGE = 300  # seconds a verifier may keep the key set
# A new key signs when every cached JWKS without it has expired; a minute more is for slow responses.
LEAD = JWKS_MAX_AGE + 60
LONGEST_TOKEN = DAY

NEWEST_FIRST = sa.select(
    SigningKey.pk,
    SigningKey.kid,
    SigningKey.alg,
    SigningKey.created_at,
    SigningKey.signs_from,
    SigningKey.gone_at,
).order_by(SigningKey.pk.desc())


SIGNING_ALGORITHMS = credentials.Algorithms(algorithms=("RS256", "ES256", "EdDSA"))


class ParsedKey(NamedTuple):
    """A key as a process has read and parsed it: parsing costs more than a signature."""

    key: Key
    public: str  # the public half, as JSON
    signs_from: datetime
    gone_at: datetime | None


@dataclass
class Keyring:
    """The keys that a process has read, oldest first."""

    keys: list[ParsedKey]
    newest: int

    def alive(self, moment: datetime) -> list[ParsedKey]:
        """Return the keys that are not gone."""
        return [held for held in self.keys if held.gone_at is None or held.gone_at > moment]


def ensure_signing_key(connection: sa.Connection, *, follow_setting: bool) -> None:
    """Make the first key.

    :param follow_setting: make the next key, too, when the newest is not of the configured algorithm.
    """
    alg = _newest_alg(connection)
    if alg is None:
        _add_key(connection, settings().signing_alg, now())
    elif follow_setting and alg != settings().signing_alg:
        rotate(connection, settings().signing_alg)


def rotate(connection: sa.Connection, alg: str | None = None, *, at_once: bool = False) -> None:
    """Publish a new key, which signs when every verifier knows it.

    :param alg: its algorithm; that of the newest key unless given.
    :param at_once: it signs now, and all others are gone with every token they signed: for a leak.
    """
    alg = alg or _newest_alg(connection) or settings().signing_alg
    signs_from = now() if at_once else now() + timedelta(seconds=LEAD)
    if at_once:
        connection.execute(sa.delete(SigningKey))
    else:
        # The others stay until the last token that one of them may sign has expired.
        gone_at = signs_from + timedelta(seconds=LONGEST_TOKEN)
        connection.execute(sa.update(SigningKey).where(SigningKey.gone_at.is_(None)).values(gone_at=gone_at))
    kid = _add_key(connection, alg, signs_from)
    events.record(connection, "key.rotated", kid=kid, alg=alg, at_once=at_once)


class ListedKey(NamedTuple):
    """A key and its state: `published`, `signing`, `retired` or `gone`."""

    kid: str
    alg: str
    state: str
    created_at: datetime
    signs_from: datetime
    gone_at: datetime | None


def list_keys(connection: sa.Connection) -> list[ListedKey]:
    """Return every key, newest first."""
    return states(connection.execute(NEWEST_FIRST).all())


def states(rows: Sequence[Any]) -> list[ListedKey]:
    """Return the keys with their states; `rows` as NEWEST_FIRST selects them."""
    moment = now()
    signing = next((row.pk for row in rows if row.signs_from <= moment), rows[-1].pk if rows else None)
    return [
        ListedKey(row.kid, row.alg, _state(row, moment, signing), row.created_at, row.signs_from, row.gone_at)
        for row in rows
    ]


def _state(row: Any, moment: datetime, signing: int | None) -> str:
    if row.gone_at is not None and row.gone_at <= moment:
        return "gone"
    if row.pk == signing:
        return "signing"
    return "published" if row.signs_from > moment else "retired"


def signing_key(newest: int) -> Key:
    """Return the key that signs now.

    :param newest: NEWEST_KEY as this request read it.
    """
    ring = _keyring(newest)
    signing = [held.key for held in ring.keys if held.signs_from <= now()]
    # After the clock was set back none may sign yet: then the oldest does.
    return signing[-1] if signing else ring.keys[0].key


def find_key(signature: GuestProtocol) -> KeySet:
    """Return the key that a token names by its `kid`, for joserfc to verify with.

    :raises InvalidKeyIdError: when there is no such key, or it is gone.
    """
    kid = signature.headers().get("kid")
    for ring in (_keyring, _read_keys):
        found = [held.key for held in ring().alive(now()) if held.key.kid == kid]
        if found:
            return KeySet(found)
    raise InvalidKeyIdError("No key has this kid.")


def published() -> bytes:
    """Return the JWKS: the public halves of all keys that are not gone (RFC 7517 §5)."""
    with reading() as connection:
        newest = connection.scalar(sa.select(NEWEST_KEY))
    ring = _keyring(newest or 0)
    return f'{{"keys": [{", ".join(key.public for key in ring.alive(now()))}]}}'.encode()


def _newest_alg(connection: sa.Connection) -> str | None:
    return connection.scalar(sa.select(SigningKey.alg).order_by(SigningKey.pk.desc()).limit(1))


def _keyring(newest: int | None = None) -> Keyring:
    """Return the keys that this process knows, read again when the newest is not `newest`, if given."""
    ring = state().keyring
    return ring if ring and newest in (None, ring.newest) else _read_keys()


def _read_keys() -> Keyring:
    with reading() as connection:
        rows = connection.execute(sa.select(SigningKey).order_by(SigningKey.pk)).all()
    old = state().keyring
    parsed = {held.key.kid: held.key for held in old.keys} if old else {}
    held = [_hold(row, parsed.get(row.kid) or _parse(row)) for row in rows]
    ring = state().keyring = Keyring(held, max((row.pk for row in rows), default=0))
    return ring


def _hold(row: sa.Row[Any], key: Key) -> ParsedKey:
    return ParsedKey(key, json.dumps(key.as_dict(private=False)), row.signs_from, row.gone_at)


def _parse(row: sa.Row[Any]) -> Key:
    return import_key(json.loads(row.jwk), parameters={"kid": row.kid, "alg": row.alg, "use": "sig"})


def _add_key(connection: sa.Connection, alg: str, signs_from: datetime) -> str:
    key = _generate(alg)
    # RFC 7638: the thumbprint names the key the same way everywhere.
    kid = key.thumbprint()
    row = {"kid": kid, "alg": alg, "jwk": json.dumps(key.as_dict(private=True))}
    connection.execute(sa.insert(SigningKey), {**row, "created_at": now(), "signs_from": signs_from})
    return kid


def _generate(alg: str) -> Key:
    if alg == "ES256":
        return ECKey.generate_key("P-256")
    if alg == "EdDSA":
        return OKPKey.generate_key("Ed25519")
    return RSAKey.generate_key(2048)


bp = Blueprint(
    "keys", __name__, url_prefix="/api/keys", description="Signing keys (management)", security=BY_OPERATOR
)


@bp.get("")
@bp.response(200, schemas.KeyList)
def list_signing_keys() -> dict[str, Any]:
    """List the signing keys, newest first."""
    with reading() as connection:
        return {"keys": list_keys(connection)}


@bp.post("/rotate")
@bp.arguments(schemas.KeyRotation)
@bp.response(200, schemas.KeyResponse)
def rotate_key(fields: dict[str, Any]) -> dict[str, Any]:
    """Make a new signing key.

    It is published first and signs when every verifier can know it. With `now` it signs at once.
    """
    with writing() as connection:
        rotate(connection, at_once=fields["now"])
        return {"key": list_keys(connection)[0]}
