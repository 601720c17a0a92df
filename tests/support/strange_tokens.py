"""Strings that are no access token of Lanyard's."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable


def encoded(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def rewritten(token: str, header: object = None, claims: object = None, signature: str | None = None) -> str:
    """The token with parts replaced, and the old signature unless another is given."""
    parts = token.split(".")
    new = (
        encoded(header) if header is not None else parts[0],
        encoded(claims) if claims is not None else parts[1],
        signature if signature is not None else parts[2],
    )
    return ".".join(new)


STRANGE_TOKENS: dict[str, Callable[[str], str]] = {
    "nothing": lambda token: "",
    "a word": lambda token: "hello",
    "dots": lambda token: "..",
    "no signature": lambda token: token.rsplit(".", 1)[0] + ".",
    "cut short": lambda token: token[:-10],
    "not ASCII": lambda token: "é.é.é",
    "refresh token": lambda token: "rt_" + "a" * 65,
    "alg none": lambda token: rewritten(token, {"alg": "none", "typ": "at+jwt"}, signature=""),
    "alg a list": lambda token: rewritten(token, {"alg": [], "typ": "at+jwt"}),
    "alg a number": lambda token: rewritten(token, {"alg": 1}),
    "alg an object": lambda token: rewritten(token, {"alg": {}}),
    "no alg": lambda token: rewritten(token, {"typ": "at+jwt"}),
    "kid an object": lambda token: rewritten(token, {"alg": "ES256", "kid": {}}),
    "kid unknown": lambda token: rewritten(token, {"alg": "ES256", "typ": "at+jwt", "kid": "x"}),
    "crit": lambda token: rewritten(token, {"alg": "ES256", "crit": ["exp"], "exp": 1}),
    "crit a number": lambda token: rewritten(token, {"alg": "ES256", "crit": 1}),
    "header a list": lambda token: rewritten(token, []),
    "header null": lambda token: rewritten(token, b"null"),
    "header nested": lambda token: rewritten(token, b"[" * 20_000),
    "header not JSON": lambda token: rewritten(token, b"\xff\xfe"),
    "claims swapped": lambda token: rewritten(token, claims={"sub": "cid_x", "client_id": "cid_x"}),
    "claims a list": lambda token: rewritten(token, claims=[]),
}
