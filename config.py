"""Settings: what an operator may set with `LANYARD_*` variables, typed and checked at start."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from click import ClickException
from flask import Flask, current_app

if TYPE_CHECKING:  # only `State` needs them: at run time nothing here imports another module
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from prometheus_client import CollectorRegistry

    from keys import ParsedKey

HERE = Path(__file__).resolve().parent
VERSION = "0.1.0"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DAY = 86_400
POSTGRESQL = "postgresql+psycopg://"
# What the driver itself takes, and not as text.
_NO_TEXT = {"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"}


class SettingError(ClickException):
    """A setting the server will not start with; its text is one sentence naming the variable.

    A command, which is click's, prints it just so.
    """


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, read once. Durations are seconds. `Settings.from_env` makes one."""

    instance: Path
    database_url: str = field(repr=False)  # it may hold a password
    host: str
    port: int
    local: bool
    admin_token: str | None = field(repr=False)
    issuer: str
    audience: str
    access_token_ttl: int
    refresh_token_ttl: int
    signing_alg: str
    bcrypt_cost: int
    workers: int
    trusted_proxies: int
    event_retention_days: int
    webhook_allow_private: bool
    secret_keys: tuple[str, ...] = field(repr=False)
    cors_origins: tuple[str, ...]
    access_log: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read `LANYARD_*` from `env`; raises SettingError for the first value that will not do."""
        host = _host(env)
        port = _whole(env, "PORT", 8080, 1, 65_535)
        local = _flag(env, "LOCAL")
        proxies = _whole(env, "TRUSTED_PROXIES", 0, 0, 10)
        _check_local(local, host, proxies)
        instance = HERE / (_read(env, "INSTANCE") or "instance")
        issuer = _issuer(_read(env, "ISSUER") or f"http://localhost:{port}")
        return cls(
            instance=instance,
            database_url=_database_url(env, instance),
            host=host,
            port=port,
            local=local,
            admin_token=_admin_token(env),
            issuer=issuer,
            audience=_audience(env, issuer),
            access_token_ttl=_whole(env, "ACCESS_TOKEN_TTL", 3600, 1, DAY),
            refresh_token_ttl=_whole(env, "REFRESH_TOKEN_TTL", 7 * DAY, 1, 30 * DAY),
            signing_alg=_one_of(env, "SIGNING_ALG", ("RS256", "ES256", "EdDSA")),
            bcrypt_cost=_whole(env, "BCRYPT_COST", 10, 4, 16),
            workers=_whole(env, "WORKERS", min(os.cpu_count() or 1, 8), 1, 64),
            trusted_proxies=proxies,
            event_retention_days=_whole(env, "EVENT_RETENTION_DAYS", 90, 7, 3650),
            webhook_allow_private=_flag(env, "WEBHOOK_ALLOW_PRIVATE", default=local),
            secret_keys=_secret_keys(env),
            cors_origins=_cors_origins(env, local),
            access_log=_flag(env, "ACCESS_LOG"),
        )

    def url(self, path: str) -> str:
        """The address that others reach `path` at."""
        return self.issuer.rstrip("/") + path

    @property
    def issuer_path(self) -> str:
        """The path in the issuer, or nothing."""
        return urlsplit(self.issuer).path.rstrip("/")

    @property
    def uses_sqlite(self) -> bool:
        """Whether the database is a SQLite file; else it is PostgreSQL's."""
        return self.database_url.startswith("sqlite:")

    @property
    def database_name(self) -> str:
        """What to call the database before an operator: never with a password in it."""
        return str(self.database_file) if self.uses_sqlite else _without_secrets(self.database_url)

    @property
    def database_file(self) -> Path:
        """Where the SQLite file is, if the database is one."""
        return Path(self.database_url.removeprefix("sqlite:///"))


@dataclass
class State:
    """What one app keeps in memory; `settings` are also at `app.config["LANYARD"]`."""

    settings: Settings
    oauth_server: AuthorizationServer = field(init=False)
    metrics: CollectorRegistry = field(init=False)
    signing_keys: list[ParsedKey] = field(default_factory=list)  # oldest first
    verified_secrets: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    # Ends the mark by which other processes see that a server uses the database.
    stop_serving: Callable[[], object] = lambda: None


def init_app(app: Flask, settings: Settings) -> None:
    """Give the app its settings and its state."""
    app.config["LANYARD"] = settings
    app.extensions["lanyard"] = State(settings)


def state(app: Flask | None = None) -> State:
    """Return the app's state; the running app's unless given."""
    found: State = (app or current_app).extensions["lanyard"]
    return found


def settings() -> Settings:
    """Return the running app's settings."""
    return state().settings


def unknown_names(env: Mapping[str, str] = os.environ) -> list[str]:
    """`LANYARD_*` variables that are no setting: most likely misspelt."""
    known = {f"LANYARD_{name.upper()}" for name in Settings.__dataclass_fields__} | {"LANYARD_SECRET_KEY"}
    return sorted(name for name in env if name.startswith("LANYARD_") and name not in known)


def _read(env: Mapping[str, str], name: str) -> str:
    # A variable set to nothing counts as not set: that is how shells and unit files unset one.
    return env.get(f"LANYARD_{name}", "").strip()


