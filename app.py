"""The application factory, guards, headers, error handlers, `/` and `/health`; `python app.py` serves it."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import sys
from functools import partial
from typing import Any

import sqlalchemy as sa
from authlib.oauth2 import OAuth2Error
from flask import Flask, Response, g, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from werkzeug.exceptions import HTTPException

import agents
import auth
import config
import database
import events
import keys
import oauth
import schemas
from api import MAX_BODY, Blueprint, Problem, cached_response, check_path, read_body
from config import HERE, VERSION, SettingError, Settings
from console import docs, openapi
from migrations import upgrade
from models import NEWEST_KEY, DecryptionError, RevokedToken, db, new_id, now
from ops import access_log, cleanup, metrics
from storage import sqlite
from storage.files import copy_owner, describe_error, whole_file
from webhooks import routes as webhooks

log = logging.getLogger("lanyard")

# The guard of each blueprint; the others are open to anyone.
GUARDS = {
    "agents": auth.require_operator,
    "me": auth.require_agent,
    "webhooks": auth.require_operator,
    "keys": auth.require_operator,
    "events": auth.require_operator,
    "metrics": auth.require_operator,
}
# Headers of every response that does not set them itself.
HEADERS = {
    # RFC 6749 §5.1, and for agents and secrets too.
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # For JSON that is opened in a browser.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Request-Id",
    "Access-Control-Max-Age": "600",  # seconds
}
_EXPOSED = "X-Request-Id, Retry-After, WWW-Authenticate, Location"

LINKS = {
    "agents": "/api/agents",
    "token": "/oauth/token",
    "refresh": "/oauth/refresh",
    "introspect": "/oauth/introspect",
    "revoke": "/oauth/revoke",
    "jwks": "/.well-known/jwks.json",
    "metadata": "/.well-known/oauth-authorization-server",
    "health": "/health",
    "ready": "/health/ready",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
    "docs": "/docs",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRET = re.compile(r"(?<![A-Za-z0-9])(cs|rt|whsec)_|eyJ")

bp = Blueprint("service", __name__, description="Service")

# The errors of HTTP itself.
_HTTP_ERRORS = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not answer this method."),
    413: ("payload_too_large", f"A body may hold at most {MAX_BODY} bytes."),
    415: ("unsupported_media_type", "Send the body as application/json."),
}


def create_app(settings: Settings | None = None, *, serving: bool = False) -> Flask:
    """Return the WSGI app. Its first start makes the database, the signing key and the admin token.

    :param serving: whether a server starts. A command, which may lack the server's environment, makes no
        database and does not change the signing key.
    :raises SettingError: when a setting is invalid or does not match the database.
    """
    settings = settings or Settings.from_env()
    app = Flask(__name__, static_folder=None, instance_path=str(settings.instance))
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY + 1, PROVIDE_AUTOMATIC_OPTIONS=False)
    config.init_app(app, settings)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # its redirects are HTML
    metrics.init_app(app)  # first: it records each request's start time
    # Before local mode may refuse a request, which has an id and a log line too.
    access_log.init_app(app, settings)
    app.before_request(_assign_request_id)
    app.after_request(_add_headers)
    if settings.cors_origins:
        app.before_request(_answer_preflight)
        app.after_request(_allow_origin)
    app.before_request(check_path)
    app.before_request(read_body)
    _open_instance(app, settings, serving)
    oauth.init_app(app, settings)
    cleanup.init_app(app)
    app.before_request(_guard)
    _register_routes(app)
    _register_error_handlers(app)
    return app


def _open_instance(app: Flask, settings: Settings, serving: bool) -> None:
    if not serving:
        settings.check_same_database()
    if not serving and settings.uses_sqlite and not settings.database_file.exists():
        raise SettingError(
            f"LANYARD_INSTANCE must be the server's, which has been started once: there is no"
            f" {settings.database_file}."
        )
    try:
        prepare = partial(_prepare_database, settings, serving)
        database.init_database(app, settings, serving=serving, prepare=prepare)
        auth.init_app(app, settings)
    except DecryptionError as error:
        raise SettingError(f"{error}.") from None
    except OSError as error:
        raise SettingError(
            f"LANYARD_INSTANCE must be a folder that can be written: {describe_error(error)}."
        ) from None
    except (DBAPIError, sqlite3.DatabaseError) as error:
        reason = database.error_text(error)
        raise SettingError(f"The database {settings.database_name} cannot be used: {reason}.") from None


def _prepare_database(settings: Settings, serving: bool, is_first: bool) -> None:
    """Migrate the schema, make the first key and token, encrypt stored secrets with the newest key."""
    upgrade.bring_up_to_date(db.engine, settings, may_change=serving)
    if serving:
        auth.ensure_admin_token(settings)
        # Not by a start that fails since another server runs. Unchanged, it is not written: a full disk must
        # not prevent a start.
        is_own = is_first or not settings.uses_sqlite
        if is_own and settings.read_served() != settings.as_served():
            with whole_file(settings.served_file) as draft:
                draft.write_text(json.dumps(settings.as_served()))
                copy_owner(settings.instance, draft)
    # A command that ends access must start on a full disk.
    with database.writing(reserve=0) as connection:
        keys.ensure_signing_key(connection, follow_setting=serving)
        outdated = database.outdated_secrets(connection)
        # A second running server may lack the newest encryption key.
        if is_first and database.reencrypt(connection, outdated):
            log.warning("LANYARD_SECRET_KEY now encrypts stored secrets: no server starts without it.")
        elif serving and not is_first and outdated:
            log.warning("Another server runs: stored secrets keep the old key until a server starts alone.")


# An empty path is this one (RFC 9110 §4.2.3); werkzeug would redirect it, in HTML.
@bp.get("/", strict_slashes=False)
@bp.response(200, schemas.About)
def about() -> dict[str, Any]:
    """Get the name, the version and the paths."""
    return {
        "name": "Lanyard",
        "version": VERSION,
        "links": {name: config.settings().path(path) for name, path in LINKS.items()},
    }


@bp.get("/health")
@bp.response(200, schemas.Status)
def health() -> dict[str, str]:
    """Answer 200 while the process runs."""
    return {"status": "ok"}


@bp.get("/health/ready")
@bp.response(200, schemas.Status)
@bp.errors(503)
def ready() -> dict[str, str]:
    """Answer 200 when the database can be written and there is a signing key."""
    with database.writing(durable=False) as connection:
        newest = connection.scalar(sa.select(NEWEST_KEY))
        if newest is None:
            raise _unavailable("There is no signing key.", 1)
        keys.signing_key(newest)
        # Read-only files fail the commit. A full disk may not: so little still fits.
        connection.execute(sa.insert(RevokedToken), {"id": "ready", "expires_at": now()})
        connection.execute(sa.delete(RevokedToken).where(RevokedToken.id == "ready"))
        try:
            if config.settings().uses_sqlite:
                sqlite.check_room(config.settings())
        except OSError as error:
            raise _unavailable(f"The disk cannot be written: {error.strerror}.", 1) from None
    return {"status": "ready"}


@bp.get("/openapi.json", endpoint="openapi")
@bp.cached({"type": "object"})
def openapi_document() -> Response:
    """Get this document."""
    return cached_response(openapi.document(config.settings()), openapi.MAX_AGE)


def _guard() -> None:
    """Run the guard of the request's blueprint; routes may repeat it under a write lock as `g.guard`."""
    if guard := GUARDS.get(request.blueprint or ""):
        g.guard = guard
        guard()


