"""The OpenAPI document of the app's routes, made by flask-smorest's Api."""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import flask_smorest
from flask import Flask, current_app
from flask_smorest.spec.plugins import FlaskPlugin
from flask_smorest.utils import prepare_response, resolve_schema_instance
from marshmallow import fields
from werkzeug.routing import Rule

import config
from api import (
    BY_AGENT,
    BY_OPERATOR,
    ERRORS,
    FORM,
    JSON,
    MAX_BODY,
    Blueprint,
    PublicKeys,
    Timestamp,
    error_response,
    headers_of,
    no_repeats,
)
from config import VERSION, Settings

MAX_AGE = 3600  # seconds

_SECURITY_SCHEMES = {
    "adminToken": ("bearer", "The operator's admin token."),
    "adminBasic": ("basic", "The user `admin`, with the admin token as the password."),
    "accessToken": ("bearer", "An agent's access token. Management needs its scope `admin`."),
    "clientBasic": ("basic", "An agent's client id and secret, each form-encoded (RFC 6749 §2.3.1)."),
}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("The request's id: the caller's own, or a new one.", {"type": "string"}),
    "Location": ("The path of the new resource.", {"type": "string", "format": "uri-reference"}),
    "WWW-Authenticate": ("How to authenticate (RFC 6750 §3, RFC 7617 §2).", {"type": "string"}),
    "Retry-After": ("Seconds to wait.", {"type": "integer", "minimum": 1}),
    "ETag": ("Changes with the document.", {"type": "string"}),
    "Cache-Control": ("How long the document may be cached.", {"type": "string"}),
}
_LOCAL_ERROR = {"forbidden": "Local mode does not answer a request from another machine."}
_ABOUT = f"""Identity for AI agents: an OAuth 2.0 authorization server.

Responses are JSON. Every error has the shape of the schema `Error`. Times are RFC 3339 in UTC.
Durations are whole seconds. A body holds at most {MAX_BODY} bytes. Unknown fields of a management
body are errors. Unknown OAuth parameters are ignored. A request may carry an `X-Request-Id` of 1 to 64
letters, digits and `._-`; the response repeats it.

Every path also answers 405, with `Allow`, to other methods, and 500 when the server fails. Unknown paths
answer 404. Malformed HTTP is answered with 400, 408, 413, 414, 417, 431 or 501.
"""


@lru_cache(maxsize=16)
def document(settings: Settings) -> bytes:
    """Return the document of the running app as JSON. The first call takes 30 ms."""
    api = Api(current_app, settings)
    for name, blueprint in current_app.blueprints.items():
        if isinstance(blueprint, Blueprint):
            blueprint.register_views_in_doc(api, current_app, api.spec, name=name, parameters=None)
            api.spec.tag({"name": name, "description": blueprint.description})
    return json.dumps(api.spec.to_dict()).encode()


class Api(flask_smorest.Api):
    """flask-smorest's Api for the document alone: the app registers blueprints and error handlers itself."""

    DEFAULT_ERROR_RESPONSE_NAME = None

    def __init__(self, app: Flask, settings: Settings) -> None:
        options = {"title": "Lanyard", "version": VERSION, "openapi_version": "3.1.0"}
        details = {"info": {"description": _ABOUT}, "servers": [{"url": settings.issuer}]}
        super().__init__(app, spec_kwargs={"flask_plugin": _Routes(), **options, **details})
        for name, (scheme, text) in _SECURITY_SCHEMES.items():
            self.spec.components.security_scheme(name, dict(type="http", scheme=scheme, description=text))
        for name, (text, schema) in _HEADERS.items():
            self.spec.components.header(name, {"description": text, "required": True, "schema": schema})
        self.register_field(Timestamp, "string", "date-time")
        self.register_field(PublicKeys, "object", None)
        self.ma_plugin.converter.add_attribute_function(_collection2properties)
        self.ma_plugin.converter.add_parameter_attribute_function(_nullable2parameter)

    def _register_error_handlers(self) -> None:
        pass  # the app has its own

    def _register_responses(self) -> None:
        for status, (_, examples) in ERRORS.items():
            codes = {**examples, **_LOCAL_ERROR} if status == 403 and config.settings().local else examples
            response = error_response(status, codes)
            prepare_response(response, self.spec, JSON)
            self.spec.components.response(HTTPStatus(status).name, response, lazy=True)


class _Routes(FlaskPlugin):
    """Document what follows from a schema or a route itself."""

    def rule_to_params(self, rule: Rule) -> list[dict[str, Any]]:
        """Document the ids in a path: UUIDs, except a delivery's number."""
        parameters: list[dict[str, Any]] = super().rule_to_params(rule)
        for parameter in parameters:
            number = {"pattern": "^[0-9]{1,18}$"} if parameter["name"] == "delivery_id" else None
            parameter["schema"] = {"type": "string", **(number or {"format": "uuid"})}
        return parameters

    def schema_helper(self, name: str, definition: Any, schema: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Describe a schema by its docstring, and add its `rules`."""
        return {"description": inspect.getdoc(schema), **getattr(schema, "rules", {})} if schema else {}

    def operation_helper(self, path: str, operations: dict[str, Any], rule: Rule, **kwargs: Any) -> None:
        """Name an operation by its view, and add the examples, errors and headers."""
        name = rule.endpoint.rpartition(".")[2]
        for method, operation in operations.items():
            operation["operationId"] = f"{name}_by_put" if method == "put" else name
            operation["summary"] = " ".join(operation["summary"].split()).removesuffix(".")
            for media in operation.get("requestBody", {"content": {}})["content"].values():
                schema = resolve_schema_instance(media["schema"])
                media["examples"] = {title: {"value": body} for title, body in schema.examples.items()}
                # A body of optional fields only may be left out.
                operation["requestBody"]["required"] = not schema.partial and any(
                    f.required for f in schema.fields.values()
                )
            responses = operation.setdefault("responses", {})
            for status in self._implied_errors(path, operation):
                responses.setdefault(status, HTTPStatus(status).name)
            for status, response in responses.items():
                if isinstance(response, dict):
                    response["headers"] = {**response.get("headers", {}), **headers_of(status)}
            operation["responses"] = dict(sorted(responses.items()))
            if config.settings().local and operation.get("security") == BY_OPERATOR:
                operation["security"] = [{}, *BY_OPERATOR]

    def _implied_errors(self, path: str, operation: dict[str, Any]) -> list[int]:
        """Error statuses that follow from the route: its guard, its body, an id in its path."""
        security, body = operation.get("security"), operation.get("requestBody", {"content": {}})
        implied = {
            401: security in (BY_OPERATOR, BY_AGENT),
            403: security == BY_OPERATOR or config.settings().local,
            404: "{" in path,
            413: FORM in body["content"] or JSON in body["content"],
            415: JSON in body["content"],
            429: bool(security) and security != BY_AGENT,
            503: bool(security),  # every guard reads the database
        }
        return [status for status in implied if implied[status]]


def _collection2properties(self: Any, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
    """Document the limits of an object, and a list without repeats (an attribute function of apispec)."""
    if isinstance(field, fields.Dict) and "maxLength" in ret:
        return {"maxProperties": ret.pop("maxLength"), "propertyNames": self.field2property(field.key_field)}
    return {"uniqueItems": True} if no_repeats in field.validators else {}


def _nullable2parameter(self: Any, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
    """Remove null from a query parameter, which cannot carry it (a parameter function of apispec)."""
    schema = ret["schema"]
    if field.allow_none:
        schema |= {"type": schema["type"][0]}
        del schema["default"]
        if "enum" in schema:
            schema["enum"].remove(None)
    return {}
