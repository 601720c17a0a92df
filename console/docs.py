"""The page at `/docs`: Swagger UI over `/openapi.json`, with every asset from this server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from flask import Blueprint, Response
from werkzeug.exceptions import NotFound

from api import cached_response

MAX_AGE = 3600  # seconds

# Not flask-smorest's Blueprint: a page for people is no operation of the API.
bp = Blueprint("docs", __name__)

# Swagger UI sets style attributes. No inline script runs, and requests go to this server only.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SWAGGER_UI = Path(str(files("flask_swagger_ui") / "dist"))
_HERE = Path(__file__).parent
_ASSETS = {
    "start.js": (_HERE, "text/javascript"),
    "favicon-32x32.png": (_SWAGGER_UI, "image/png"),
    "swagger-ui.css": (_SWAGGER_UI, "text/css"),
    "swagger-ui-bundle.js": (_SWAGGER_UI, "text/javascript"),
}


@bp.get("/docs")
def page() -> Response:
    """Return the page. Its URLs are relative: it works below a path prefix too."""
    response = cached_response((_HERE / "docs.html").read_bytes(), MAX_AGE, "text/html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


@bp.get("/docs/<name>")
def asset(name: str) -> Response:
    """Return a script, style or picture of the page."""
    if name not in _ASSETS:
        raise NotFound
    folder, mimetype = _ASSETS[name]
    return cached_response((folder / name).read_bytes(), MAX_AGE, mimetype)
