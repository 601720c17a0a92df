"""Secrets that must be read back: encrypted in the database when the operator gives a key."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import Flask, current_app

from config import SettingError, Settings
from models import SigningKey, Webhook, db

log = logging.getLogger("lanyard")

_EXTENSION = "lanyard.vault"
_FIRST = "lanyard.vault.first"
_MARK = "fernet:"
SEALED = (SigningKey.jwk, Webhook.secret, Webhook.old_secret)  # the columns that hold such secrets


def init_app(app: Flask, settings: Settings) -> None:
    """Take the keys of LANYARD_SECRET_KEY: the first encrypts, any decrypts."""
    keys = [Fernet(key) for key in settings.secret_keys]
    app.extensions[_EXTENSION] = MultiFernet(keys) if keys else None
    app.extensions[_FIRST] = keys[0] if keys else None


def seal(text: str) -> str:
    """What to store of a secret: itself, if there is no key to encrypt it with."""
    fernet: MultiFernet | None = current_app.extensions[_EXTENSION]
    return text if fernet is None else _MARK + fernet.encrypt(text.encode()).decode()


def check_all() -> None:
    """See that everything sealed can be read.

    :raises SettingError: when something is sealed with a key that is not given.
    """
    for _, _, stored in _stored():
        unseal(stored)


def reseal_all() -> None:
    """Seal anew what the first key does not seal yet; in the caller's transaction."""
    found = late()
    for column, pk, stored in found:
        sealed = {column.key: seal(unseal(stored))}
        db.session.execute(sa.update(column.class_).where(column.class_.pk == pk).values(sealed))
    if any(not is_sealed(stored) for _, _, stored in found):
        log.warning(
            "LANYARD_SECRET_KEY now encrypts the database's secrets: nothing starts without it any more."
        )


def late() -> list[tuple[Any, int, str]]:
    """The secrets that the first key does not seal yet: column, row's number, and what is stored."""
    first: Fernet | None = current_app.extensions[_FIRST]
    return [] if first is None else [found for found in _stored() if not is_sealed(found[2], first)]


def _stored() -> list[tuple[Any, int, str]]:
    """Every such secret: its column, its row's number, and what is stored of it."""
    return [
        (column, pk, stored)
        for column in SEALED
        for pk, stored in db.session.execute(sa.select(column.class_.pk, column).where(column.is_not(None)))
    ]


def is_sealed(stored: str, fernet: Fernet | None = None) -> bool:
    """Whether what is stored is encrypted; with that key, if one is given."""
    if fernet is None or not stored.startswith(_MARK):
        return stored.startswith(_MARK)
    try:
        fernet.decrypt(stored.removeprefix(_MARK))
    except InvalidToken:
        return False
    return True


def unseal(stored: str) -> str:
    """The secret that was stored.

    :raises SettingError: when it is encrypted, and not with one of the keys given.
    """
    if not stored.startswith(_MARK):
        return stored
    fernet: MultiFernet | None = current_app.extensions[_EXTENSION]
    try:
        if fernet is not None:
            return fernet.decrypt(stored.removeprefix(_MARK)).decode()
    except InvalidToken:
        pass
    raise SettingError("LANYARD_SECRET_KEY must hold the key that the database's secrets are encrypted with.")
