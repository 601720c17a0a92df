"""Strict request parsing, field types, `Problem`, and a `Blueprint` with its documentation."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

import flask_smorest
import marshmallow
from authlib.oauth2.rfc6749 import InvalidRequestError
from flask import Request, Response, request
from joserfc.jwk import RSAKey, import_key
from marshmallow import EXCLUDE, Schema, ValidationError, fields
from marshmallow.validate import ContainsNoneOf, Length, Regexp
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge

MAX_BODY = 64 * 1024  # bytes
FORM, JSON = "application/x-www-form-urlencoded", "application/json"


class Problem(Exception):
    """An error response: raise it anywhere, the app's error handler answers it."""

    def __init__(
        self,
        status: int,
        error: str,
        description: str,
        *,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(f"{status} {error}: {description}")
        self.status = status
        self.body = {"error": error, "error_description": description, **members}
        self.headers = headers or {}


def check_path() -> None:
    """Refuse a path with NUL, which PostgreSQL's text cannot hold, or with `//` first, which proxies miss."""
    if "\0" in request.path or request.environ["PATH_INFO"].startswith("//"):
        raise NotFound


def read_body() -> None:
    """Read the whole body before the route runs, also where a route ignores bodies.

    :raises Problem: 400, when the body is incomplete or malformed; 415, when it is compressed.
    :raises RequestEntityTooLarge: when it is longer than MAX_BODY.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":  # RFC 9110 §8.4
        raise Problem(415, "unsupported_media_type", "Send the body without a Content-Encoding.")
    length = request.content_length
    if length is not None and length > MAX_BODY:
        raise RequestEntityTooLarge
    try:
        raw = request.get_data()
    except HTTPException:
        raise
    except Exception:  # the server's parser has its own exceptions for malformed chunks and trailers
        raise Problem(400, "invalid_request", "The body is not framed as HTTP/1.1 requires.") from None
    # werkzeug cuts a chunked body at MAX_CONTENT_LENGTH without an error: the app sets that to one byte more.
    if len(raw) > MAX_BODY:
        raise RequestEntityTooLarge
    # A truncated form may be valid and mean something else: a token of every scope instead of one.
    if length is not None and len(raw) < length:
        raise Problem(400, "invalid_request", "The body is shorter than its Content-Length.")


def parse_json(raw: bytes) -> Any:
    """Parse JSON strictly (RFC 8259): UTF-8 only, no NaN, no repeated names. A byte order mark is ignored.

    :raises ValueError: with a sentence that names the problem.
    """
    try:
        hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _unique}
        return json.loads(raw.decode("utf-8-sig"), parse_int=_parse_int, **hooks)
    except UnicodeDecodeError:
        raise ValueError("The body is not valid UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise ValueError("The body is nested too deeply.") from None


def read_parameters(names: Collection[str]) -> dict[str, Any]:
    """Read the OAuth parameters called `names` from a form or JSON body (RFC 6749 §3.2).

    Each is a string; `resource` (RFC 8707 §2), also called `audience` (RFC 8693), may repeat and is a list.
    Empty ones, and null in JSON, count as left out.

    :raises InvalidRequestError: when the body is malformed or a parameter is repeated or no string.
    """
    parameters: dict[str, Any] = {}
    resources: list[Any] = []
    for name, value in _read_pairs():
        if value is None:
            continue
        if name in ("resource", "audience"):
            resources += value if isinstance(value, list) else [value]
        elif name in parameters:
            raise InvalidRequestError("A parameter is repeated.")
        else:
            parameters[name] = value
    if len(resources) > 17:  # an agent's audiences, and the server's own
        raise InvalidRequestError("Too many resources.")
    known = {name: value for name, value in parameters.items() if name in names}
    for name, value in [*known.items(), *(("resource", resource) for resource in resources)]:
        if not is_text(value):
            raise InvalidRequestError(f"{name} must be a string.")
    known["resource"] = list(dict.fromkeys(filter(None, resources)))
    return {name: value for name, value in known.items() if value}


def _read_pairs() -> list[tuple[str, Any]]:
    raw = request.get_data()
    try:
        if request.mimetype == FORM and raw.lstrip()[:1] == b"{":
            raise InvalidRequestError("The body is JSON: send Content-Type: application/json with it.")
        if request.mimetype == FORM:
            return parse_qsl(raw.decode(), keep_blank_values=True, errors="strict", max_num_fields=100)
        if request.mimetype == JSON:
            body = parse_json(raw)
            if not isinstance(body, dict):
                raise InvalidRequestError("The body must be a JSON object.")
            return list(body.items())
    except UnicodeDecodeError:
        raise InvalidRequestError("The body is not valid UTF-8.") from None
    except ValueError:
        raise InvalidRequestError("The body cannot be parsed.") from None
    raise InvalidRequestError("Send the body as application/x-www-form-urlencoded or application/json.")


def parse_authorization(header: str) -> Authorization | None:
    """Parse an Authorization header; None when it is malformed."""
    try:
        return Authorization.from_header(header)
    except ValueError:  # werkzeug raises it for base64 that is not ASCII
        return None


def canonical(name: str) -> str:
    """Return the spelling by which audiences and issuers are compared (RFC 3986 §6.2.2-6.2.3).

    Scheme and host in lower case, no default port, `/` for an empty path. What is no URI with a host stays,
    and what urlsplit would change in other ways.
    """
    if len(name) > 255 or not re.fullmatch(r"[!-~]+", name) or re.search(r"[#\\]|\?$", name):
        return name
    try:
        parts = urlsplit(name)
    except ValueError:
        return name
    if not parts.scheme or not parts.netloc:
        return name
    user, at, host = parts.netloc.rpartition("@")
    host = host.lower().removesuffix({"http": ":80", "https": ":443"}.get(parts.scheme, ":"))
    return parts._replace(netloc=user + at + host.removesuffix(":"), path=parts.path or "/").geturl()


def is_text(value: object) -> bool:
    """Return whether `value` is a string without lone surrogates, which UTF-8 lacks, and without NUL."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


@lru_cache(maxsize=256)
def route_name(rule: str) -> str:
    """Return a route without its converters, as logs and metrics name it: `/agents/<agent_id>`."""
    return re.sub(r"<[^:<>]+:", "<", rule)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"The body is not valid JSON: {name} is not a JSON number.")


