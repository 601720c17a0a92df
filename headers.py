"""What every answer carries: headers for browsers and caches, and CORS for the origins the settings name."""

from __future__ import annotations

from flask import Flask, Response, current_app, request

from config import Settings, settings

# For whatever does not say otherwise.
EVERYWHERE = {
    # RFC 6749 §5.1 for tokens; agents and secrets are nobody's to keep either.
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # JSON opened in a browser loads nothing and is framed by nobody.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
# RFC 6797 §7.2: said over TLS only.
_HSTS = "max-age=31536000"
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Request-Id",
    "Access-Control-Max-Age": "600",  # seconds
}
_EXPOSED = "X-Request-Id, Retry-After, WWW-Authenticate, Location"


def init_app(app: Flask, settings: Settings) -> None:
    """Put the headers on every answer, and let pages of the origins named call."""
    app.after_request(_dress)
    if settings.cors_origins:
        app.before_request(_answer_preflight)
        app.after_request(_let_pages_read)


def _dress(response: Response) -> Response:
    headers = response.headers
    for name, value in EVERYWHERE.items():
        headers.setdefault(name, value)
    if request.is_secure:
        headers.setdefault("Strict-Transport-Security", _HSTS)
    return response


def _answer_preflight() -> Response | None:
    """What a browser asks before a page of another site may send its request (Fetch §4.8)."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or not _is_let_in():
        return None
    response: Response = current_app.response_class(status=204, headers=_PREFLIGHT)
    return response


def _let_pages_read(response: Response) -> Response:
    # An answer to one origin, or to none, must not be a cache's answer to another.
    response.vary.add("Origin")
    if _is_let_in():
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    return response


def _is_let_in() -> bool:
    # Never Access-Control-Allow-Credentials: a page shows a token it holds, no cookie or kept password.
    return request.headers.get("Origin") in settings().cors_origins
