"""The page at `/docs`: Swagger UI over `/openapi.json`, with every asset from this server."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

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
_TYPES = {
    "favicon-32x32.png": "image/png",
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
}
# Relative URLs, so that the page works below a path prefix too.
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lanyard API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
<style>
body { margin: 0 }
.swagger-ui .response-col_links { display: none }
@media (max-width: 40rem) { .swagger-ui .wrapper { padding: 0 .5rem } }
</style>
<script src="docs/swagger-ui-bundle.js" defer></script>
<script src="docs/start.js" defer></script>
</head>
<body>
<div id="docs"></div>
</body>
</html>
"""
# Requests go to the page's own origin, which may differ from the issuer's.
_SCRIPT = b"""\
const base = new URL(".", location.href).href.replace(/\\/$/, "");
fetch(`${base}/openapi.json`).then((response) => response.json()).then((spec) => SwaggerUIBundle({
  spec: { ...spec, servers: [{ url: base }] },
  dom_id: "#docs",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
}));
"""


@bp.get("/docs")
def page() -> Response:
    """Answer the page."""
    response = cached_response(_PAGE, MAX_AGE, "text/html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


@bp.get("/docs/start.js")
def script() -> Response:
    """Answer the script that starts Swagger UI."""
    return cached_response(_SCRIPT, MAX_AGE, "text/javascript")


@bp.get("/docs/<name>")
def asset(name: str) -> Response:
    """Answer a file of Swagger UI."""
    if name not in _TYPES:
        raise NotFound
    return cached_response(_read(name), MAX_AGE, _TYPES[name])


@lru_cache
def _read(name: str) -> bytes:
    return (files("flask_swagger_ui") / "dist" / name).read_bytes()