def _parse_int(text: str) -> int:
    if len(text) > 1000:  # Python refuses more than 4300 digits, with a sentence of its own
        raise ValueError("The body is not valid JSON: a number is too long.")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("The body is not valid JSON: a name is repeated in an object.")
    return names


class Parser(FlaskParser):
    """webargs' parser with strict JSON bodies and no unknown query parameters."""

    DEFAULT_UNKNOWN_BY_LOCATION = FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION | {"query": marshmallow.RAISE}
    DEFAULT_VALIDATION_STATUS = 400  # in the OpenAPI document

    def load_json(self, req: Request, schema: marshmallow.Schema) -> Any:
        """Parse the body; an absent body is an empty object."""
        if req.args:
            raise Problem(400, "invalid_request", "Send the fields in the body, not in the URL.")
        raw = req.get_data()
        if not raw:
            return {}
        if req.mimetype != JSON:
            raise Problem(
                415, "unsupported_media_type", "Send the body as JSON, with Content-Type: application/json."
            )
        try:
            return parse_json(raw)
        except ValueError as error:
            raise Problem(400, "invalid_request", str(error), fields={"body": [str(error)]}) from None

    def handle_error(
        self, error: marshmallow.ValidationError, req: Request, schema: marshmallow.Schema, **kwargs: Any
    ) -> NoReturn:
        # webargs keys the messages by location, of which there is one.
        refuse(next(iter(error.messages_dict.values())))


