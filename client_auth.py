"""Client authentication: secret (Basic or body) and `private_key_jwt` (RFC 6749 §2.3, RFC 7523)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from typing import Any
from urllib.parse import unquote_plus

import sqlalchemy as sa
from authlib.oauth2.rfc6749 import (
    ClientMixin,
    InvalidClientError,
    InvalidRequestError,
    InvalidScopeError,
    OAuth2Request,
)
from authlib.oauth2.rfc7523.client import ASSERTION_TYPE, JWTBearerClientAssertion
from flask import request
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, RSAKey
from joserfc.jwt import JWTClaimsRegistry
from sqlalchemy import bindparam
from sqlalchemy.dialects.postgresql import insert  # compiles for SQLite too

import credentials
import events
from api import canonical, is_text, parse_authorization
from config import settings
from database import reading, writing
from models import NEWEST_KEY, Agent, ClientSecret, SpentAssertion, Timestamp, is_active, now

AUTH_METHODS = ("client_secret_basic", "client_secret_post", "private_key_jwt")
# RFC 7515 §4: header members that are not understood are ignored.
ASSERTION_ALGORITHMS = credentials.Algorithms(
    algorithms=("RS256", "PS256", "ES256", "EdDSA", "Ed25519"), strict_check_header=False
)
ASSERTION_TTL = 300  # seconds
ASSERTION_LEEWAY = 30  # seconds a client's clock may be off

# The columns in the row of every Client.
COLUMNS = (
    Agent.pk,
    Agent.id,
    Agent.name,
    Agent.client_id,
    Agent.scopes,
    Agent.audiences,
    Agent.is_active,
    Agent.expires_at,
    Agent.token_version,
    Agent.token_ttl,
    Agent.rate_limit,
    Agent.require_client_auth_for_refresh,
    NEWEST_KEY.label("newest_key"),
)
_NOW: Any = bindparam("now", type_=Timestamp)
_BY_SECRET = (
    sa.select(*COLUMNS, ClientSecret.pk.label("secret_pk"), ClientSecret.hint, ClientSecret.hash)
    .outerjoin(
        ClientSecret,
        sa.and_(
            ClientSecret.agent_pk == Agent.pk,
            ClientSecret.hint == bindparam("hint"),
            ClientSecret.valid(_NOW),
        ),
    )
    .where(Agent.client_id == bindparam("client_id"))
)
_BY_CLIENT_ID = sa.select(*COLUMNS, Agent.jwks).where(Agent.client_id == bindparam("client_id"))
_USE_ASSERTION = (
    insert(SpentAssertion)
    .from_select(
        ["agent_pk", "jti_hash", "expires_at"],
        sa.select(
            Agent.pk, bindparam("jti_hash", type_=sa.LargeBinary), bindparam("expires_at", type_=Timestamp)
        ).where(Agent.client_id == bindparam("client_id")),
    )
    .on_conflict_do_nothing()
    .returning(SpentAssertion.agent_pk)
)


class AuthenticationFailed(InvalidClientError):
    """RFC 6749 §5.2 `invalid_client`, always 401; one text, which does not reveal which clients exist.

    :param reason: the label under which the failure is counted.
    :param agent: the row of the agent that the caller named, if there is one.
    """

    status_code = 401
    description = "Client authentication failed: check client_id and client_secret."

    def __init__(self, description: str | None = None, *, reason: str, agent: Any = None) -> None:
        super().__init__(description)
        self.reason = reason
        self.agent = agent

    def get_headers(self) -> list[tuple[str, str]]:
        """Return the challenge of RFC 7617 §2 in place of Authlib's."""
        return [*super(InvalidClientError, self).get_headers(), ("WWW-Authenticate", 'Basic realm="lanyard"')]


