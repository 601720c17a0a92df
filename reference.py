"""The page at `/docs`: the OpenAPI document as plain HTML, with no script and nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from flask import Response, render_template
from markupsafe import Markup, escape

import metadata
import openapi
from config import HERE, Settings, settings
from wire import Blueprint

blueprint = Blueprint("reference", __name__)

STYLE = Path(HERE, "templates", "docs.css").read_text()
# The one style sheet is let in by its hash; nothing else is loaded, run, sent or framed.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
    "default": "{} unless you say",
}


@blueprint.get("/docs", tags=["service"])
def docs() -> Response:
    """The API for people to read."""
    response = metadata.answer(_page(settings()), metadata.MAX_AGE, "text/html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


@lru_cache(maxsize=16)
def _page(settings: Settings) -> tuple[bytes, str]:
    document = json.loads(metadata.document(openapi.build, settings)[0])
    page = render_template("docs.html", document=document, style=Markup(STYLE), view=View(document))  # noqa: S704 - ours
    return metadata.stamped(page.encode())


class Row(NamedTuple):
    """A field of a body, as a line of a table; `depth` says how many others it is within."""

    name: str
    kind: str
    required: bool
    meaning: str
    depth: int


class View:
    """The document as the page shows it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.server = document["servers"][0]["url"].rstrip("/")

    def groups(self) -> Iterator[tuple[dict[str, str], list[tuple[str, str, dict[str, Any]]]]]:
        """The tags, each with its operations: path, method, operation."""
        found = list(openapi.operations(self._document))
        for tag in self._document["tags"]:
            yield tag, [operation for operation in found if operation[2]["tags"] == [tag["name"]]]

    def parameters(self, path: str, operation: dict[str, Any]) -> list[dict[str, Any]]:
        """Those in the path, then the operation's own."""
        return [*self._document["paths"][path].get("parameters", []), *operation.get("parameters", [])]

    def resolve(self, found: dict[str, Any]) -> dict[str, Any]:
        """What a `$ref` refers to."""
        return openapi.resolve(self._document, found)

    def rows(self, schema: dict[str, Any], depth: int = 0) -> Iterator[Row]:
        """The fields of a schema, and of the schemas in it."""
        schema = self.resolve(schema)
        for name, kind in schema.get("properties", {}).items():
            required = name in schema.get("required", ())
            yield Row(name, self.kind(kind), required, kind.get("description", ""), depth)
            inner = kind.get("items", kind)
            if "$ref" in inner:
                yield from self.rows(inner, depth + 1)

    def kind(self, schema: dict[str, Any]) -> str:
        """The type and the limits in words."""
        if "$ref" in schema:
            return str(self.resolve(schema)["title"])
        types = schema.get("type", "anything")
        words = " or ".join([types] if isinstance(types, str) else types)
        if "$ref" in schema.get("items", {}):
            words += f" of {self.kind(schema['items'])}"
        limits = [text.format(schema[name]) for name, text in _LIMITS.items() if name in schema]
        known = [" | ".join(str(value) for value in schema["enum"])] if "enum" in schema else []
        formats = [schema["format"]] if "format" in schema else []
        return ", ".join([words, *formats, *known, *limits])

    def proofs(self, operation: dict[str, Any]) -> list[str]:
        """How the caller may prove who it is, in sentences."""
        schemes = self._document["components"]["securitySchemes"]
        named = [name for choice in operation.get("security", []) for name in choice]
        return [schemes[name]["description"] for name in named]

    def curl(self, path: str, method: str, operation: dict[str, Any]) -> str:
        """A command to try it with."""
        parts = ["curl"] if method == "get" else ["curl", "-X", method.upper()]
        parts.append(shlex.quote(self.server + re.sub(r"{(\w+)}", r"$\1", path)).replace("'", '"'))
        choices = operation.get("security", [{}])
        if {} not in choices:
            token = "ADMIN_TOKEN" if "adminToken" in choices[0] else "TOKEN"
            parts.append(f'\\\n  -H "Authorization: Bearer ${token}"')
        if "requestBody" in operation:
            media = operation["requestBody"]["content"][openapi.JSON]
            example = next(iter(media["examples"].values()))["value"]
            if example:
                body = shlex.quote(json.dumps(example))
                parts.append(f"\\\n  -H 'Content-Type: application/json' -d {body}")
        return " ".join(parts)

    @staticmethod
    def pretty(example: Any) -> str:
        """JSON for people."""
        return json.dumps(example, indent=2, ensure_ascii=False)

    @staticmethod
    def prose(text: str) -> Markup:
        """Text with its `code` marked."""
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped
