"""The OpenAPI 3.1 document: made of the routes and their schemas when first asked for, then kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from apispec import APISpec, BasePlugin
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.ext.marshmallow.openapi import OpenAPIConverter
from flask import Response, current_app
from flask_smorest.spec.plugins import FlaskPlugin
from marshmallow import Schema, fields
from werkzeug.routing import Rule

import glossary
import metadata
import oauth_bodies as bodies
import schemas
import terms
from config import VERSION, Settings, settings
from kinds import PublicKeys, Text, Timestamp, no_repeats
from wire import MAX_BODY, Blueprint

blueprint = Blueprint("document", __name__)

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
ABOUT = f"""Identity for AI agents: an OAuth 2.0 authorization server.

Every answer is JSON, and every error has the one shape of the schema `Error`. Times are RFC 3339 in UTC,
durations whole seconds. A body holds at most {MAX_BODY} bytes. Fields of a management body that are not
known are refused, unknown OAuth parameters are ignored. An `X-Request-Id` of 1 to 64 letters, digits and
`._-` comes back in the answer; else Lanyard makes one.

Besides the errors named below: an address answers 405 (with `Allow`) to a method it does not have, there is
a 404 at every other address, 500 says that Lanyard failed, and what is no good HTTP is told so with 400, 408,
413, 414, 417, 431 or 501.
"""


@blueprint.get("/openapi.json", tags=["service"])
def openapi() -> Response:
    """This document."""
    return metadata.answer(metadata.document(build, settings()), metadata.MAX_AGE)


def build(settings: Settings) -> dict[str, Any]:
    """The document of the running app."""
    spec = APISpec(
        "Lanyard",
        VERSION,
        "3.1.0",
        [FlaskPlugin(), _Operations(settings), _Marshmallow()],
        info={"description": ABOUT},
        servers=[{"url": settings.issuer}],
    )
    for name, (scheme, description) in terms.SECURITY_SCHEMES.items():
        spec.components.security_scheme(name, {"type": "http", "scheme": scheme, "description": description})
    for name, (description, schema) in terms.HEADERS.items():
        spec.components.header(name, {"description": description, "required": True, "schema": schema})
    for name, refusal in terms.REFUSALS.items():
        spec.components.response(name, _refused(refusal))
    for name, part in current_app.blueprints.items():
        part.register_views_in_doc(_Smorest, current_app, spec, name=name, parameters=[])  # type: ignore[attr-defined]
        if part.description:  # type: ignore[attr-defined]
            spec.tag({"name": name, "description": part.description})  # type: ignore[attr-defined]
    document = spec.to_dict()
    _add_examples(document)
    return document


class _Smorest:
    """What flask-smorest's blueprints ask of its Api, which would answer errors in its own way."""

    DEFAULT_ERROR_RESPONSE_NAME = None
    DEFAULT_RESPONSE_CONTENT_TYPE = JSON


class _Operations(BasePlugin):
    """Completes each operation that flask-smorest made of a route, by the tables above."""

    def __init__(self, settings: Settings) -> None:
        self._local = settings.local

    def path_helper(self, *args: Any, parameters: list[Any] | None = None, **kwargs: Any) -> None:
        """apispec's hook: what the parts of a path look like."""
        for parameter in parameters or ():
            parameter["schema"] = terms.PATH_PARAMETERS[parameter["name"]]

    def schema_helper(self, name: str, definition: Any, **kwargs: Any) -> dict[str, Any]:
        """apispec's hook: the docstring describes the schema."""
        described = {"description": inspect.getdoc(kwargs["schema"])} if "schema" in kwargs else {}
        return {**described, **terms.RULES.get(name, {})}

    def operation_helper(self, *args: Any, rule: Rule | None = None, **kwargs: Any) -> None:
        """apispec's hook."""
        if rule is None:
            return
        part, _, name = rule.endpoint.partition(".")
        for method, operation in kwargs["operations"].items():
            operation_id = terms.OPERATION_IDS.get(name, name)
            operation["operationId"] = f"{operation_id}_by_put" if method == "put" else operation_id
            operation["summary"] = " ".join(operation["summary"].split()).removesuffix(".")
            self._complete(operation, part, name, "<" in rule.rule)

    def _complete(self, operation: Any, part: str, name: str, has_id: bool) -> None:
        if name in terms.READS:
            body = {"schema": terms.READS[name]}
            operation["requestBody"] = {"required": True, "content": {FORM: body, JSON: dict(body)}}
        elif "requestBody" in operation:
            operation["requestBody"]["required"] = not _may_be_empty(operation["requestBody"])
        security = terms.SECURITY.get(part) or terms.SECURITY.get(name)
        if security:
            operation["security"] = [{}, *security] if self._local and security is terms.ADMIN else security
        responses = operation.setdefault("responses", {})
        responses.pop(422, None)  # flask-smorest's guess
        _complete_success(responses, name)
        for refusal in self._refusals(operation, part, name, has_id):
            responses[terms.REFUSALS[refusal].status] = refusal
        if name in terms.CONFLICTS:
            responses[409] = {**_refused(terms.REFUSALS["Conflict"]), "description": terms.CONFLICTS[name]}
        if name in terms.CACHED:
            operation.setdefault("parameters", []).append(
                {"name": "If-None-Match", "in": "header", "schema": {"type": "string"}}
            )

    def _refusals(self, operation: Any, part: str, name: str, has_id: bool) -> Iterator[str]:
        """Which errors the operation can answer."""
        managed, is_oauth = terms.SECURITY.get(part) is terms.ADMIN, name in terms.READS
        if is_oauth:
            yield from ("BadGrant", "BadClient")
        elif "requestBody" in operation or "parameters" in operation:
            yield "BadRequest"
        if name == "authorize":
            yield "NoAuthorization"
        if "security" in operation and not is_oauth:
            yield "Unauthorized"
        if managed or self._local:
            yield "Forbidden"
        if has_id:
            yield "NotFound"
        if "requestBody" in operation:
            yield from ("TooLarge",) if is_oauth else ("TooLarge", "NotJson")
        if managed or is_oauth:
            yield "TooMany"
        if name not in terms.ALWAYS_THERE:
            yield "Unavailable"


