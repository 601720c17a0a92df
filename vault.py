"""Secrets that must be read back: encrypted in the database when the operator gives a key."""

from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import Flask, current_app

from config import SettingError, Settings

_EXTENSION = "lanyard.vault"
_MARK = "fernet:"


def init_app(app: Flask, settings: Settings) -> None:
    """Take the keys of LANYARD_SECRET_KEY: the first encrypts, any decrypts."""
    keys = [Fernet(key) for key in settings.secret_keys]
    app.extensions[_EXTENSION] = MultiFernet(keys) if keys else None


def seal(text: str) -> str:
    """What to store of a secret: itself, if there is no key to encrypt it with."""
    fernet: MultiFernet | None = current_app.extensions[_EXTENSION]
    return text if fernet is None else _MARK + fernet.encrypt(text.encode()).decode()


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
