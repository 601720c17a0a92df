"""What every route shares: strict parsing, field types, `Problem`, a self-documenting `Blueprint`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any, NoReturn

import flask_smorest
import marshmallow
from flask import Request, Response, request
from joserfc.jwk import RSAKey, import_key
from marshmallow import EXCLUDE, Schema, ValidationError, fields
from marshmallow.validate import ContainsNoneOf, Length, Regexp
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

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


def read_body() -> None:
    """Read a request's body before anything is done with the request, also where a route ignores bodies.

    werkzeug cuts a chunked body at MAX_CONTENT_LENGTH without a word: the app sets that one higher.

    :raises Problem: 400, when the body did not arrive whole.
    :raises RequestEntityTooLarge: when it is longer than MAX_BODY.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    length = request.content_length
    if length is not None and length > MAX_BODY:
        raise RequestEntityTooLarge
    try:
        raw = request.get_data()
    except HTTPException:
        raise
    except Exception:  # the server's parser has its own exceptions for malformed chunks and trailers
        raise Problem(400, "invalid_request", "The body is not framed as HTTP/1.1 requires.") from None
    if len(raw) > MAX_BODY:
        raise RequestEntityTooLarge
    # A body cut short could mean something else: rotate at once, instead of with a grace period.
    if length is not None and len(raw) < length:
        raise Problem(400, "invalid_request", "The body is shorter than its Content-Length.")


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
        raw = req.get_data()
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