def _may_be_empty(body: dict[str, Any]) -> bool:
    """Whether every field of a JSON body may be left out: then so may the body."""
    schema = body["content"][JSON]["schema"]
    return not any(field.required for field in schema().fields.values())


def _complete_success(responses: dict[Any, Any], name: str) -> None:
    if name in terms.ANSWERS:
        response = responses.setdefault(200, {"description": HTTPStatus.OK.phrase})
        response["content"] = {terms.ANSWER_TYPES.get(name, JSON): {"schema": terms.ANSWERS[name]}}
    for status, response in responses.items():
        names = ["X-Request-Id", *(["Location"] if status == 201 else [])]
        names += ["ETag", "Cache-Control"] if name in terms.CACHED else []
        response["headers"] = {header: header for header in names}
    if name in terms.CACHED:
        responses[304] = {"description": "It has not changed.", "headers": dict(responses[200]["headers"])}


def _refused(refusal: terms.Refusal) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": "X-Request-Id"}
    if refusal.header:
        description, schema = terms.HEADERS[refusal.header]
        told = {"description": description, "required": False, "schema": schema}
        headers[refusal.header] = refusal.header if refusal.always else told
    example = {"error": refusal.error, "error_description": refusal.sentence}
    content = {JSON: {"schema": bodies.Error, "example": example}}
    return {"description": refusal.when, "headers": headers, "content": content}


class _Converter(OpenAPIConverter):
    """apispec's, with Lanyard's own kinds of fields."""

    def init_attribute_functions(self) -> None:
        """apispec's hook."""
        super().init_attribute_functions()  # type: ignore[no-untyped-call]
        self.attribute_functions.append(self._kinds)
        self.attribute_functions.append(self._query)
        self.attribute_functions.append(self._meaning)

    def _kinds(self, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
        if isinstance(field, Timestamp):
            return {"type": ["string", "null"] if field.allow_none else "string", "format": "date-time"}
        if isinstance(field, PublicKeys):
            return terms.JWK_SET
        if isinstance(field, fields.Function):
            ret.pop("readOnly")
        if isinstance(field, fields.Dict) and "maxLength" in ret:
            ret["maxProperties"] = ret.pop("maxLength")
            ret["propertyNames"] = self.field2property(field.key_field)  # type: ignore[arg-type]
        if no_repeats in field.validators:
            ret["uniqueItems"] = True
        if isinstance(field, Text):
            ret.setdefault("pattern", field.pattern)
        # A pattern of Python's, which is matched from the start, as ECMA 262 writes it.
        if str(ret.get("pattern")).endswith(r"\Z"):
            return {"pattern": "^" + ret["pattern"].removesuffix(r"\Z") + "$"}
        return {}

    def _query(self, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
        # A query cannot say null: a filter that is left out has no value.
        if not isinstance(field.parent, schemas.PageQuery) or not field.allow_none:
            return {}
        del ret["default"]
        if "enum" in ret:
            ret["enum"].remove(None)
        return {"type": ret["type"][0]}

    def _meaning(self, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(field.parent, Schema):
            return {}
        meaning = _of(glossary.MEANINGS, type(field.parent).__name__, field.data_key or str(field.name))
        return {"description": meaning} if meaning else {}


class _Marshmallow(MarshmallowPlugin):
    Converter = _Converter


def _of(words: dict[str, Any], schema: str, field: str) -> Any:
    return words.get(f"{schema}.{field}", words.get(field))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The path, the method and the operation, of each."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


def resolve(document: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` refers to, or what was given."""
    if "$ref" in found:
        _, _, kind, name = found["$ref"].split("/")
        return {**document["components"][kind][name], **{"title": name}}
    return found


def _add_examples(document: dict[str, Any]) -> None:
    for _, _, operation in operations(document):
        for media in operation.get("requestBody", {"content": {}})["content"].values():
            name = media["schema"]["$ref"].rpartition("/")[2]
            told = glossary.REQUESTS[name]
            media["examples"] = {key.replace(" ", "-"): {"summary": key, "value": told[key]} for key in told}
        for status, response in operation["responses"].items():
            for media in response.get("content", {}).values() if status < "300" else ():
                if "$ref" in str(media["schema"]):
                    media["example"] = _example(document, media["schema"])


def _example(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """An example of an answer, out of the glossary's examples of its fields."""
    schema = resolve(document, schema.get("oneOf", [schema])[0])
    name = schema.get("title", "")
    if name in glossary.EXAMPLES:
        return glossary.EXAMPLES[name]
    example = {}
    for field, kind in schema.get("properties", {}).items():
        example[field] = _example_of_field(document, name, field, kind)
    return example


def _example_of_field(document: dict[str, Any], schema: str, field: str, kind: dict[str, Any]) -> Any:
    if "$ref" in kind:
        return _example(document, kind)
    if "$ref" in kind.get("items", {}):
        return [_example(document, kind["items"])]
    if f"{schema}.{field}" not in glossary.EXAMPLES and "enum" in kind:
        return kind["enum"][0]
    return _of(glossary.EXAMPLES, schema, field)
