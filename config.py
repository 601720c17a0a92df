"""Settings: what an operator may set with `LANYARD_*` variables, typed and checked at start."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

from click import ClickException
from flask import Flask, current_app
from sqlalchemy import make_url

if TYPE_CHECKING:  # only `State` needs them: at run time nothing here imports another module
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from prometheus_client import CollectorRegistry

    from keys import ParsedKey

HERE = Path(__file__).resolve().parent
VERSION = "0.1.0"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DAY = 86_400
# Kubernetes sets these in every pod for a Service named `lanyard`, as LANYARD_PORT=tcp://10.96.0.7:8080.
_SERVICE = re.compile(r"(tcp|udp|sctp)://")
_OF_KUBERNETES = re.compile(r"LANYARD_(SERVICE_HOST|SERVICE_PORT.*|PORT_[0-9]+_.*)")
POSTGRESQL = "postgresql+psycopg://"
# What a starting server writes into its instance's folder, besides its database.
SERVED_NAMES = (
    *("host", "port", "local", "issuer", "audience", "signing_alg"),
    *("trusted_proxies", "webhook_allow_private"),
)
# Options of psycopg's own that cannot be given as text.
_NOT_IN_URL = {"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"}


class SettingError(ClickException):
    """An invalid setting: one sentence that names the variable, which commands print as click's errors."""


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
    require_client_auth_for_refresh: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read `LANYARD_*` from `env`; raises SettingError for the first invalid value."""
        pattern = r"[A-Za-z0-9.-]+|[0-9A-Fa-f:.]+"
        host = _matching(env, "HOST", pattern, "an IP address or a host name", "127.0.0.1")
        port = _integer(env, "PORT", 8080, 1, 65_535)
        local = _flag(env, "LOCAL")
        proxies = _integer(env, "TRUSTED_PROXIES", 0, 0, 10)
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
            audience=_matching(env, "AUDIENCE", "[!-~]+", "a URI or a plain name without spaces", issuer),
            access_token_ttl=_integer(env, "ACCESS_TOKEN_TTL", 3600, 1, DAY),
            refresh_token_ttl=_integer(env, "REFRESH_TOKEN_TTL", 7 * DAY, 1, 30 * DAY),
            signing_alg=_one_of(env, "SIGNING_ALG", ("RS256", "ES256", "EdDSA")),
            bcrypt_cost=_integer(env, "BCRYPT_COST", 10, 4, 16),
            workers=_integer(env, "WORKERS", min(os.cpu_count() or 1, 8), 1, 64),
            trusted_proxies=proxies,
            event_retention_days=_integer(env, "EVENT_RETENTION_DAYS", 90, 7, 3650),
            webhook_allow_private=_flag(env, "WEBHOOK_ALLOW_PRIVATE", default=local),
            secret_keys=_secret_keys(env),
            cors_origins=_cors_origins(env, local),
            access_log=_flag(env, "ACCESS_LOG"),
            require_client_auth_for_refresh=_flag(env, "REQUIRE_CLIENT_AUTH_FOR_REFRESH"),
        )

    def url(self, path: str) -> str:
        """Return the URL of `path` for clients."""
        return self.issuer.rstrip("/") + path

    def path(self, path: str) -> str:
        """Return `path` below the issuer's, under which a proxy may serve Lanyard."""
        return urlsplit(self.issuer).path.rstrip("/") + path

    @property
    def served_file(self) -> Path:
        """The file in which a starting server records what it serves, for commands."""
        return self.instance / "serving.json"

    def read_served(self) -> dict[str, Any]:
        """Return `database` and SERVED_NAMES as the instance's last server had them; {} if there was none."""
        with suppress(OSError, ValueError):
            return dict(json.loads(self.served_file.read_text()))
        return {}

    def as_served(self) -> dict[str, Any]:
        """Return what a server writes into `served_file`: no secrets."""
        return {name: getattr(self, name) for name in SERVED_NAMES} | {"database": self._database_in_instance}

    def check_same_database(self) -> None:
        """Refuse to use another database than the instance's server.

        :raises SettingError:
        """
        served, own = self.read_served().get("database"), self._database_in_instance
        if served not in (None, own):
            raise SettingError(
                f"LANYARD_DATABASE_URL must be the server's: it serves {served}, and this command would use"
                f" {own}. With --env-file, ./lanyard reads the server's environment."
            )

    @property
    def _database_in_instance(self) -> str:
        """The database without its password; a file in the instance is relative to it, which may be moved."""
        if self.uses_sqlite:
            file = self.database_file
            return str(file.relative_to(self.instance) if file.is_relative_to(self.instance) else file)
        url = make_url(self.database_url)
        named = {"host": url.host, "port": url.port or 5432} | url.query
        service = f", service {named['service']}" if "service" in named else ""
        return f"postgresql://{str(named['host']).lower()}:{named['port']}/{url.database}{service}"

    @property
    def uses_sqlite(self) -> bool:
        """Whether the database is a SQLite file, not PostgreSQL."""
        return self.database_url.startswith("sqlite:")

    @property
    def database_name(self) -> str:
        """The database's name in messages, without its password."""
        if self.uses_sqlite:
            return str(self.database_file)
        parts = urlsplit(self.database_url)
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def database_file(self) -> Path:
        """The path of the SQLite file."""
        return Path(self.database_url.removeprefix("sqlite:///"))


