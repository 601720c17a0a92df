"""Who is calling: the operator by the admin token, and in local mode this machine's own clients."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from pathlib import Path

from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix

import credentials
import tally
import throttle
from config import SettingError, Settings, check_admin_token, settings, state
from files import give_to_owner_of, sync_folder
from wire import Problem, parse_authorization

log = logging.getLogger("lanyard")

_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_FORWARDING_HEADERS = re.compile(
    r"forwarded|via|x-forwarded.*|x-original-.*|x-real-ip|(x-)?(cluster-)?client-ip"
    r"|cf-connecting-ip|true-client-ip|fly-client-ip|x-envoy-external-address",
    re.IGNORECASE,
)


def init_app(app: Flask, settings: Settings, *, serving: bool) -> None:
    """Learn the admin token, trust the proxies the settings name, and guard local mode."""
    state(app).admin_token = (
        GivenToken(settings.admin_token) if settings.admin_token else KeptToken(settings, serving=serving)
    )
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    if settings.local:
        app.before_request(_refuse_strangers)


def admin_token_file(settings: Settings) -> Path:
    """Where the admin token is kept when LANYARD_ADMIN_TOKEN does not give one."""
    return settings.instance / "admin_token"


def is_operator() -> bool:
    """Whether the request may manage: by the admin token, or in local mode without any credentials."""
    if "Authorization" not in request.headers:
        return settings().local
    return carries_admin_token()


def carries_admin_token() -> bool:
    """Whether the request carries the admin token, as Bearer or as the password of `admin`."""
    authorization = parse_authorization(request.headers.get("Authorization", ""))
    if authorization is None:
        return False
    if authorization.type == "bearer":
        return _is_admin_token(authorization.token or "")
    if authorization.type == "basic":
        return authorization.username == "admin" and _is_admin_token(authorization.password or "")
    return False


def _is_admin_token(text: str) -> bool:
    right = state().admin_token.now()
    is_right = right is not None and credentials.same(text, right)
    # An agent's access token that has expired is no guess at the admin token.
    if text.startswith("eyJ"):
        return is_right
    guess = throttle.Guess("admin", known=True)
    guess.refuse_if_throttled()
    if not is_right:
        tally.count_failure("admin_token")
        guess.failed()
    return is_right


class GivenToken:
    """The admin token that the settings give: the same as long as the process lives."""

    def __init__(self, token: str) -> None:
        self._token = token

    def now(self) -> str:
        return self._token


class KeptToken:
    """The admin token in the instance's file: whatever the file holds at this moment, in every worker.

    :raises SettingError: at the start, when the file holds none that will do.
    """

    def __init__(self, settings: Settings, *, serving: bool) -> None:
        self._path = admin_token_file(settings)
        # A command may have another folder than the server, when the database is not in it.
        self._read: tuple[object, str | None] = (None, None)
        if serving:
            _ensure_admin_token(self._path)
            self._read = (self._stamp(), read_admin_token(self._path))

    def now(self) -> str | None:
        """The token; None, which nothing matches, while the file is gone or holds none that will do."""
        stamp = self._stamp()
        # Looked at before it is read: what is written meanwhile is read the next time.
        if stamp != self._read[0]:
            self._read = (stamp, self._read_again())
        return self._read[1]

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read_again(self) -> str | None:
        try:
            return read_admin_token(self._path)
        except (OSError, ValueError, SettingError) as error:
            log.warning("Nobody is the operator until the admin token can be read: %s", error)
            return None


def rotate_admin_token(path: Path) -> None:
    """Put a new admin token into the file; the old one is dead at the next request."""
    draft = _draft_admin_token(path)
    give_to_owner_of(path, draft)
    os.replace(draft, path)
    sync_folder(path.parent)


def read_admin_token(path: Path) -> str:
    """The admin token in the file.

    :raises SettingError: when it is none that will do.
    """
    return check_admin_token(path.read_text().strip(), f"The admin token in {path}")


def _ensure_admin_token(path: Path) -> None:
    """Make the admin token on the first start; the file is never seen half written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        draft = _draft_admin_token(path)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was first: its token counts
        finally:
            os.unlink(draft)
    os.chmod(path, 0o600)


def _draft_admin_token(path: Path) -> Path:
    draft = path.with_name(f".admin_token.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(credentials.new_admin_token() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return draft


def _refuse_strangers() -> None:
    """Local mode asks no one for credentials, so it answers only this machine's own clients.

    A web page the operator visits is a stranger too: it shows by its Origin, by the Host it had
    resolved to this machine (DNS rebinding), or by the body types a page may send unasked.
    """
    if not _is_loopback(request.environ.get("REMOTE_ADDR", "")):
        _refuse("a request from another machine")
    host = request.environ.get("HTTP_HOST", "")
    if not _LOCAL_HOST.fullmatch(host):
        _refuse("a Host other than localhost")
    if any(_FORWARDING_HEADERS.fullmatch(name) for name, _ in request.headers):
        _refuse("a forwarded request")
    origin = request.headers.get("Origin")
    same_site = request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    if not same_site or (origin is not None and origin.lower() != f"http://{host}".lower()):
        _refuse("a page of another site")
    if request.path.startswith("/api/") and _has_body() and request.mimetype != "application/json":
        _refuse("a body other than application/json: send it with that Content-Type")


def _refuse(what: str) -> None:
    raise Problem(403, "forbidden", f"Local mode does not answer {what}.")


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _has_body() -> bool:
    return bool(request.content_length) or "Transfer-Encoding" in request.headers
