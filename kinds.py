"""The kinds of values in bodies: strict text, numbers, flags, moments, scopes, audiences, public keys."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from joserfc.jwk import RSAKey, import_key
from marshmallow import ValidationError, fields
from marshmallow.validate import ContainsNoneOf, Length, Regexp

import clock
from wire import is_text

# What RS256 and PS256, ES256, and EdDSA sign with.
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


class Whole(fields.Integer):
    """A JSON integer: 1, but neither 1.0, "1" nor true."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **kwargs)


class Flag(fields.Boolean):
    """A JSON boolean: true, but neither 1 nor "yes"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Timestamp(fields.Field[datetime]):
    """RFC 3339 UTC with `Z`, whole seconds."""

    def _serialize(self, value: datetime | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else clock.rfc3339(value)


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