# The key types of RS256 and PS256, ES256, and EdDSA.
_ASSERTION_KEYS = {("RSA", None), ("EC", "P-256"), ("OKP", "Ed25519")}
# joserfc verifies no longer signature: 1024 characters of base64url.
_RSA_BITS = range(2048, 6144 + 1)
_JWK_MEMBERS = ("kty", "n", "e", "crv", "x", "y", "kid", "alg", "use")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Text(fields.String):
    """A string of `min` to `max` characters that are not all spaces; one line unless `lines`."""

    def __init__(
        self,
        *,
        max: int,
        min: int = 1,
        lines: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The rules of _deserialize as a pattern (ECMA 262), for the OpenAPI document.
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


class StrictInteger(fields.Integer):
    """A JSON integer: 1, but neither 1.0, "1" nor true."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **kwargs)


class StrictBoolean(fields.Boolean):
    """A JSON boolean: true, but neither 1 nor "yes"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Timestamp(fields.Field[datetime]):
    """RFC 3339 UTC with `Z`, whole seconds."""

    def _serialize(self, value: datetime | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else rfc3339(value)


def no_repeats(values: list[str]) -> None:
    """Refuse a list that holds a value twice."""
    if len(set(values)) < len(values):
        raise ValidationError("Must not repeat a value.")


def scope() -> Text:
    """A scope token, RFC 6749 §3.3."""
    return Text(
        max=128,
        metadata={"pattern": r"^[\x21\x23-\x5b\x5d-\x7e]+$"},
        validate=Regexp(r"[\x21\x23-\x5b\x5d-\x7e]+\Z", error="Not a scope token of RFC 6749, section 3.3."),
    )


def audience() -> Text:
    """An audience: RFC 8707 §2's absolute URI without a fragment, or a plain name."""
    return Text(
        max=255,
        metadata={"pattern": r"^[!$-;=?-\[\]-~]+$"},  # both rules below in one, for the document
        validate=[
            Regexp(r"[\x21-\x7e]+\Z", error="Must be printable ASCII without spaces."),
            ContainsNoneOf('#"\\<>', error="Must be an absolute URI without a fragment, or a plain name."),
        ],
    )


_NUMBER = {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}  # base64url, RFC 7518 §6


def _jwk_schema(kty: str, *numbers: str, **members: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {"kty": {"const": kty}, **members, **dict.fromkeys(numbers, _NUMBER)}
    required = list(properties)
    properties |= {"use": {"const": "sig"}, "d": {"not": {}}}  # a `d` makes a private key
    return {"type": "object", "required": required, "properties": properties}


_JWKS = [
    _jwk_schema("RSA", "n", "e"),
    _jwk_schema("EC", "x", "y", crv={"const": "P-256"}),
    _jwk_schema("OKP", "x", crv={"const": "Ed25519"}),
]
_JWK_SET = {
    "required": ["keys"],
    "properties": {"keys": {"type": "array", "minItems": 1, "maxItems": 8, "items": {"oneOf": _JWKS}}},
    "additionalProperties": False,
}


class PublicKeys(fields.Field[dict[str, Any]]):
    """A JWK set (RFC 7517 §5) of 1 to 8 public keys that `private_key_jwt` can use."""

    def __init__(self, *, metadata: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(metadata={**_JWK_SET, **metadata}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != {"keys"} or not isinstance(value["keys"], list):
            raise ValidationError('Must be a JWK set: {"keys": [...]}.')
        if not 1 <= len(value["keys"]) <= 8:
            raise ValidationError("Must hold 1 to 8 keys.")
        return {"keys": [_public_jwk(jwk) for jwk in value["keys"]]}


def _public_jwk(jwk: Any) -> dict[str, Any]:
    # RFC 7517 §9.2: a private or symmetric key has no business here. It is refused unread, for to read
    # an RSA key without its primes is to look for them, which may take minutes.
    if isinstance(jwk, dict) and (jwk.get("kty") == "oct" or "d" in jwk):
        raise ValidationError("Holds a private or symmetric key: send public keys only.")
    try:
        with warnings.catch_warnings(action="error"):  # joserfc only warns of short RSA keys
            key = import_key(jwk)
        parsed: dict[str, Any] = dict(key.as_dict())
    except Exception:  # cryptography and joserfc raise many kinds for a bad key
        raise ValidationError("Holds a key that cannot be read, or an RSA key under 2048 bits.") from None
    if (key.key_type, parsed.get("crv")) not in _ASSERTION_KEYS or parsed.get("use", "sig") != "sig":
        raise ValidationError("Keys must be for signatures: RSA, EC P-256 or OKP Ed25519.")
    if isinstance(key, RSAKey):
        _check_rsa(key)
    # No more than verifying needs: an operator's own members may be as deep as JSON gets.
    return {name: parsed[name] for name in _JWK_MEMBERS if name in parsed}


def _check_rsa(key: RSAKey) -> None:
    numbers = key.public_key.public_numbers()
    # A product of odd primes is odd. RFC 8017 §3.1 lets the exponent be as long as the modulus, but then
    # each check of a signature takes a hundred times as long.
    if numbers.n.bit_length() not in _RSA_BITS or numbers.n % 2 == 0 or numbers.e >= 2**32:
        raise ValidationError("RSA keys must have 2048 to 6144 bits, odd ones, and an exponent under 2^32.")


_Decorator = Callable[[Any], Any]
FORM, JSON = "application/x-www-form-urlencoded", "application/json"

# Who may call: alternatives, each by the name of a security scheme.
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
    """Return a cacheable response with an ETag, or 304 to a client that has it.

    :param max_age: seconds.
    """
    response = Response(body, mimetype=mimetype)
    response.headers["Cache-Control"] = f"public, max-age={max_age}"
    response.set_etag(sha256(body).hexdigest()[:32])
    if request.if_none_match:
        response.make_conditional(request)
    return response


def doc(description: str, *examples: Any, **others: Any) -> dict[str, Any]:
    """Keyword arguments that document a field: its description, examples, and other JSON Schema keywords."""
    shown = {"examples": list(examples)} if examples else {}
    return {"metadata": {"description": description, **shown, **others}}


class Error(Schema):
    """The one shape of every error."""

    class Meta:
        """Later versions may add fields."""

        unknown = EXCLUDE

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

    :param security: who may call its routes; `@bp.doc(security=…)` says so of one route.
    """

    ARGUMENTS_PARSER = Parser()

    def __init__(self, *args: Any, security: list[dict[str, list[str]]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._security = security
        self._prepare_doc_cbks.append(self._prepare_security_doc)

    def errors(self, status: int, **examples: str) -> _Decorator:
        """Document the error codes of a status, each with an example of its description.

        Without examples: the codes that routes share. `_implied_errors` adds what follows from the route.
        """
        told = error_response(status, examples) if examples else {"response": HTTPStatus(status).name}
        return self.alt_response(status, **told)

    def form(self, body: type[Schema], response: type[Schema]) -> _Decorator:
        """Document the form body and the response of a view that parses and serialises by itself."""
        text = {"description": "JSON is accepted too.", "content": {FORM: {"schema": body}}}
        return lambda view: self.doc(requestBody=text)(self.alt_response(200, schema=response)(view))

    def cached(self, schema: type[Schema] | dict[str, Any]) -> _Decorator:
        """Document a cacheable response with an ETag, and the 304 for a client that has it."""
        headers = {"ETag": "ETag", "Cache-Control": "Cache-Control"}
        found = self.alt_response(200, schema=schema, headers=headers)
        unchanged = self.alt_response(304, description="Not modified.", headers=headers)
        return lambda view: self.doc(parameters=["IF_NONE_MATCH"])(found(unchanged(view)))

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
