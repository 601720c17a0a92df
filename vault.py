"""Secrets that must be read back: encrypted in the database when the operator gives a key."""

from __future__ import annotations

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import Flask, current_app

from config import SettingError, Settings
from models import SigningKey, Webhook, db

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


def reseal_all() -> None:
    """Seal anew what the first key does not seal yet; in the caller's transaction.

    :raises SettingError: when something is sealed with a key that is not given.
    """
    fernet: MultiFernet | None = current_app.extensions[_EXTENSION]
    for column in SEALED:
        row_id = column.class_.pk
        for pk, stored in db.session.execute(sa.select(row_id, column).where(column.is_not(None))).all():
            text = unseal(stored)
            if fernet is not None and not is_sealed(stored, current_app.extensions[_FIRST]):
                db.session.execute(
                    sa.update(column.class_).where(row_id == pk).values({column.key: seal(text)})
                )


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
