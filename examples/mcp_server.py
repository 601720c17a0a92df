"""An MCP server that takes Lanyard's access tokens, verified offline with the public keys Lanyard publishes.

Its URL is the audience: an agent has it among its `audiences` and signs in as `mcp_client.py` does.

    pip install mcp
    python mcp_server.py http://localhost:8080 http://localhost:8000/mcp
"""

import asyncio
import sys
from typing import Any
from urllib.parse import urlsplit

import jwt
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer

ISSUER, URL = sys.argv[1:]
ALGORITHMS = ["RS256", "ES256", "EdDSA"]  # what LANYARD_SIGNING_ALG may be
CLAIMS = ["iss", "aud", "exp", "sub", "client_id", "scope"]
LEEWAY = 30  # seconds that the clocks may differ by


class OfflineVerifier:
    """The SDK's TokenVerifier, with the key set, cached for five minutes."""

    def __init__(self) -> None:
        self.keys = jwt.PyJWKClient(f"{ISSUER}/.well-known/jwks.json")

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return the claims of a valid access token (RFC 9068 §4), or None."""
        try:
            # In a thread, since it may fetch the keys.
            found = await asyncio.to_thread(self.verify, token)
        except jwt.PyJWKClientConnectionError:
            raise  # without keys, no token can be verified
        except (jwt.InvalidTokenError, jwt.PyJWKClientError):
            return None
        claims = found["payload"]
        if found["header"].get("typ") != "at+jwt":  # other JWTs of the same issuer are not access tokens
            return None
        return AccessToken(
            token=token,
            client_id=claims["client_id"],
            scopes=claims["scope"].split(),
            expires_at=claims["exp"],
            resource=URL,
            subject=claims["sub"],
            claims=claims,
        )

    def verify(self, token: str) -> dict[str, Any]:
        """Return header and claims, if signature, issuer, audience and times are right."""
        options: Any = {"require": CLAIMS}
        key = self.keys.get_signing_key_from_jwt(token)
        return jwt.decode_complete(
            token, key, ALGORITHMS, options, audience=URL, issuer=ISSUER, leeway=LEEWAY
        )


server = MCPServer(
    "reports",
    token_verifier=OfflineVerifier(),
    auth=AuthSettings(
        # Strings: an AnyHttpUrl would put a slash behind the issuer, and clients compare it exactly.
        issuer_url=ISSUER,
        resource_server_url=URL,
        required_scopes=["read"],
        validate_token_resource=True,
    ),
)


@server.tool()
def whoami() -> str:
    """Return the client id of the calling agent."""
    token = get_access_token()
    return token.client_id if token else ""


if __name__ == "__main__":
    parts = urlsplit(URL)
    server.run("streamable-http", port=parts.port or 80, streamable_http_path=parts.path or "/")
