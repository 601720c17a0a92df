"""An MCP client that signs in at Lanyard, by its secret or by its private key, and calls a tool.

The MCP server's URL is among the agent's `audiences`, since the SDK asks for a token with it as `resource`.

    pip install mcp
    CLIENT_ID=cid_… CLIENT_SECRET=cs_… python mcp_client.py secret http://localhost:8080 http://localhost:8000/mcp
    CLIENT_ID=cid_… PRIVATE_KEY=private-key.pem python mcp_client.py key http://localhost:8080 http://localhost:8000/mcp
"""

import asyncio
import os
import sys
from pathlib import Path

import httpx2
from mcp import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.auth.extensions.client_credentials import (
    ClientCredentialsOAuthProvider,
    PrivateKeyJWTOAuthProvider,
    SignedJWTParameters,
)
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken

METHOD, ISSUER, URL = sys.argv[1:]
CLIENT_ID = os.environ["CLIENT_ID"]


class Memory:
    """The SDK's TokenStorage, in memory."""

    def __init__(self) -> None:
        self.token: OAuthToken | None = None

    async def get_tokens(self) -> OAuthToken | None:
        """Return the token, if there is one."""
        return self.token

    async def set_tokens(self, tokens: OAuthToken) -> None:
        """Store the token."""
        self.token = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        """Do nothing: the agent is registered already."""

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """Do nothing: the agent is registered already."""


def by_secret() -> OAuthClientProvider:
    """Sign in with the client secret."""
    return ClientCredentialsOAuthProvider(
        URL, Memory(), client_id=CLIENT_ID, client_secret=os.environ["CLIENT_SECRET"], issuer=ISSUER
    )


def by_key() -> OAuthClientProvider:
    """Sign in with a JWT made by the private key whose public half is in the agent's `jwks`."""
    assertion = SignedJWTParameters(
        issuer=CLIENT_ID,
        subject=CLIENT_ID,
        signing_key=Path(os.environ["PRIVATE_KEY"]).read_text(),
        signing_algorithm=os.environ.get("SIGNING_ALGORITHM", "ES256"),
    )
    return PrivateKeyJWTOAuthProvider(
        URL,
        Memory(),
        client_id=CLIENT_ID,
        assertion_provider=assertion.create_assertion_provider(),
        issuer=ISSUER,
    )


async def main() -> None:
    """Call `whoami`."""
    provider = {"secret": by_secret, "key": by_key}[METHOD]()
    async with (
        httpx2.AsyncClient(auth=provider, timeout=httpx2.Timeout(30, read=300)) as http,
        Client(streamable_http_client(URL, http_client=http)) as client,
    ):
        result = await client.call_tool("whoami")
        print(result.structured_content)


asyncio.run(main())