def refuse(messages: dict[Any, Any]) -> NoReturn:
    """Raise Marshmallow's error messages as a Problem.

    :raises Problem: 400, with the messages of each field.
    """
    flat = _flatten(messages)
    texts = [f"{name[:64]!r}: {problems[0]}" for name, problems in list(flat.items())[:3]]
    if len(flat) > 3:
        texts.append("And more, in fields.")
    raise Problem(400, "invalid_request", " ".join(texts), fields=flat)


def _flatten(messages: dict[Any, Any], path: str = "") -> dict[str, list[str]]:
    """Return nested messages under dotted names: `{"scopes.1": ["Not a valid string."]}`."""
    flat: dict[str, list[str]] = {}
    for name, value in messages.items():
        # Marshmallow's own names: `_schema` for the whole, `key` and `value` for an entry of a dictionary.
        nameless = name == "_schema" or ("." in path and name in ("key", "value"))
        here = path if nameless else f"{path}.{name}".lstrip(".")
        if isinstance(value, dict):
            flat |= _flatten(value, here)
        else:
            flat[here or "body"] = value
    return flat


# For RS256 and PS256, ES256, EdDSA.
_ASSERTION_KEYS = {("RSA", None), ("EC", "P-256"), ("OKP", "Ed25519")}
_RSA_BITS = range(2048, 6144 + 1)  # joserfc verifies signatures of up to 1024 characters
_JWK_MEMBERS = ("kty", "n", "e", "crv", "x", "y", "kid", "alg", "use")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Text(fields.String):
    """A string of `min` to `max` characters, not all spaces, one line unless `lines`."""

    def __init__(
        self, *, max: int, min: int = 1, lines: bool = False, metadata: Any = None, **kwargs: Any
    ) -> None:
        # The rules of _deserialize for the OpenAPI document (ECMA 262).
        control = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f" if lines else r"\x00-\x1f\x7f"
        visible = rf"[^{control}]*[^\s{control}][^{control}]*"
        pattern = rf"^{visible}$" if min else rf"^({visible})?$"
        super().__init__(metadata={"pattern": pattern, **(metadata or {})}, **kwargs)
        self.validators = [Length(min=min, max=max), *self.validators]
        self._lines = lines

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if text is None or not is_text(text):
            raise ValidationError("Must be Unicode text without NUL characters.")
        if _CONTROL.search(re.sub(r"[\t\n\r]", "", text) if self._lines else text):
            raise ValidationError("Must not hold control characters.")
        if text and text.isspace():
            raise ValidationError("Must not be blank.")
        return text


class StrictBoolean(fields.Boolean):
    """A JSON boolean: true, but neither 1 nor "yes"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Timestamp(fields.Field[datetime]):
    """A moment as RFC 3339 in UTC."""

    def _serialize(self, value: datetime | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else rfc3339(value)


def no_repeats(values: list[str]) -> None:
    """Raise ValidationError for a list that repeats a value."""
    if len(set(values)) < len(values):
        raise ValidationError("Must not repeat a value.")


def scope() -> Text:
    """Return a field for a scope token (RFC 6749 §3.3)."""
    return Text(
        max=128,
        metadata={"pattern": r"^[\x21\x23-\x5b\x5d-\x7e]+$"},
        validate=Regexp(r"[\x21\x23-\x5b\x5d-\x7e]+\Z", error="Not a scope token of RFC 6749, section 3.3."),
    )


def audience() -> Text:
    """Return a field for an audience: an absolute URI without a fragment (RFC 8707 §2), or a plain name."""
    return Text(
        max=255,
        metadata={"pattern": r"^[!$-;=?-\[\]-~]+$"},  # both rules below in one, for the document
        validate=[
            Regexp(r"[\x21-\x7e]+\Z", error="Must be printable ASCII without spaces."),
            ContainsNoneOf('#"\\<>', error="Must be an absolute URI without a fragment, or a plain name."),
        ],
    )


class PublicKeys(fields.Field[dict[str, Any]]):
    """A JWK set (RFC 7517 §5) of 1 to 8 public keys that `private_key_jwt` can use."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != {"keys"} or not isinstance(value["keys"], list):
            raise ValidationError('Must be a JWK set: {"keys": [...]}.')
        if not 1 <= len(value["keys"]) <= 8:
            raise ValidationError("Must hold 1 to 8 keys.")
        return {"keys": [_public_jwk(jwk) for jwk in value["keys"]]}


