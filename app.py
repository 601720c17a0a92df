"""Lanyard: the application factory, the service routes, the one error shape; `python app.py` serves it."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from functools import partial
from typing import Any

import sqlalchemy as sa
from authlib.oauth2 import OAuth2Error
from flask import Flask, Response, current_app, g, jsonify, request
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException

import agents
import auth
import config
import database
import events
import keys
import oauth
import schemas
from api import MAX_BODY, Blueprint, Problem, cached_response, read_body
from config import HERE, VERSION, SettingError, Settings
from console import docs, openapi
from migrations import upgrade
from models import NEWEST_KEY, DecryptionError, db
from ops import access_log, cleanup, metrics
from storage import postgresql
from webhooks import routes as webhooks

log = logging.getLogger("lanyard")

# Which check a request must pass, by blueprint; whoever is not here is open to anyone.
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
    # RFC 6749 §5.1 for tokens; agents and secrets are nobody's to keep either.
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # JSON opened in a browser loads nothing and is framed by nobody.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_HSTS = "max-age=31536000"  # RFC 6797 §7.2: over TLS only
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Request-Id",
    "Access-Control-Max-Age": "600",  # seconds
}
_EXPOSED = "X-Request-Id, Retry-After, WWW-Authenticate, Location"

service = Blueprint("service", __name__, description="Service")

# RFC 6749 names the OAuth codes; these are for what HTTP itself refuses.
_HTTP_ERRORS = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not answer this method."),
    413: ("payload_too_large", f"A body may hold at most {MAX_BODY} bytes."),
    415: ("unsupported_media_type", "Send the body as application/json."),
}


def create_app(settings: Settings | None = None, *, serving: bool = False) -> Flask:
    """The WSGI app. On its first start it makes the database, the signing key and the admin token.

    :param serving: a server starts. A command, which may be run without the server's environment,
        makes no database and does not change what the server signs with.
    :raises SettingError: when an environment variable will not do.
    """
    settings = settings or Settings.from_env()
    app = Flask(__name__, static_folder=None, instance_path=str(settings.instance))
    app.config.update(
        MAX_CONTENT_LENGTH=MAX_BODY + 1,
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    config.init_app(app, settings)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # a redirect would answer HTML
    # First of all: a request that local mode refuses has an id too, and a line in the log.
    access_log.init_app(app, settings)
    events.init_app(app)
    _init_headers(app, settings)
    app.before_request(read_body)
    _open_instance(app, settings, serving)
    oauth.init_app(app, settings)
    cleanup.init_app(app)
    app.before_request(_guard)
    _register_routes(app)
    _register_error_handlers(app)
    metrics.init_app(app)
    return app


def _open_instance(app: Flask, settings: Settings, serving: bool) -> None:
    if not serving and settings.uses_sqlite and not settings.database_file.exists():
        raise SettingError(
            f"LANYARD_INSTANCE must be the server's, which has been started once: there is no"
            f" {settings.database_file}."
        )
    try:
        prepare = partial(_prepare_database, settings, serving)
        database.init_database(app, settings, serving=serving, prepare=prepare)
        auth.init_app(app, settings, serving=serving)
    except DecryptionError as error:
        raise SettingError(f"{error}.") from None
    except postgresql.EncodingError as error:
        raise SettingError(str(error)) from None
    except OSError as error:
        raise SettingError(f"LANYARD_INSTANCE must be a folder that can be written: {error}.") from None
    except (DBAPIError, sqlite3.DatabaseError) as error:
        reason = database.error_text(error)
        raise SettingError(f"The database {settings.database_name} cannot be used: {reason}.") from None


def _prepare_database(settings: Settings, serving: bool, is_first: bool) -> None:
    """Bring the schema up to date, make the first key, encrypt what must be."""
    upgrade.bring_up_to_date(db.engine, settings, may_change=serving)
    with database.writing() as connection:
        keys.ensure_signing_key(connection, follow_setting=serving)
        outdated = database.check_encryption(connection)
        # Another server that runs may lack the key that secrets would be encrypted with.
        if is_first and database.encrypt_again(connection):
            log.warning(
                "LANYARD_SECRET_KEY now encrypts the database's secrets: nothing starts without it any more."
            )
        elif serving and not is_first and outdated:
            log.warning(
                "Another server runs: secrets stay encrypted as they are, until one is started alone."
            )


# RFC 9110 §4.2.3: no path is this one; werkzeug alone would redirect it, in HTML.
@service.get("/", strict_slashes=False)
@service.response(200, schemas.About)
def about() -> dict[str, Any]:
    """Get the name, the version and the paths."""
    return {
        "name": "Lanyard",
        "version": VERSION,
        "links": {
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
        },
    }


@service.get("/health")
@service.response(200, schemas.Status)
def health() -> dict[str, str]:
    """Answer 200 while the process lives."""
    return {"status": "ok"}


@service.get("/health/ready")
@service.response(200, schemas.Status)
@service.errors(503)
def ready() -> dict[str, str]:
    """Answer 200 when the database gives a write lock and there is a signing key."""
    with database.writing(durable=False) as connection:
        newest = connection.scalar(sa.select(NEWEST_KEY))
        if newest is None:
            headers = {"Retry-After": "1"}
            raise Problem(503, "temporarily_unavailable", "There is no signing key.", headers=headers)
        keys.signing_key(newest)
    return {"status": "ready"}


@service.get("/openapi.json", endpoint="openapi")
@service.cached({"type": "object"})
def openapi_document() -> Response:
    """Get this document."""
    return cached_response(openapi.document(config.settings()), openapi.MAX_AGE)


def _guard() -> None:
    """Run the check of the request's blueprint; `g.guard` runs it again, under a write lock."""
    guard = GUARDS.get(request.blueprint or "")
    if guard is not None:
        g.guard = guard
        guard()


