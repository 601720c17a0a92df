"""What crosses the wire for every route: the one error shape going out, strict bodies coming in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import marshmallow
from flask import Request
from gunicorn.http.errors import ParseException
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import RequestEntityTooLarge

MAX_BODY = 64 * 1024  # bytes


class Problem(Exception):
    """An answer that is an error: raise it anywhere, one handler gives it the one shape."""

    def __init__(
        self,
        status: int,
        error: str,
        description: str,
        *,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {error}: {description}")
        self.status = status
        self.body: dict[str, Any] = {"error": error, "error_description": description}
        if fields:
            self.body["fields"] = fields
        self.headers = headers or {}


def read_body(req: Request) -> bytes:
    """The body, refused when it is too large however it is sent.

    werkzeug cuts a chunked body at MAX_CONTENT_LENGTH without a word: the app sets that one higher.
    """
    try:
        raw = req.get_data()
    except ParseException:
        raise Problem(400, "invalid_request", "The body's chunks cannot be told apart.") from None
    if len(raw) > MAX_BODY:
        raise RequestEntityTooLarge
    # A body cut short could mean something else: rotate at once, instead of with a grace period.
    if req.content_length is not None and len(raw) < req.content_length:
        raise Problem(400, "invalid_request", "The body is shorter than its Content-Length.")
    return raw


def parse_json(raw: bytes) -> Any:
    """Parse a JSON text as RFC 8259 has it: no NaN, no repeated names, nothing that is not UTF-8.

    :raises ValueError: with a sentence that says what is wrong.
    """
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ValueError("The body is not valid UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise ValueError("The body is nested too deeply.") from None


def parse_authorization(header: str) -> Authorization | None:
    """The Authorization header taken apart, or None when it cannot be."""
    try:
        return Authorization.from_header(header)
    except ValueError:  # werkzeug's answer to base64 that is not ASCII
        return None


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can carry and C strings keep: no lone surrogates, no NUL."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


@lru_cache(maxsize=256)
def route_name(rule: str) -> str:
    """A route as logs and metrics name it: without what its parts may look like."""
    return re.sub(r"<[^:<>]+:", "<", rule)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"The body is not valid JSON: {name} is not a JSON number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("The body is not valid JSON: a name is repeated in an object.")
    return names


class Parser(FlaskParser):
    """Reads arguments for the routes: strict JSON bodies, and no query parameter it does not know."""

    DEFAULT_UNKNOWN_BY_LOCATION = {  # noqa: RUF012 - webargs reads it as a class attribute
        **FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION,
        "query": marshmallow.RAISE,
    }
    DEFAULT_VALIDATION_STATUS = 400  # for the OpenAPI document: handle_error answers

    def load_json(self, req: Request, schema: marshmallow.Schema) -> Any:
        """The body as JSON; an absent body is an empty object."""
        if req.args:
            raise Problem(400, "invalid_request", "Send the fields in the body, not in the URL.")
        raw = read_body(req)
        if not raw:
            return {}
        if req.mimetype != "application/json":
            raise Problem(415, "unsupported_media_type", "Send the body as application/json.")
        try:
            return parse_json(raw)
        except ValueError as error:
            raise Problem(400, "invalid_request", str(error), fields={"body": [str(error)]}) from None

    def handle_error(
        self, error: marshmallow.ValidationError, req: Request, schema: marshmallow.Schema, **kwargs: Any
    ) -> NoReturn:
        """Turn what Marshmallow found into the one error shape."""
        # webargs keys the messages by where the arguments came from: there is one place.
        refuse(next(iter(error.messages_dict.values())))


def refuse(messages: dict[Any, Any]) -> NoReturn:
    """Refuse input for what Marshmallow found wrong with it.

    :raises Problem: 400, with the messages of each field.
    """
    found = _flat(messages)
    raise Problem(400, "invalid_request", _sentence(found), fields=found)


def _flat(messages: dict[Any, Any], path: str = "") -> dict[str, list[str]]:
    """Marshmallow's nested messages under dotted names: `{"scopes.1": ["Not a valid string."]}`."""
    flat: dict[str, list[str]] = {}
    for name, found in messages.items():
        # `_schema` is about the whole; below a dictionary's entry Marshmallow says `key` or `value`.
        nameless = name == "_schema" or ("." in path and name in ("key", "value"))
        here = path if nameless else f"{path}.{name}".lstrip(".")
        if isinstance(found, dict):
            flat |= _flat(found, here)
        else:
            flat[here or "body"] = found
    return flat


def _sentence(found: Mapping[str, list[str]], most: int = 3) -> str:
    told = [f"{name[:64]!r}: {messages[0]}" for name, messages in list(found.items())[:most]]
    return " ".join([*told, "And more, in fields."] if len(found) > most else told)