def _public_jwk(jwk: Any) -> dict[str, Any]:
    # Private and symmetric keys (RFC 7517 §9.2) are refused before they are imported: the import of an
    # RSA key without its primes searches for them, which may take minutes.
    if isinstance(jwk, dict) and (jwk.get("kty") == "oct" or "d" in jwk):
        raise ValidationError("Holds a private or symmetric key: send public keys only.")
    try:
        with warnings.catch_warnings(action="error"):  # joserfc only warns of short RSA keys
            key = import_key(jwk)
        parsed: dict[str, Any] = dict(key.as_dict())
    except Exception:  # cryptography and joserfc raise many types for an invalid key
        raise ValidationError("Holds a key that cannot be read, or an RSA key under 2048 bits.") from None
    if (key.key_type, parsed.get("crv")) not in _ASSERTION_KEYS or parsed.get("use", "sig") != "sig":
        raise ValidationError("Keys must be for signatures: RSA, EC P-256 or OKP Ed25519.")
    if isinstance(key, RSAKey):
        _check_rsa(key)
    # Other members, which may be nested deeply, are dropped.
    return {name: parsed[name] for name in _JWK_MEMBERS if name in parsed}


def _check_rsa(key: RSAKey) -> None:
    numbers = key.public_key.public_numbers()
    # RFC 8017 §3.1 allows an exponent as long as the modulus, which takes 100 times as long to verify.
    if numbers.n.bit_length() not in _RSA_BITS or numbers.n % 2 == 0 or numbers.e >= 2**32:
        raise ValidationError("RSA keys must have 2048 to 6144 bits, odd ones, and an exponent under 2^32.")


_Decorator = Callable[[Any], Any]

# The callers of an operation: alternatives, each the name of a security scheme.
BY_OPERATOR: list[dict[str, list[str]]] = [{"adminToken": []}, {"adminBasic": []}, {"accessToken": ["admin"]}]
BY_AGENT: list[dict[str, list[str]]] = [{"accessToken": []}]
BY_CLIENT: list[dict[str, list[str]]] = [{"clientBasic": []}, {}]  # {}: the credentials are in the body
BY_ANY = [*BY_CLIENT, *BY_AGENT, *BY_OPERATOR[:2]]

_MORE_HEADERS = {201: ["Location"], 401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}
# The error responses that routes share: a description, and an example for each code.
ERRORS: dict[int, tuple[str, dict[str, str]]] = {
    400: ("The request is invalid.", {"invalid_request": "'name': Must not be blank."}),
    401: (
        "The credentials are missing or invalid.",
        {
            "unauthorized": "Send Authorization: Bearer with an access token.",
            "invalid_token": "The access token has expired, was revoked or is malformed.",
        },
    ),
    403: ("The caller may not do this.", {"insufficient_scope": "This needs the scope admin."}),
    404: ("Nothing has this id.", {"not_found": "No agent has this id."}),
    409: ("The current state does not allow this.", {}),
    413: ("The body is too large.", {"payload_too_large": f"A body may hold at most {MAX_BODY} bytes."}),
    415: ("The body is not JSON.", {"unsupported_media_type": "Send the body as application/json."}),
    429: ("Too many failed sign-ins, or tokens.", {"too_many_requests": "Try again after Retry-After."}),
    503: ("The database does not answer.", {"temporarily_unavailable": "Try again shortly."}),
}


