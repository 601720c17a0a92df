"""An MCP server made with FastMCP that takes Lanyard's access tokens, verified offline.

Its URL is the audience: an agent has it among its `audiences` and signs in as `mcp_client.py` does. Without a
path, it ends in a slash, which is how FastMCP tells it to clients.

    pip install fastmcp
    python fastmcp_server.py http://localhost:8080 http://localhost:8000/mcp
"""

import os
import sys
from typing import Any
from urllib.parse import urlsplit

import jwt
from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken, RemoteAuthProvider
from fastmcp.server.auth.providers.jwt import JWTVerifier
from fastmcp.server.dependencies import get_access_token

ISSUER, URL = sys.argv[1:]
ALGORITHM = os.environ.get("SIGNING_ALGORITHM", "RS256")  # LANYARD_SIGNING_ALG
SCOPES = ["read"]
parts = urlsplit(URL)


class OfflineVerifier(JWTVerifier):
    """FastMCP's verifier. It keeps the key set for an hour: restart it after a `keys rotate --now`."""

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return the claims of a valid access token (RFC 9068 §4), or None."""
        found = await super().verify_token(token)
        # Other JWTs of the same issuer are not access tokens.
        if found is None or jwt.get_unverified_header(token).get("typ") != "at+jwt":
            return None
        return found


verifier = OfflineVerifier(
    jwks_uri=f"{ISSUER}/.well-known/jwks.json", issuer=ISSUER, audience=URL, algorithm=ALGORITHM
)
# A string: an AnyHttpUrl would put a slash behind the issuer, and clients compare it exactly.
servers: list[Any] = [ISSUER]
server = FastMCP(
    "reports",
    auth=RemoteAuthProvider(
        verifier,
        servers,
        base_url=f"{parts.scheme}://{parts.netloc}",
        scopes_supported=SCOPES,
        required_scopes=SCOPES,
    ),
)


@server.tool
def whoami() -> str:
    """Return the client id of the calling agent."""
    token = get_access_token()
    return token.client_id if token else ""


if __name__ == "__main__":
    server.run("http", port=parts.port or 80, path=parts.path or "/", show_banner=False)
