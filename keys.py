"""Signing keys: make, publish, rotate, sign and verify with them; the JWKS; `/api/keys`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError
from joserfc.jwk import ECKey, GuestProtocol, Key, KeySet, OKPKey, RSAKey, import_key

import credentials
import events
import schemas
from api import BY_OPERATOR, Blueprint
from config import DAY, settings, state
from database import reading, writing
from models import NEWEST_KEY, SigningKey, Timestamp, now

JWKS_MAX_AGE = 300  # seconds
# A new key signs when every cached JWKS without it has expired, and a minute later for slow responses.
LEAD = JWKS_MAX_AGE + 60  # seconds
LONGEST_TOKEN = DAY

_NOW = sa.bindparam("now", type_=Timestamp)
_SIGNS = sa.select(sa.func.max(SigningKey.pk)).where(SigningKey.signs_from <= _NOW).correlate(None)
_OLDEST = sa.select(sa.func.min(SigningKey.pk)).correlate(None)
_STATE = sa.case(
    (SigningKey.gone_at <= _NOW, "gone"),
    # After the clock was set back none may sign yet: then the oldest does.
    (SigningKey.pk == sa.func.coalesce(_SIGNS.scalar_subquery(), _OLDEST.scalar_subquery()), "signing"),
    (SigningKey.signs_from > _NOW, "published"),
    else_="retired",
)
_DATES = (SigningKey.created_at, SigningKey.signs_from, SigningKey.gone_at)
_LIST = sa.select(SigningKey.kid, SigningKey.alg, *_DATES, _STATE.label("state")).order_by(
    SigningKey.pk.desc()
)
_GENERATE: dict[str, Callable[[], Key]] = {
    "RS256": lambda: RSAKey.generate_key(2048),
    "ES256": lambda: ECKey.generate_key("P-256"),
    "EdDSA": lambda: OKPKey.generate_key("Ed25519"),
}
_ALGORITHMS = credentials.Algorithms(algorithms=tuple(_GENERATE))

_READ_NEWEST = sa.select(NEWEST_KEY)


class ParsedKey(NamedTuple):
    """A signing key as a process remembers it: parsing takes longer than signing."""

    pk: int
    key: Key
    signs_from: datetime
    gone_at: datetime | None


def ensure_signing_key(connection: sa.Connection, *, follow_setting: bool) -> None:
    """Make the first key.

    :param follow_setting: rotate when the newest key is not of the configured algorithm.
    """
    alg = _newest_alg(connection)
    if alg is None:
        _add_key(connection, settings().signing_alg, now())
    elif follow_setting and alg != settings().signing_alg:
        rotate(connection, settings().signing_alg)


def rotate(connection: sa.Connection, alg: str | None = None, *, at_once: bool = False) -> None:
    """Publish a new key, which signs once every verifier can know it.

    :param alg: the algorithm; that of the newest key unless given.
    :param at_once: after a leak: sign now, and delete all other keys, which ends every token they signed.
    """
    alg = alg or _newest_alg(connection) or settings().signing_alg
    signs_from = now() if at_once else now() + timedelta(seconds=LEAD)
    if at_once:
        connection.execute(sa.delete(SigningKey))
    else:
        # The others stay published until the last token that they may sign has expired.
        gone_at = signs_from + timedelta(seconds=LONGEST_TOKEN)
        connection.execute(sa.update(SigningKey).where(SigningKey.gone_at.is_(None)).values(gone_at=gone_at))
    kid = _add_key(connection, alg, signs_from)
    events.record(connection, "key.rotated", kid=kid, alg=alg, at_once=at_once)


def list_keys(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
    """Return every key, newest first, with its `state`: `published`, `signing`, `retired` or `gone`."""
    return connection.execute(_LIST, {"now": now()}).all()


def sign(claims: dict[str, Any], newest: int) -> str:
    """Return the claims as an access token: a JWT of the type `at+jwt` (RFC 9068 §2.1).

    :param newest: NEWEST_KEY as this request read it.
    """
    key = signing_key(newest)
    header = {"alg": key.alg, "typ": "at+jwt", "kid": key.kid}
    return jwt.encode(header, claims, key, registry=_ALGORITHMS, default_type=None)


@lru_cache(maxsize=2048)
def verify(token: str) -> jwt.Token:
    """Return the header and the claims of a token that one of the keys has signed.

    A valid signature is remembered, since an agent sends the same token for an hour; an invalid one never.
    Whether the key is still valid must be read from the database, as everything else that can change.

    :raises JoseError: or ValueError or TypeError, when it is malformed or the signature is invalid.
    """
    # The key is found by `kid`; a `jwk` or `jku` in the header is never used (RFC 8725 §3.10).
    return jwt.decode(token, _find_key, registry=_ALGORITHMS)


def signing_key(newest: int) -> Key:
    """Return the key that signs now; `newest` as for `sign`."""
    known = _known_keys(newest)
    signing = [parsed.key for parsed in known if parsed.signs_from <= now()]
    # As in _STATE.
    return signing[-1] if signing else known[0].key


def _find_key(signature: GuestProtocol) -> KeySet:
    kid = signature.headers().get("kid")
    for read in (_known_keys, _read_keys):
        keys = [key for key in _published(read()) if key.kid == kid]
        if keys:
            return KeySet(keys)
    raise InvalidKeyIdError("No key has this kid.")


def published() -> bytes:
    """Return the JWKS: the public halves of all keys that are not gone (RFC 7517 §5)."""
    with reading() as connection:
        newest = connection.scalar(_READ_NEWEST)
    return json.dumps(KeySet(_published(_known_keys(newest or 0))).as_dict(private=False)).encode()


def _published(known: list[ParsedKey]) -> list[Key]:
    return [parsed.key for parsed in known if parsed.gone_at is None or parsed.gone_at > now()]


def _newest_alg(connection: sa.Connection) -> str | None:
    return connection.scalar(sa.select(SigningKey.alg).order_by(SigningKey.pk.desc()).limit(1))


def _known_keys(newest: int | None = None) -> list[ParsedKey]:
    """Return this process's keys, oldest first; read again when the newest is not `newest`, if given."""
    known = state().signing_keys
    return known if known and newest in (None, known[-1].pk) else _read_keys()


def _read_keys() -> list[ParsedKey]:
    with reading() as connection:
        rows = connection.execute(sa.select(SigningKey).order_by(SigningKey.pk)).all()
    parsed = {known.key.kid: known.key for known in state().signing_keys}
    for row in rows:
        if row.kid not in parsed:
            parameters: Any = {"kid": row.kid, "alg": row.alg, "use": "sig"}
            parsed[row.kid] = import_key(json.loads(row.jwk), parameters=parameters)
    known = [ParsedKey(row.pk, parsed[row.kid], row.signs_from, row.gone_at) for row in rows]
    state().signing_keys = known
    return known


def _add_key(connection: sa.Connection, alg: str, signs_from: datetime) -> str:
    key = _GENERATE[alg]()
    kid = key.thumbprint()  # RFC 7638
    row = {"kid": kid, "alg": alg, "jwk": json.dumps(key.as_dict(private=True))}
    connection.execute(sa.insert(SigningKey), {**row, "created_at": now(), "signs_from": signs_from})
    return kid


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

    The key is published first and signs once every verifier can know it. With `now` it signs at once.
    """
    return publish_key(at_once=fields["now"])


def publish_key(*, at_once: bool) -> dict[str, Any]:
    """Rotate, and return the new key as `schemas.KeyResponse` dumps it."""
    with writing(reserve=1 if at_once else None) as connection:
        rotate(connection, at_once=at_once)
        return {"key": list_keys(connection)[0]}