@dataclass
class State:
    """The state of one app in memory; `settings` are also at `app.config["LANYARD"]`."""

    settings: Settings
    oauth_server: AuthorizationServer = field(init=False)
    metrics: CollectorRegistry = field(init=False)
    signing_keys: list[ParsedKey] = field(default_factory=list)  # oldest first
    verified_secrets: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    failures: dict[Any, Any] = field(default_factory=dict)  # of sign-ins, not yet in the audit log
    # Ends the mark by which other processes see that a server uses the database.
    stop_serving: Callable[[], object] = lambda: None


def init_app(app: Flask, settings: Settings) -> None:
    """Give the app its settings and its state."""
    app.config["LANYARD"] = settings
    app.extensions["lanyard"] = State(settings)


def state(app: Flask | None = None) -> State:
    """Return the state of the app, by default the running one."""
    return cast(State, (app or current_app).extensions["lanyard"])


def settings() -> Settings:
    """Return the running app's settings."""
    return state().settings


def ignored_variables(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return a sentence for each `LANYARD_*` variable that sets nothing."""
    known = {f"LANYARD_{name.upper()}" for name in Settings.__dataclass_fields__} | {"LANYARD_SECRET_KEY"}
    ours = sorted(name for name in env if name.startswith("LANYARD_") and not _OF_KUBERNETES.fullmatch(name))
    sentences = [f"Lanyard knows no setting {name}: is it misspelt?" for name in ours if name not in known]
    ignored = [name for name in ours if name in known and _SERVICE.match(env[name])]
    return sentences + [f"{name} is ignored: Kubernetes sets it for a Service named so." for name in ignored]


def _read(env: Mapping[str, str], name: str) -> str:
    text = env.get(f"LANYARD_{name}", "").strip()
    # An empty variable counts as unset: shells and unit files unset it so.
    return "" if _SERVICE.match(text) else text


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = _read(env, name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise SettingError(f"LANYARD_{name} must be a whole number from {low} to {high}, not {text!r}.")
    return int(text)


def _flag(env: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    return _one_of(env, name, ("1", "0") if default else ("0", "1")) == "1"


def _one_of(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    return _matching(env, name, "|".join(choices), f"one of {', '.join(choices)}", choices[0])


def _matching(env: Mapping[str, str], name: str, pattern: str, description: str, default: str) -> str:
    text = _read(env, name) or default
    if not re.fullmatch(pattern, text):
        raise SettingError(f"LANYARD_{name} must be {description}, not {text!r}.")
    return text


def _check_local(local: bool, host: str, proxies: int) -> None:
    if local and host != "127.0.0.1":
        raise SettingError(
            f"LANYARD_HOST must be 127.0.0.1 while LANYARD_LOCAL=1 opens the management API, not {host!r}."
        )
    if local and proxies:
        raise SettingError("LANYARD_TRUSTED_PROXIES must be 0 while LANYARD_LOCAL=1, which answers no proxy.")


def _database_url(env: Mapping[str, str], instance: Path) -> str:
    url = _read(env, "DATABASE_URL")
    if not url:
        return f"sqlite:///{instance / 'lanyard.db'}"
    # Other tools' spellings of the scheme.
    url = re.sub(r"^postgres(ql)?://", POSTGRESQL, url)
    if url.startswith(POSTGRESQL):
        return _postgresql_url(url)
    path = url.removeprefix("sqlite:///")
    # An in-memory database would be each worker's own.
    if path == url or path in ("", ":memory:") or "?" in path or not Path(path).is_absolute():
        # Without the value, which may hold a password.
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
    # Part of the password would be shown as the host or the database.
    if "@" in parts.path or parts.netloc.count("@") > 1 or parts.fragment:
        raise SettingError(
            "LANYARD_DATABASE_URL must escape special characters of its password: %40 for @, %2F for /,"
            " %3A for :, %3F for ? and %23 for #."
        )
    if odd := sorted(_NOT_IN_URL & {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}):
        raise SettingError(f"LANYARD_DATABASE_URL must not set {odd[0]}, which is no option of PostgreSQL.")
    if find_spec("psycopg") is None:
        raise SettingError(
            "LANYARD_DATABASE_URL needs the PostgreSQL driver:"
            " .venv/bin/pip install -r requirements-postgresql.txt."
        )
    return url


def check_admin_token(token: str, where: str) -> str:
    """Return the token if it is long enough and valid as Bearer (RFC 6750 §2.1); `where` names its place."""
    if len(token) < 16 or not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise SettingError(f"{where} must be at least 16 of A-Z, a-z, 0-9 and ._~+/- (RFC 6750).")
    return token


def _admin_token(env: Mapping[str, str]) -> str | None:
    token = _read(env, "ADMIN_TOKEN")
    return check_admin_token(token, "LANYARD_ADMIN_TOKEN") if token else None


def _secret_keys(env: Mapping[str, str]) -> tuple[str, ...]:
    """Read Fernet keys, separated by commas; the first one encrypts."""
    keys = tuple(filter(None, _read(env, "SECRET_KEY").split(",")))
    if not all(re.fullmatch(r"[A-Za-z0-9_-]{43}=", key) for key in keys):
        # Without the value, which is a secret.
        raise SettingError("LANYARD_SECRET_KEY must be Fernet keys of 44 characters, separated by commas.")
    return keys


def _cors_origins(env: Mapping[str, str], local: bool) -> tuple[str, ...]:
    """Read origins, separated by commas, exactly as browsers send them (RFC 6454 §6.2)."""
    origins = tuple(filter(None, map(str.strip, _read(env, "CORS_ORIGINS").split(","))))
    if local and origins:
        raise SettingError(
            "LANYARD_CORS_ORIGINS must not be set while LANYARD_LOCAL=1, which answers no other site."
        )
    for origin in origins:
        if not _is_origin(origin):
            raise SettingError(
                "LANYARD_CORS_ORIGINS must be origins as https://app.example.com, separated by commas,"
                " in lower case, without a path and without the default port"
                f" (http is for localhost only, and * is not allowed), not {origin!r}."
            )
    return origins


def _is_origin(text: str) -> bool:
    shape = r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]*)?"
    default_port = r"https:.*:443|http:.*:80"
    return bool(_is_secure(text) and re.fullmatch(shape, text) and not re.fullmatch(default_port, text))


def _is_secure(url: str) -> bool:
    """Whether it is an https URL with a host and no user name, or such an http URL of this machine."""
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK_NAMES)
        return bool(secure and parts.hostname and parts.port != 0 and "@" not in parts.netloc)
    except ValueError:
        return False


def _issuer(url: str) -> str:
    """Check an issuer (RFC 8414 §2): https without query or fragment; http for this machine only."""
    # Also without what Flask's routes or the quotes of WWW-Authenticate would interpret.
    plain = url.isascii() and url.isprintable() and not any(c in url for c in '?# \\"<>%')
    if not (plain and _is_secure(url)):
        raise SettingError(
            "LANYARD_ISSUER must be an https URL without query or fragment"
            f" (http is for localhost only), not {url!r}."
        )
    return url