def _init_headers(app: Flask, settings: Settings) -> None:
    """Add headers to every response, and CORS for the origins that the settings name."""
    app.after_request(_add_headers)
    if settings.cors_origins:
        app.before_request(_answer_preflight)
        app.after_request(_allow_origin)


def _add_headers(response: Response) -> Response:
    headers = response.headers
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if request.is_secure:
        headers.setdefault("Strict-Transport-Security", _HSTS)
    return response


def _answer_preflight() -> Response | None:
    """What a browser asks before a page of another site may send its request (Fetch §4.8)."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or not _is_allowed_origin():
        return None
    response: Response = current_app.response_class(status=204, headers=_PREFLIGHT)
    return response


def _allow_origin(response: Response) -> Response:
    # An answer to one origin, or to none, must not be a cache's answer to another.
    response.vary.add("Origin")
    if _is_allowed_origin():
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    return response


def _is_allowed_origin() -> bool:
    # Never Access-Control-Allow-Credentials: a page shows a token it holds, no cookie or kept password.
    return request.headers.get("Origin") in config.settings().cors_origins


def _register_routes(app: Flask) -> None:
    # In the order of the OpenAPI document.
    for blueprint in (oauth.blueprint, agents.management, agents.self_service, webhooks.bp):
        app.register_blueprint(blueprint)
    for blueprint in (keys.bp, events.bp, oauth.well_known, service, metrics.bp):
        app.register_blueprint(blueprint)
    app.register_blueprint(docs.bp)


def _register_error_handlers(app: Flask) -> None:
    app.register_error_handler(Problem, _answer_problem)
    app.register_error_handler(OAuth2Error, _answer_oauth_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(DBAPIError, _answer_database_error)
    app.register_error_handler(sa.exc.TimeoutError, _answer_database_error)  # of the connection pool
    app.register_error_handler(DecryptionError, _answer_decryption_error)
    app.register_error_handler(Exception, _answer_crash)


def _answer_problem(problem: Problem) -> Response:
    response = jsonify(problem.body)
    response.status_code = problem.status
    response.headers.extend(problem.headers)
    return response


def _answer_oauth_error(error: OAuth2Error) -> Response:
    description = error.get_error_description()
    told = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    return _answer_problem(Problem(error.status_code, error.error, description, headers=told))


def _answer_http_error(error: HTTPException) -> Response:
    code = error.code or 500
    name, text = _HTTP_ERRORS.get(code, ("invalid_request", "The request cannot be understood."))
    told = {key: value for key, value in error.get_headers() if key == "Allow"}
    return _answer_problem(Problem(code, name, text, headers=told))


def _answer_database_error(error: DBAPIError | sa.exc.TimeoutError) -> Response:
    if not database.is_transient(error):
        return _answer_crash(error)
    log.error("The database does not answer: %s.", database.error_text(error))
    text = "The database does not answer just now. Try again shortly."
    return _answer_problem(Problem(503, "temporarily_unavailable", text, headers={"Retry-After": "1"}))


def _answer_decryption_error(error: DecryptionError) -> Response:
    """Another server has encrypted a secret with a key that this one lacks."""
    log.error("%s.", error)
    text = "This server is not set up to answer. Its log says why."
    return _answer_problem(Problem(503, "temporarily_unavailable", text, headers={"Retry-After": "60"}))


def _answer_crash(error: Exception) -> Response:
    log.error("A request crashed.", exc_info=error)
    return _answer_problem(Problem(500, "server_error", "Lanyard failed to answer. Its log says why."))


if __name__ == "__main__":
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "wsgi:app"])  # noqa: S606 - nothing in it is input
