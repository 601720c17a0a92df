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
from flask import Flask, Response, current_app, jsonify
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException

import access
import agents
import bearer
import cli
import complaints
import credentials
import database
import docs_page
import events
import headers
import housekeeping
import journal
import keys
import management
import metadata
import metrics
import oauth
import prepared
import schemas
import tally
import vault
import webhooks
from api import Api, Blueprint
from config import HERE, VERSION, SettingError, Settings
from config import settings as current_settings
from wire import MAX_BODY, Problem

log = logging.getLogger("lanyard")

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
        LANYARD=settings,
        MAX_CONTENT_LENGTH=MAX_BODY + 1,
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # a redirect would answer HTML
    # First of all: a request that local mode refuses has an id too, and a line in the log.
    journal.init_app(app, settings)
    events.init_app(app)
    headers.init_app(app, settings)
    credentials.init_app(app, bcrypt_cost=settings.bcrypt_cost)
    vault.init_app(app, settings)
    prepared.init_app(app)
    _open_instance(app, settings, serving)
    bearer.init_app(app, settings)
    oauth.init_app(app, settings)
    metadata.init_app(app, settings)
    housekeeping.init_app(app)
    cli.init_app(app)
    _register_routes(app)
    _register_error_handlers(app)
    metrics.init_app(app)
    tally.init_app(app, settings)
    return app


def _open_instance(app: Flask, settings: Settings, serving: bool) -> None:
    if not serving and settings.uses_sqlite and not settings.database_file.exists():
        raise SettingError(
            f"LANYARD_INSTANCE must be the server's, which has been started once: there is no"
            f" {settings.database_file}."
        )
    try:
        fill = partial(_fill_database, serving)
        database.init_database(app, settings, serving=serving, fill=fill)
        access.init_app(app, settings, serving=serving)
    except OSError as error:
        raise SettingError(f"LANYARD_INSTANCE must be a folder that can be written: {error}.") from None
    except (DBAPIError, sqlite3.DatabaseError) as error:
        reason = complaints.sentence(error)
        raise SettingError(f"The database {settings.database_name} cannot be used: {reason}.") from None


def _fill_database(serving: bool, is_first: bool) -> None:
    keys.ensure_signing_key(follow_setting=serving)
    vault.check_all()
    # Another server that runs may lack the key that secrets would be sealed with.
    if is_first:
        vault.reseal_all()
    elif serving and vault.late():
        log.warning("Another server runs: secrets stay sealed as they are, until one is started alone.")


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
        newest = connection.scalar(sa.select(keys.NEWEST_KEY))
        if newest is None:
            headers = {"Retry-After": "1"}
            raise Problem(503, "temporarily_unavailable", "There is no signing key.", headers=headers)
        keys.signing_key(newest)
    return {"status": "ready"}


@service.get("/openapi.json")
@service.cached({"type": "object"})
def openapi() -> Response:
    """Get this document."""
    return metadata.answer(metadata.document(_openapi, current_settings()), metadata.MAX_AGE)


def _openapi(settings: Settings) -> dict[str, Any]:
    api = Api(current_app, version=VERSION, issuer=settings.issuer, local=settings.local)
    return api.document()


def _register_routes(app: Flask) -> None:
    # In the order in which the documents tell of them.
    for blueprint in (oauth.blueprint, agents.management, agents.self_service, webhooks.room):
        app.register_blueprint(blueprint)
    for blueprint in (management.keys_room, management.event_log, metadata.blueprint, service):
        app.register_blueprint(blueprint)
    app.register_blueprint(metrics.room)
    app.register_blueprint(docs_page.blueprint)


def _register_error_handlers(app: Flask) -> None:
    app.register_error_handler(Problem, _answer_problem)
    app.register_error_handler(OAuth2Error, _answer_oauth_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(DBAPIError, _answer_database_error)
    app.register_error_handler(SettingError, _answer_setting_error)
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


def _answer_database_error(error: DBAPIError) -> Response:
    if not database.may_pass(error):
        return _answer_crash(error)
    log.error("The database does not answer: %s.", complaints.sentence(error))
    text = "The database does not answer just now. Try again shortly."
    return _answer_problem(Problem(503, "temporarily_unavailable", text, headers={"Retry-After": "1"}))


def _answer_setting_error(error: SettingError) -> Response:
    """One that shows late: another server has sealed a secret with a key that this one lacks."""
    log.error("A setting will not do: %s", error.message)
    text = "This server is not set up to answer. Its log says why."
    return _answer_problem(Problem(503, "temporarily_unavailable", text, headers={"Retry-After": "60"}))


def _answer_crash(error: Exception) -> Response:
    log.error("A request crashed.", exc_info=error)
    return _answer_problem(Problem(500, "server_error", "Lanyard failed to answer. Its log says why."))


if __name__ == "__main__":
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "wsgi:app"])  # noqa: S606 - nothing in it is input
