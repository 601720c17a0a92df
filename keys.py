"""Signing keys: made at the first start, kept in the database, published as a JWK set."""

from __future__ import annotations

from typing import Any

from flask import current_app
from joserfc.errors import UnsupportedAlgorithmError
from joserfc.jwk import ECKey, Key, KeySet, OKPKey, RSAKey, import_key
from joserfc.jws import JWSRegistry
from sqlalchemy import select

import clock
from config import settings
from models import SigningKey, db

_EXTENSION = "lanyard.keys"


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


def ensure_signing_key() -> None:
    """Make a key for the configured algorithm unless there is one; in the caller's transaction."""
    alg = settings().signing_alg
    if db.session.scalar(select(SigningKey.kid).where(SigningKey.alg == alg)) is None:
        db.session.add(_new_key(alg))
        db.session.flush()


def signing_key() -> KeySet:
    """The key that signs now, as a set of one: Authlib takes its `kid` from a set."""
    alg = settings().signing_alg
    newest = [key for key in _all_keys() if key.alg == alg][-1]
    return KeySet([newest])


def verification_keys() -> KeySet:
    """Every key whose signatures count."""
    return _all_keys()


def public_jwks() -> dict[str, Any]:
    """What `/.well-known/jwks.json` answers (RFC 7517 §5): the public halves."""
    return dict(_all_keys().as_dict(private=False))


def _all_keys() -> KeySet:
    # Parsing a key costs more than a signature, so a process parses each once.
    cached: KeySet | None = current_app.extensions.get(_EXTENSION)
    if cached is None:
        rows = db.session.scalars(select(SigningKey).order_by(SigningKey.created_at)).all()
        cached = current_app.extensions[_EXTENSION] = KeySet([_parse(row) for row in rows])
    return cached


def _parse(row: SigningKey) -> Key:
    return import_key(row.jwk, parameters={"kid": row.kid, "alg": row.alg, "use": "sig"})


def _new_key(alg: str) -> SigningKey:
    key = _generate(alg)
    # RFC 7638: the thumbprint names the key the same way everywhere.
    return SigningKey(
        kid=key.thumbprint(), alg=alg, jwk=dict(key.as_dict(private=True)), created_at=clock.now()
    )


def _generate(alg: str) -> Key:
    if alg == "ES256":
        return ECKey.generate_key("P-256")
    if alg == "EdDSA":
        return OKPKey.generate_key("Ed25519")
    return RSAKey.generate_key(2048)
