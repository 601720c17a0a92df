"""A small API that verifies Lanyard's access tokens offline, with the public keys that Lanyard publishes.

Its URL is the audience: an agent has it among its `audiences` and asks for a token with it as `resource`.

    pip install flask 'pyjwt[crypto]'
    python verify_offline.py http://localhost:8080 http://localhost:5000
"""

import sys
from typing import Any, NoReturn
from urllib.parse import urlsplit

import jwt
from flask import Flask, Response, abort, request

ISSUER, AUDIENCE = sys.argv[1:]
ALGORITHMS = ["RS256", "ES256", "EdDSA"]  # what LANYARD_SIGNING_ALG may be
CLAIMS = ["iss", "aud", "exp", "sub", "client_id", "scope"]
LEEWAY = 30  # seconds that the clocks may differ by

app = Flask(__name__)
keys = jwt.PyJWKClient(f"{ISSUER}/.well-known/jwks.json")  # fetched at first use, kept for five minutes


@app.get("/reports")
def reports() -> dict[str, Any]:
    """Answer agents that have the scope `read`."""
    claims = require("read")
    return {"reports": [], "read_by": claims["client_id"]}


def require(scope: str) -> dict[str, Any]:
    """Return the claims of the request's token; end the request if it is invalid or lacks the scope."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        refuse(401)
    try:
        claims = verify(token.strip())
    except jwt.PyJWKClientConnectionError:
        abort(503)  # without keys, no token can be verified
    except (jwt.InvalidTokenError, jwt.PyJWKClientError):
        refuse(401, error="invalid_token")
    if scope not in claims["scope"].split():
        refuse(403, error="insufficient_scope", scope=scope)
    return claims


def verify(token: str) -> dict[str, Any]:
    """Return the claims of a valid access token (RFC 9068 §4)."""
    options: Any = {"require": CLAIMS}
    key = keys.get_signing_key_from_jwt(token)
    found = jwt.decode_complete(
        token, key, ALGORITHMS, options, audience=AUDIENCE, issuer=ISSUER, leeway=LEEWAY
    )
    if found["header"].get("typ") != "at+jwt":  # other JWTs of the same issuer are not access tokens
        raise jwt.InvalidTokenError("not an access token")
    return dict(found["payload"])


def refuse(status: int, **attributes: str) -> NoReturn:
    """End the request with the challenge of RFC 6750 §3."""
    challenge = ", ".join(f'{name}="{value}"' for name, value in {"realm": "reports", **attributes}.items())
    abort(Response(status=status, headers={"WWW-Authenticate": f"Bearer {challenge}"}))


if __name__ == "__main__":
    app.run(port=urlsplit(AUDIENCE).port)