def _assign_request_id() -> None:
    """Take the caller's request id, unless it is malformed or holds a secret: ids are logged and stored."""
    given = request.headers.get("X-Request-Id", "")
    is_good = _REQUEST_ID.fullmatch(given) and not _SECRET.search(given)
    g.returned_id = given if is_good else new_id("req_")
    # The admin token is returned as any other id is, or guesses could be told apart; it is never stored.
    is_secret = is_good and auth.is_admin_token(given)
    g.request_id = new_id("req_") if is_secret else g.returned_id


def _add_headers(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.returned_id
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if request.is_secure:  # RFC 6797 §7.2
        response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
    return response


def _answer_preflight() -> Response | None:
    """Answer a CORS preflight request from an allowed origin (Fetch §4.8)."""
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    return Response(status=204, headers=_PREFLIGHT) if is_preflight and _is_allowed_origin() else None


def _allow_origin(response: Response) -> Response:
    # A cache must not reuse a response to one origin for another.
    response.vary.add("Origin")
    if _is_allowed_origin():
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    return response


def _is_allowed_origin() -> bool:
    # Never Access-Control-Allow-Credentials: pages send tokens, not cookies or stored passwords.
    return request.headers.get("Origin") in config.settings().cors_origins


def _register_routes(app: Flask) -> None:
    # In the order of the OpenAPI document.
    management = (agents.management, agents.self_service, webhooks.bp, keys.bp, events.bp)
    for blueprint in (oauth.bp, *management, oauth.well_known_bp, bp, metrics.bp, docs.bp):
        app.register_blueprint(blueprint)


def _register_error_handlers(app: Flask) -> None:
    app.register_error_handler(Problem, _answer_problem)
    app.register_error_handler(OAuth2Error, _answer_oauth_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(SQLAlchemyError, _answer_database_error)
    app.register_error_handler(ConnectionResetError, _answer_timeout)
    app.register_error_handler(DecryptionError, _answer_decryption_error)
    app.register_error_handler(Exception, _answer_unexpected_error)


def _answer_problem(problem: Problem) -> ResponseReturnValue:
    return problem.body, problem.status, problem.headers


def _answer_oauth_error(error: OAuth2Error) -> ResponseReturnValue:
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    body = {"error": error.error, "error_description": error.get_error_description()}
    return body, error.status_code, headers


def _answer_http_error(error: HTTPException) -> ResponseReturnValue:
    status = error.code or 500
    code, text = _HTTP_ERRORS.get(status, ("invalid_request", "The request cannot be understood."))
    headers = {name: value for name, value in error.get_headers() if name == "Allow"}
    return _answer_problem(Problem(status, code, text, headers=headers))


def _answer_database_error(error: SQLAlchemyError) -> ResponseReturnValue:
    if not database.is_transient(error):
        return _answer_unexpected_error(error)
    log.error("The database does not answer: %s.", database.error_text(error))
    return _answer_problem(_unavailable("The database does not answer just now. Try again shortly.", 1))


def _answer_timeout(error: ConnectionResetError) -> ResponseReturnValue:
    log.error("A request took too long.")  # REQUEST_TIMEOUT in gunicorn.conf.py
    return _answer_problem(_unavailable("The request took too long. Try again shortly.", 1))


def _answer_decryption_error(error: DecryptionError) -> ResponseReturnValue:
    # A second server has encrypted a secret with a key that this one lacks.
    log.error("%s.", error)
    return _answer_problem(_unavailable("This server is not set up to answer. Its log says why.", 60))


def _answer_unexpected_error(error: Exception) -> ResponseReturnValue:
    log.error("Unhandled exception in a request.", exc_info=error)
    return _answer_problem(Problem(500, "server_error", "Lanyard failed to answer. Its log says why."))


def _unavailable(text: str, seconds: int) -> Problem:
    return Problem(503, "temporarily_unavailable", text, headers={"Retry-After": str(seconds)})


if __name__ == "__main__":
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "wsgi:app"])  # noqa: S606 - nothing in it is input
