"""An agent that signs in with its secret, calls an API, and signs in again when its token has expired.

The API's URL is among the agent's `audiences`; `verify_offline.py` is such an API.

    pip install authlib requests
    CLIENT_ID=cid_… CLIENT_SECRET=cs_… python client.py http://localhost:8080 http://localhost:5000
"""

import os
import sys
from typing import Any

from authlib.integrations.requests_client import OAuth2Session

ISSUER, API = sys.argv[1:]


class Session(OAuth2Session):
    """Authlib's session, for one API; it fetches a token before a call that needs a new one."""

    def fetch_token(self, *args: Any, **kwargs: Any) -> Any:
        """Sign in. The API's URL is the `resource`, so the token is valid there and nowhere else."""
        token = super().fetch_token(*args, resource=API, **kwargs)
        # With a refresh token, Authlib would refresh until the sign-in ends after 30 days, and then fail.
        # Without one, it signs in again with the secret.
        token.pop("refresh_token", None)
        return token


session = Session(
    os.environ["CLIENT_ID"],
    os.environ["CLIENT_SECRET"],
    scope="read",
    token_endpoint=f"{ISSUER}/oauth/token",
    grant_type="client_credentials",
    default_timeout=10,
)
session.fetch_token()

response = session.get(f"{API}/reports")
response.raise_for_status()
print(response.text)