def rfc3339(moment: datetime) -> str:
    """Format a moment in UTC as RFC 3339, for example `2026-06-01T12:00:00Z`."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def cached_response(body: bytes, max_age: int, mimetype: str = "application/json") -> Response:
    """Return a response with an ETag, cacheable for `max_age` seconds, or 304 to a client that has it."""
    response = Response(body, mimetype=mimetype)
    response.headers["Cache-Control"] = f"public, max-age={max_age}"
    response.set_etag(sha256(body).hexdigest()[:32])
    if request.if_none_match:
        response.make_conditional(request)
    return response


def doc(description: str, *examples: Any, **others: Any) -> dict[str, Any]:
    """Return keyword arguments that document a field: description, examples, JSON Schema keywords."""
    if examples:
        others["examples"] = list(examples)
    return {"metadata": {"description": description, **others}}


class Error(Schema):
    """The shape of every error."""

    class Meta:
        unknown = EXCLUDE  # later versions may add fields

    error = fields.String(required=True, **doc("A code for programs."))
    error_description = fields.String(required=True, **doc("A sentence for people: the problem, the remedy."))
    fields_ = fields.Dict(
        data_key="fields",
        values=fields.List(fields.String()),
        **doc("The problems of each invalid field.", {"name": ["Must not be blank."]}),
    )


def _unwrapped(decorator: _Decorator) -> _Decorator:
    def document(view: Any) -> Any:
        view._apidoc = decorator(view)._apidoc
        return view

    return document


class Blueprint(flask_smorest.Blueprint):
    """flask-smorest's blueprint with strict parsing, and with security and errors in its documentation.

    :param security: the callers of its routes; `@bp.doc(security=…)` sets those of one route.
    """

    ARGUMENTS_PARSER = Parser()

    def __init__(self, *args: Any, security: list[dict[str, list[str]]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._security = security
        self._prepare_doc_cbks.append(self._prepare_security_doc)

    def errors(self, status: int, **examples: str) -> _Decorator:
        """Document the error codes of a status, each with an example; without examples the shared ones."""
        response = error_response(status, examples) if examples else {"response": HTTPStatus(status).name}
        return self.alt_response(status, **response)

    def form(self, body: type[Schema], response: type[Schema]) -> _Decorator:
        """Document the form and the response of a view that parses and serialises by itself."""
        text = {"description": "JSON is accepted too.", "content": {FORM: {"schema": body}}}
        return lambda view: self.doc(requestBody=text)(self.alt_response(200, schema=response)(view))

    def cached(self, schema: type[Schema] | dict[str, Any]) -> _Decorator:
        """Document a cacheable response with an ETag, and the 304 for a client that has it."""
        headers = {"ETag": "ETag", "Cache-Control": "Cache-Control"}
        changed = self.alt_response(200, schema=schema, headers=headers)
        unchanged = self.alt_response(304, description="Not modified.", headers=headers)
        return lambda view: self.doc(parameters=["IF_NONE_MATCH"])(changed(unchanged(view)))

    def alt_response(self, *args: Any, **kwargs: Any) -> _Decorator:
        """Document a response as flask-smorest does, but leave the view unwrapped: it saves 6 µs a call."""
        return _unwrapped(super().alt_response(*args, **kwargs))

    @staticmethod
    def doc(**kwargs: Any) -> _Decorator:
        """Document an operation as flask-smorest does, but leave the view unwrapped."""
        return _unwrapped(flask_smorest.Blueprint.doc(**kwargs))

    def _prepare_security_doc(self, doc: dict[str, Any], doc_info: Any, **kwargs: Any) -> dict[str, Any]:
        return {**doc, "security": self._security} if self._security else doc


def error_response(status: int, examples: dict[str, str]) -> dict[str, Any]:
    """Document an error response with an example for each code."""
    values = {code: {"value": {"error": code, "error_description": text}} for code, text in examples.items()}
    description = ERRORS[status][0]
    return {"description": description, "schema": Error, "examples": values, "headers": headers_of(status)}


def headers_of(status: int) -> dict[str, str]:
    """Return the headers of a response, each as the name of a component."""
    return {name: name for name in ["X-Request-Id", *_MORE_HEADERS.get(status, [])]}