class Client(ClientMixin):
    """An agent as Authlib's client, read from the database at `now`, for one request."""

    def __init__(self, row: Any, now: datetime, family_id: str | None = None) -> None:
        self.row = row
        self.now = now
        # The audiences of the token to issue; the grant sets them.
        self.audiences: list[str] = []
        # A refresh reads the client with its family; client_credentials starts a family.
        self.family_id: str = family_id or credentials.new_family_id()

    def get_client_id(self) -> str:
        return str(self.row.client_id)

    def get_allowed_scope(self, scope: str | None) -> str:
        """Return the scope to grant.

        :param scope: None asks for all of the agent's scopes. An empty scope stays empty: a refresh asks
            for the scope of its family.
        :raises InvalidScopeError: when `scope` exceeds the agent's.
        """
        wanted = list(dict.fromkeys(self.row.scopes if scope is None else scope.split()))
        if missing := [name for name in wanted if name not in self.row.scopes]:
            raise InvalidScopeError(f"This agent does not have the scope: {quotable(missing)}.")
        return " ".join(wanted)

    def check_grant_type(self, grant_type: str) -> bool:
        return True

    @property
    def granted_scopes(self) -> list[str]:
        """The scopes that the family was granted, without those that the agent has lost."""
        return [scope for scope in self.row.family_scopes if scope in self.row.scopes]

    @property
    def granted_audiences(self) -> list[str]:
        """The audiences that the family was granted, without those that the agent has lost."""
        allowed = allowed_audiences(self.row)
        return [name for name in self.row.family_audiences if canonical(name) in allowed]

    @cached_property
    def token_lifetime(self) -> int:
        """The lifetime of an access token issued now, in seconds."""
        return self.seconds_left(self.row.token_ttl or settings().access_token_ttl)

    def seconds_left(self, seconds: int) -> int:
        """Return `seconds`, or fewer when the agent expires before: no token outlives its agent."""
        if self.row.expires_at is None:
            return seconds
        left: timedelta = self.row.expires_at - self.now
        return min(seconds, left // timedelta(seconds=1))


def allowed_audiences(agent: Any) -> set[str]:
    """Return the canonical spelling of the agent's audiences, and of the server's own."""
    return {canonical(name) for name in (*agent.audiences, settings().audience)}


def quotable(words: list[str]) -> str:
    """Return the first of some words of a caller, as an error description may repeat them (RFC 6749 §5.2)."""
    return re.sub(r"[^ !#-\[\]-~]", "?", " ".join(words[:8]))[:200]


def authenticate(request: OAuth2Request) -> Client:
    """Return the client whose credentials the request carries (RFC 6749 §2.3).

    :raises InvalidRequestError: when it carries more than one kind.
    :raises AuthenticationFailed: when they are missing, wrong, or of an inactive agent.
    :raises Throttled: when too many sign-ins have failed.
    """
    try:
        client = _by_assertion(request) if "client_assertion" in request.form else _by_secret(request)
    except (AuthenticationFailed, credentials.Throttled) as error:
        events.count_failure(error.reason)
        if isinstance(error, AuthenticationFailed):
            events.record_failure("client", error.agent)
        raise
    if not is_active(client.row, client.now):
        events.count_failure("inactive_agent")
        state = "expired" if client.row.is_active else "deactivated"
        raise AuthenticationFailed(f"This agent is {state}.", reason="inactive_agent")
    events.set_caller(client.row.id, client.row.client_id)
    return client


def carries_credentials(request: OAuth2Request) -> bool:
    """Whether the request carries client credentials."""
    sent = {"client_secret", "client_assertion"} & set(request.form)
    return bool(sent) or _basic_credentials(request.headers) is not None


def _by_secret(request: OAuth2Request) -> Client:
    form = request.form
    basic = _basic_credentials(request.headers)
    if basic and "client_secret" in form:
        raise InvalidRequestError("Send the client credentials one way: in the header or in the body.")
    if basic and form.get("client_id") not in (None, basic[0]):
        raise InvalidRequestError("The client_id in the body is not the one in the Authorization header.")
    client_id, secret = basic or (form.get("client_id"), form.get("client_secret"))
    if not client_id or not secret:
        raise AuthenticationFailed(
            "Send client_id and client_secret, in the body or as HTTP Basic, or a client_assertion.",
            reason="malformed",
        )
    moment = now()
    # A malformed secret has no hint, and so no hash.
    hint = credentials.client_secret_hint(secret)
    is_named = credentials.is_client_id(client_id)
    row = _first(_BY_SECRET, client_id=client_id, hint=hint, now=moment) if is_named else None
    if not credentials.verify(secret, row.hash if row else None, client_id):
        reason = "malformed" if hint is None else "wrong_secret" if row else "unknown_client"
        raise AuthenticationFailed(reason=reason, agent=row)
    return Client(row, moment)


def _by_assertion(request: OAuth2Request) -> Client:
    form = request.form
    if "client_secret" in form or _basic_credentials(request.headers):
        raise InvalidRequestError("Send the client credentials one way: a secret or an assertion.")
    method = ClientAssertion(validate_jti=True, leeway=ASSERTION_LEEWAY)
    try:
        client = method(_find_by_client_id, request)
    except AuthenticationFailed as error:
        error.agent = method.agent
        # A signature cannot be guessed, so a valid one is never throttled: only failures are counted.
        credentials.throttle(lambda: False, "assertion", known=False)
        raise
    if client is None:
        raise InvalidRequestError(f"Send client_assertion_type as {ASSERTION_TYPE}.")
    # RFC 7521 §4.2: a client_id is unnecessary, and must be the assertion's subject.
    if form.get("client_id") not in (None, client.get_client_id()):
        raise InvalidRequestError("The client_id is not the subject of the assertion.")
    return client


class ClientAssertion(JWTBearerClientAssertion):
    """`private_key_jwt`, RFC 7523 §3: a short-lived JWT signed by the agent, for one use."""

    CLIENT_AUTH_METHOD = "private_key_jwt"
    agent: Any = None  # the row of the assertion's subject, once it is read

    def __call__(self, query_client: Any, request: OAuth2Request) -> Client | None:
        """Run Authlib's steps; replace the errors that would reveal which clients exist."""
        try:
            client: Client | None = super().__call__(query_client, request)
        except AuthenticationFailed:
            raise
        except (InvalidClientError, ValueError, TypeError, RecursionError):
            raise _assertion_error() from None
        return client

    def resolve_client_public_key(self, client: Client) -> KeySet:
        self.agent = client.row
        # Without keys, keys that nobody has: the refusal takes as long.
        jwks = client.row.jwks if client.row and client.row.jwks else _decoy_keys()
        # RFC 9864: EdDSA and Ed25519 are one algorithm here, and a key that names one verifies both.
        members = [
            {name: key[name] for name in key if key["kty"] != "OKP" or name != "alg"} for key in jwks["keys"]
        ]
        return KeySet.import_key_set({"keys": members})

    def process_assertion_claims(self, assertion: str, keys: KeySet) -> dict[str, Any]:
        """Return the claims when one of the agent's keys has signed them.

        :raises AuthenticationFailed: when none has.
        """
        for key in keys:
            try:
                token = jwt.decode(assertion, key, registry=ASSERTION_ALGORITHMS)
            except JoseError:
                continue
            self.verify_claims(token.claims)
            return token.claims
        raise _assertion_error()

    def verify_claims(self, claims: dict[str, Any]) -> None:
        """Check the claims (RFC 7523 §3) and bound their lifetime.

        :raises AuthenticationFailed: with the fault, since the caller has proved possession of the key.
        """
        moment = int(now().timestamp())
        rules: Any = {name: {"essential": True} for name in ("iss", "sub", "aud", "exp", "jti")}
        try:
            JWTClaimsRegistry(moment, self.leeway, **rules).validate(claims)
        except JoseError as error:
            raise _assertion_error(error.description.removesuffix(".")) from None
        if not self._is_for_us(claims["aud"]):
            raise _assertion_error("aud must be the issuer, the token endpoint or this address, nothing else")
        if claims["iss"] != claims["sub"]:
            raise _assertion_error("iss and sub must both be the client_id")
        ends_at = self._end(claims)
        if moment >= ends_at + self.leeway or ends_at > moment + ASSERTION_TTL + self.leeway:
            raise _assertion_error(f"it is valid for {ASSERTION_TTL} seconds at most")
        if not self.validate_jti(claims, claims["jti"]):
            raise _assertion_error("its jti was used before")

    @staticmethod
    def _is_for_us(aud: Any) -> bool:
        """Whether every audience is ours: an assertion made for another server must not work here too."""
        names = [aud] if isinstance(aud, str) else aud
        urls = (settings().issuer, settings().url("/oauth/token"), settings().url(request.path))
        ours = set(map(canonical, urls))
        return bool(names) and all(isinstance(name, str) and canonical(name) in ours for name in names)

    @staticmethod
    def _end(claims: dict[str, Any]) -> int:
        # Some clients sign for an hour (Authlib): their assertion is valid for five minutes from its `iat`.
        return int(min(claims["exp"], claims.get("iat", claims["exp"]) + ASSERTION_TTL))

    def validate_jti(self, claims: dict[str, Any], jti: str) -> bool:
        """Whether this is the first use of the `jti`, in any process."""
        spent = {
            "client_id": claims["sub"],
            "jti_hash": credentials.digest(jti),
            "expires_at": datetime.fromtimestamp(self._end(claims) + self.leeway, UTC),
        }
        with writing(exclusive=False) as connection:
            return connection.execute(_USE_ASSERTION, spent).first() is not None

    def authenticate_client(self, client: Client) -> Client:
        return client  # every agent with keys, whatever its registered method


@cache
def _decoy_keys() -> Any:
    """Return public keys whose private halves are gone, as a JWK set."""
    made: list[Any] = [ECKey.generate_key("P-256"), RSAKey.generate_key(2048)]
    return KeySet(made).as_dict(private=False)


def _assertion_error(fault: str | None = None) -> AuthenticationFailed:
    """Return the refusal of an assertion, with one text for all that is checked before the signature."""
    text = "Client authentication failed: check the client id and the key that signs."
    if fault:
        text = "The client assertion is refused: " + re.sub(r'["\\]', "'", fault) + "."
    return AuthenticationFailed(text, reason="assertion")


def _find_by_client_id(client_id: str) -> Client:
    """Return the client; its row is None when there is none, and no key matches."""
    return Client(_first(_BY_CLIENT_ID, client_id=client_id) if is_text(client_id) else None, now())


def _first(statement: sa.Select[Any], **values: Any) -> Any:
    with reading() as connection:
        return connection.execute(statement, values).first()


def _basic_credentials(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return name and password of HTTP Basic, which are form-encoded inside it (RFC 6749 §2.3.1)."""
    header = headers.get("Authorization", "")
    if header[:6].lower() != "basic ":
        return None
    basic = parse_authorization(header)
    if basic is None:
        return "", ""
    return unquote_plus(basic.username or ""), unquote_plus(basic.password or "")
