"""Requests of any kind, for the fuzz tests: bodies, queries, paths, headers, parameters."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, quote_from_bytes

from hypothesis import strategies as st
from support.instances import ADMIN_TOKEN

AGENT = {
    *("id", "client_id", "name", "description", "owner", "metadata", "scopes", "audiences", "is_active"),
    *("token_ttl", "rate_limit", "token_endpoint_auth_method", "created_at", "updated_at", "expires_at"),
    *("token_count", "refresh_count", "last_activity_at", "last_token_issued_at"),
    "require_client_auth_for_refresh",
}
USAGE = {
    *("token_count", "refresh_count", "last_activity_at", "last_token_issued_at"),
    *("rotation_history", "daily"),
}
FACTS = {"scope", "client_id", "sub", "aud", "iss", "exp", "iat", "jti", "token_type", "agent_id"}
TOKEN = {"access_token", "token_type", "expires_in", "scope", "refresh_token"}
# Every route, and what its 2xx answers hold: at least the first, at most both.
Shape = tuple[set[str], set[str]]
ROUTES: dict[str, Shape] = {
    "POST /api/agents": ({"agent", "client_id"}, {"client_secret"}),
    "GET /api/agents": ({"agents", "next"}, set()),
    "GET /api/agents/{agent}": ({"agent"}, set()),
    "PATCH /api/agents/{agent}": ({"agent"}, set()),
    "PUT /api/agents/{agent}": ({"agent"}, set()),
    "DELETE /api/agents/{agent}": (set(), set()),
    "POST /api/agents/{agent}": (set(), {"agent", "client_secret"}),
    "POST /api/agents/{agent}/rotate": ({"client_secret"}, set()),
    "POST /api/agents/{agent}/deactivate": ({"agent"}, set()),
    "POST /api/agents/{agent}/reactivate": ({"agent"}, set()),
    "GET /api/agents/{agent}/secrets": ({"secrets"}, set()),
    "DELETE /api/agents/{agent}/secrets/{secret}": (set(), set()),
    "GET /api/webhook-events": ({"events", "groups"}, set()),
    "POST /api/webhooks": ({"webhook", "secret"}, set()),
    "GET /api/webhooks": ({"webhooks"}, {"next"}),
    "GET /api/webhooks/{webhook}": ({"webhook"}, set()),
    "PATCH /api/webhooks/{webhook}": ({"webhook"}, set()),
    "PUT /api/webhooks/{webhook}": ({"webhook"}, set()),
    "DELETE /api/webhooks/{webhook}": (set(), set()),
    "POST /api/webhooks/{webhook}/rotate": ({"secret"}, set()),
    "POST /api/webhooks/{webhook}/test": ({"delivery"}, set()),
    "GET /api/webhooks/{webhook}/deliveries": ({"deliveries", "next"}, set()),
    "GET /api/webhooks/{webhook}/deliveries/{delivery}": ({"delivery"}, set()),
    "POST /api/webhooks/{webhook}/deliveries/{delivery}/redeliver": ({"delivery"}, set()),
    "GET /api/keys": ({"keys"}, set()),
    "POST /api/keys/rotate": ({"key"}, set()),
    "GET /api/events": ({"events", "next"}, set()),
}
OPEN_ROUTES: dict[str, Shape] = {
    "POST /oauth/token": (TOKEN, set()),
    "POST /oauth/refresh": (TOKEN, set()),
    "POST /oauth/introspect": ({"active"}, FACTS),
    "POST /oauth/revoke": (set(), set()),
    "GET /oauth/authorize": (set(), set()),
    "GET /api/agents/me": ({"agent"}, set()),
    "GET /api/agents/me/usage": (USAGE, set()),
    "POST /api/agents/me/rotate": ({"client_secret"}, set()),
    "POST /api/agents/me/deactivate": ({"message", "agent"}, set()),
    "DELETE /api/agents/me": (set(), set()),
}

# What goes into a request.

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
odd_text = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "\udfff\ud800",
        "\u202eevil",
        "\ufeff",
        "e\u0301",
        "\U0001f600",
        "\x7f",
        "a\nb",
        "'; DROP TABLE agents--",
        "%s%n",
        "{{7*7}}",
        "../..",
        "null",
        "\u2028",
        "x" * 2000,
    ]
)
text = st.sampled_from(["read", "write", "a name", "https://a.example"]) | odd_text | any_text
number = (
    st.integers(-3, 100)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 86_400, 86_401, 36_525 * 86_400])
    | st.floats(allow_nan=False, allow_infinity=False)
)
leaf = st.none() | st.booleans() | number | text
junk = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8
)
few_texts = st.lists(text, max_size=3) | st.lists(st.sampled_from(["a", "b", "read"]), max_size=70)
jwks = st.builds(
    lambda jwk: {"keys": [jwk]},
    st.fixed_dictionaries(
        {"kty": st.sampled_from(["RSA", "EC", "OKP", "oct", "none"])},
        optional={
            **dict.fromkeys(
                ("n", "e", "x", "y", "d", "k"), st.sampled_from(["AQAB", "", "A" * 43, "=", "é"])
            ),
            "crv": st.sampled_from(["P-256", "P-521", "Ed25519", "X25519", "secp256k1", 1]),
            "use": junk,
            "kid": junk,
            "alg": junk,
        },
    )
    | junk,
)
event_types = st.lists(st.sampled_from(["*", "agent.*", "token.issued", "nothing"]), max_size=3)
urls = st.sampled_from(
    [
        "http://localhost:1/hook",
        "https://127.0.0.1/",
        "https://[::1]:1/",
        "http://[",
        "ftp://x",
        "http://a:99999",
        "https://u:p@localhost/",
        "http://localhost:0/",
        "//localhost",
        "http://\u2100.example",
        "http://[::1%25lo]/",
    ]
)
# Every field that any body has: most bodies are of the right names, and half of the values will do.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": text,
    "description": text,
    "owner": text,
    "metadata": st.dictionaries(text, text, max_size=3),
    "scopes": few_texts,
    "audiences": few_texts,
    "token_ttl": number,
    "rate_limit": number,
    "require_client_auth_for_refresh": st.booleans(),
    "expires_in": number,
    "token_endpoint_auth_method": st.sampled_from(["client_secret_basic", "private_key_jwt", "none"]),
    "jwks": jwks,
    "action": st.sampled_from(["rotate", "deactivate", "reactivate", "delete"]),
    "grace_period": number,
    "revoke_tokens": st.booleans(),
    "url": urls | text,
    "events": event_types,
    "max_retries": number,
    "is_active": st.booleans(),
    "now": st.booleans(),
}
USUAL = {
    "/api/agents": (
        "name",
        "scopes",
        "token_ttl",
        "expires_in",
        "metadata",
        "audiences",
        "description",
        "owner",
        "rate_limit",
        "require_client_auth_for_refresh",
        "token_endpoint_auth_method",
        "jwks",
    ),
    "/api/agents/{agent}": (
        "name",
        "scopes",
        "token_ttl",
        "expires_in",
        "metadata",
        "audiences",
        "action",
        "jwks",
        "grace_period",
    ),
    "/api/webhooks": ("name", "url", "events", "max_retries"),
    "/api/webhooks/{webhook}": ("name", "url", "events", "max_retries", "is_active"),
    "/api/keys/rotate": ("now",),
}
NEEDED = {
    "POST /api/agents": {"name": "an agent"},
    "POST /api/webhooks": {"name": "a hook", "url": "http://localhost:1/", "events": ["*"]},
    "POST /api/agents/{agent}": {"action": "rotate"},
}
JSON_TYPES = st.just("application/json") | st.sampled_from(
    [
        "application/json; charset=utf-16",
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
        "multipart/form-data",
        "application/JSON",
        "application/json;",
        ";",
        "application/merge-patch+json",
        "\xff/\xff",
    ]
)
odd_json = st.sampled_from(
    [
        b'{"name": "a", "name": "b"}',
        b'\xef\xbb\xbf{"name": "a"}',
        b'{"name": NaN}',
        b'{"name": 1e999}',
        b"\xff",
        b"[" * 20_000,
        b'{"a":' * 20_000,
        b'{"name": ' + b"9" * 5_000 + b"}",
        b'{"name": -' + b"9" * 60_000 + b"}",
        b'{"name": "\\ud800"}',
        b'{"name": "\\u0000"}',
        b'{"name": "a\x00"}',
        b"null",
        b'"text"',
        b"[]",
        b" ",
        b"{",
        b'{"name": "' + b"x" * 66_000 + b'"}',
        b'{"name": "\xed\xa0\x80"}',
        '{"name": "a"}'.encode("utf-16"),
    ]
)
QUERY = (
    "limit",
    "after",
    "is_active",
    "scope",
    "owner",
    "stale_days",
    "q",
    "agent_id",
    "type",
    "status",
    "x",
)
query_value = st.sampled_from(
    ["", "1", "0", "-1", "200", "201", "9" * 25, "9" * 5000, "true", "1.5", "٣", "1_0", " 1"]
)
query = st.lists(st.tuples(st.sampled_from(QUERY), query_value | text), max_size=3)
segment = (
    text.map(lambda value: quote(value, safe="", errors="replace"))
    | st.binary(max_size=8).map(lambda value: quote_from_bytes(value, safe=""))
    | st.sampled_from(
        ["me", ".", "..", "%00", "%2e%2e", "%ff", "0", "1", "9" * 18, "9" * 30, "a" * 3000, "%F0%9F%98%80"]
    )
)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])


def bodies(route: str) -> st.SearchStrategy[bytes]:
    """JSON of the right names with right and wrong values, JSON of any kind, and what only looks like it."""
    path = route.partition(" ")[2]
    names = USUAL.get(path, ("grace_period", "revoke_tokens") if path.endswith("/rotate") else ())
    right = st.fixed_dictionaries({}, optional={name: FIELDS[name] for name in names})
    wrong = st.fixed_dictionaries({}, optional={name: FIELDS[name] | junk for name in names})
    strange = st.dictionaries(st.sampled_from(list(FIELDS)) | text, junk, max_size=3)
    whole = st.builds(lambda fields: {**NEEDED.get(route, {}), **fields}, right | wrong | strange)
    told = (whole | junk).map(lambda value: json.dumps(value).encode())
    cut = st.builds(lambda raw, at: raw[: at % (len(raw) + 1)], told, st.integers(0, 200))
    return st.one_of(told, told, told, cut, odd_json, st.binary(max_size=40))


# Authorization of every shape: latin-1 is what a header can hold.
latin = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30)
b64 = st.sampled_from(
    ["", "=", "!", "YQ==", "YTpi", "YWRtaW46", "//8=", "OjpiOmM6", "w6k6w6k=", "YQBhOmI=", "JTAwOmE="]
)
secrets_known = [
    "{access_token}",
    "{refresh_token}",
    "{client_secret}",
    ADMIN_TOKEN,
    "eyJ",
    "eyJhbGciOiJub25lIn0.e30.",
    "{access_token}.",
    "{access_token}\xe9",
    "a b",
]
authorization = st.one_of(
    st.builds(
        lambda scheme, space, rest: scheme + space + rest,
        st.sampled_from(
            ["Bearer", "bearer", "BEARER", "Basic", "basic", "Digest", "", "Bearer Bearer", "Negotiate"]
        ),
        st.sampled_from([" ", "", "  ", "\t", ","]),
        st.sampled_from(secrets_known)
        | b64
        | latin.map(lambda value: value.replace("{", "").replace("}", "")),
    ),
    latin.map(lambda value: value.replace("{", "").replace("}", "")),
)


# The OAuth endpoints, in both content types.

PARAMETERS = [
    *("grant_type", "client_id", "client_secret", "client_assertion", "client_assertion_type"),
    *("scope", "refresh_token", "token", "token_type_hint", "resource", "x"),
]
proper = st.sampled_from(
    [
        "client_credentials",
        "refresh_token",
        "{client_id}",
        "{client_secret}",
        "{access_token}",
        "{refresh_token}",
        "read",
        "read read",
        "read admin",
        " ",
        "a",
        "http://localhost:8080",
        "eyJhbGciOiJub25lIn0.e30.",
        "rt_",
        "cs_",
        "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    ]
)
oauth_value = proper | text.filter(lambda value: "{" not in value and "}" not in value)
GOOD = {
    "grant_type": "client_credentials",
    "client_id": "{client_id}",
    "client_secret": "{client_secret}",
    "token": "{access_token}",
    "refresh_token": "{refresh_token}",
}
oauth_pairs = st.builds(
    lambda good, extra: [*((name, GOOD[name]) for name in good), *extra],
    st.permutations(list(GOOD)).flatmap(lambda names: st.integers(0, 5).map(lambda most: names[:most])),
    st.lists(st.tuples(st.sampled_from(PARAMETERS), oauth_value), max_size=3),
)