def _whole(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = _read(env, name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise SettingError(f"LANYARD_{name} must be a whole number from {low} to {high}, not {text!r}.")
    return int(text)


def _flag(env: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    text = _read(env, name) or str(int(default))
    if text not in ("0", "1"):
        raise SettingError(f"LANYARD_{name} must be 1 or 0, not {text!r}.")
    return text == "1"


def _one_of(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    text = _read(env, name) or choices[0]
    if text not in choices:
        raise SettingError(f"LANYARD_{name} must be one of {', '.join(choices)}, not {text!r}.")
    return text


def _host(env: Mapping[str, str]) -> str:
    host = _read(env, "HOST") or "127.0.0.1"
    if not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9A-Fa-f:.]+", host):
        raise SettingError(f"LANYARD_HOST must be an IP address or a host name, not {host!r}.")
    return host


def _check_local(local: bool, host: str, proxies: int) -> None:
    if local and host != "127.0.0.1":
        raise SettingError(
            f"LANYARD_HOST must be 127.0.0.1 while LANYARD_LOCAL=1 opens the management API, not {host!r}."
        )
    if local and proxies:
        raise SettingError(
            "LANYARD_TRUSTED_PROXIES must be 0 while LANYARD_LOCAL=1: local mode answers no proxy."
        )


def _database_url(env: Mapping[str, str], instance: Path) -> str:
    url = _read(env, "DATABASE_URL")
    if not url:
        return f"sqlite:///{instance / 'lanyard.db'}"
    # As others write it, too.
    url = re.sub(r"^postgres(ql)?://", POSTGRESQL, url)
    if url.startswith(POSTGRESQL):
        return _postgresql_url(url)
    path = url.removeprefix("sqlite:///")
    # In-memory databases are refused: every worker would have one of its own.
    if path == url or path in ("", ":memory:") or "?" in path or not Path(path).is_absolute():
        # The value is not repeated: it may hold a password.
        raise SettingError(
            "LANYARD_DATABASE_URL must be sqlite:/// and the absolute path of a file,"
            " or postgresql+psycopg://user:password@host/database."
        )
    return url


def _postgresql_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        named = parts.port != 0 and len(parts.path) > 1
    except ValueError:
        named = False
    if not named:
        raise SettingError("LANYARD_DATABASE_URL must name a database: postgresql+psycopg://host/database.")
    # What comes behind would be shown as the host or the database.
    if "@" in parts.path or parts.netloc.count("@") > 1 or parts.fragment:
        raise SettingError(
            "LANYARD_DATABASE_URL must have what is special in its password written as %40 for @, %2F for /,"
            " %3A for :, %3F for ? and %23 for #."
        )
    if odd := sorted(_NO_TEXT & {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}):
        raise SettingError(f"LANYARD_DATABASE_URL must not set {odd[0]}, which is no option of PostgreSQL's.")
    if find_spec("psycopg") is None:
        raise SettingError(
            "LANYARD_DATABASE_URL needs PostgreSQL's driver:"
            " .venv/bin/pip install -r requirements-postgresql.txt."
        )
    return url


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_admin_token(token: str, where: str) -> str:
    """The token, when it is long enough and every client can send it as Bearer (RFC 6750 §2.1)."""
    if len(token) < 16 or not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise SettingError(f"{where} must be at least 16 of A-Z, a-z, 0-9 and ._~+/- (RFC 6750).")
    return token


def _admin_token(env: Mapping[str, str]) -> str | None:
    token = _read(env, "ADMIN_TOKEN")
    return check_admin_token(token, "LANYARD_ADMIN_TOKEN") if token else None


def _secret_keys(env: Mapping[str, str]) -> tuple[str, ...]:
    """Fernet keys, the first of which encrypts: 32 bytes as URL-safe base64, separated by commas."""
    keys = tuple(filter(None, _read(env, "SECRET_KEY").split(",")))
    if not all(re.fullmatch(r"[A-Za-z0-9_-]{43}=", key) for key in keys):
        # The value is not repeated: it is a secret.
        raise SettingError("LANYARD_SECRET_KEY must be Fernet keys of 44 characters, separated by commas.")
    return keys


def _cors_origins(env: Mapping[str, str], local: bool) -> tuple[str, ...]:
    """Origins exactly as browsers send them (RFC 6454 §6.2), separated by commas."""
    origins = tuple(filter(None, map(str.strip, _read(env, "CORS_ORIGINS").split(","))))
    if local and origins:
        raise SettingError(
            "LANYARD_CORS_ORIGINS must not be set while LANYARD_LOCAL=1: local mode answers no other site."
        )
    for origin in origins:
        if not _is_origin(origin):
            raise SettingError(
                "LANYARD_CORS_ORIGINS must be origins as https://app.example.com, separated by commas,"
                " each named in lower case, without a path and the default port"
                f" (http is for localhost only, and * is for nobody), not {origin!r}."
            )
    return origins


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError:
        return False
    if not host or not re.fullmatch(r"[a-z0-9.-]+|[0-9a-f:.]+", host):
        return False
    secure = parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK_NAMES)
    told = f"[{host}]" if ":" in host else host
    if port not in (None, 0, 443 if parts.scheme == "https" else 80):
        told += f":{port}"
    return secure and text == f"{parts.scheme}://{told}"


def _issuer(url: str) -> str:
    """RFC 8414 §2: an https URL without query or fragment; plain http for this machine only."""
    bad = SettingError(
        "LANYARD_ISSUER must be an https URL without query or fragment"
        f" (http is for localhost only), not {url!r}."
    )
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK_NAMES)
        whole = parts.hostname and parts.port != 0 and not parts.username
    except ValueError:
        raise bad from None
    # What Flask's routes or an error's quotes would take for something else is refused with the rest.
    plain = url.isascii() and url.isprintable() and not any(c in url for c in '?# \\"<>%')
    if not (secure and whole and plain):
        raise bad
    return url


def _audience(env: Mapping[str, str], issuer: str) -> str:
    audience = _read(env, "AUDIENCE") or issuer
    if not (audience.isascii() and audience.isprintable()) or " " in audience:
        raise SettingError(
            f"LANYARD_AUDIENCE must be a URI or a plain name without spaces, not {audience!r}."
        )
    return audience
