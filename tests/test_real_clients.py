"""Other people's OAuth and JWT libraries, at their current releases, against real gunicorn."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from typing import Any

import jwt
import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry
from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session as RequestsOAuth2Session
from support.programs import NODE, needs_node
from support.servers import Server, access_token, issuer_of, register, running

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("local")) as server:
        yield server


@pytest.fixture(scope="module")
def key() -> ECKey:
    """A private key of the agent."""
    private = ECKey.generate_key("P-256", parameters={"use": "sig", "alg": "ES256"})
    private.ensure_kid()
    return private


@pytest.fixture(scope="module")
def okp_key() -> OKPKey:
    """Another one; some clients call its algorithm EdDSA, others Ed25519 (RFC 9864)."""
    private = OKPKey.generate_key("Ed25519", parameters={"use": "sig"})
    private.ensure_kid()
    return private


@pytest.fixture(scope="module")
def rsa_key() -> RSAKey:
    return RSAKey.generate_key(2048)


@pytest.fixture(scope="module")
def agent(local: Server, key: ECKey, okp_key: OKPKey, rsa_key: RSAKey) -> dict[str, Any]:
    """An agent with a secret and three keys."""
    return register(local, jwks=KeySet([key, okp_key, rsa_key]).as_dict(private=False))


def run_node(script: str, *arguments: str, **variables: str) -> Any:
    """What the script prints, as JSON."""
    command = ["node", str(NODE / script), *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_authlibs_client_signs_in_with_its_private_key(
    local: Server, agent: dict[str, Any], key: ECKey
) -> None:
    url = f"{issuer_of(local)}/oauth/token"
    method = "private_key_jwt"
    with OAuth2Session(agent["client_id"], key, token_endpoint_auth_method=method, scope="read") as session:
        session.register_client_auth_method(PrivateKeyJWT(url, alg="ES256"))
        first = session.fetch_token(url, grant_type="client_credentials")
        assert (first["token_type"], first["scope"]) == ("Bearer", "read")
        assert session.get(f"{local.url}/api/agents/me").status_code == 200
        again = session.refresh_token(url, refresh_token=first["refresh_token"])
        assert again["access_token"] != first["access_token"]


def test_authlibs_default_private_key_jwt_works_at_every_endpoint(
    local: Server, agent: dict[str, Any], rsa_key: RSAKey
) -> None:
    # By default, `aud` is the URL that is called, and the algorithm is RS256.
    url = f"{issuer_of(local)}/oauth"
    method = "private_key_jwt"
    with OAuth2Session(
        agent["client_id"],
        rsa_key.as_pem(private=True).decode(),
        token_endpoint_auth_method=method,
        revocation_endpoint_auth_method=method,
    ) as session:
        session.register_client_auth_method(PrivateKeyJWT())
        first = session.fetch_token(f"{url}/token", grant_type="client_credentials")
        again = session.refresh_token(f"{url}/refresh", refresh_token=first["refresh_token"])
        token = again["access_token"]
        active = session.introspect_token(f"{url}/introspect", token=token).json()
        assert (active["active"], active["client_id"]) == (True, agent["client_id"])
        assert session.revoke_token(f"{url}/revoke", token=token).status_code == 200
        assert session.introspect_token(f"{url}/introspect", token=token).json() == {"active": False}


@pytest.mark.parametrize("include_client_id", [None, True], ids=["basic", "post"])
def test_requests_oauthlib_gets_uses_and_refreshes_a_token(
    local: Server,
    agent: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    include_client_id: bool | None,
) -> None:
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # plain http
    url = f"{local.url}/oauth/token"
    credentials = {"client_id": agent["client_id"], "client_secret": agent["client_secret"]}
    client = BackendApplicationClient(agent["client_id"], scope=["read"])
    with RequestsOAuth2Session(client=client) as session:
        first = session.fetch_token(url, include_client_id=include_client_id, **credentials)
        assert first["scope"] == ["read"]
        assert session.get(f"{local.url}/api/agents/me").status_code == 200
        again = session.refresh_token(url, **credentials)
        assert again["access_token"] != first["access_token"]


@pytest.fixture(scope="module", params=["RS256", "ES256", "EdDSA"])
def signed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """An issuer for each algorithm, the algorithm, a token, and the client id it is for."""
    with running(tmp_path_factory.mktemp("signed"), SIGNING_ALG=request.param, WORKERS="1") as server:
        agent = register(server)
        yield [issuer_of(server), request.param, access_token(server, agent), agent["client_id"]]


def verify_with_joserfc(issuer: str, alg: str, token: str) -> tuple[Any, Any]:
    keys = KeySet.import_key_set(requests.get(f"{issuer}/.well-known/jwks.json").json())
    found = joserfc_jwt.decode(token, keys, algorithms=[alg])
    ours: Any = {"essential": True, "value": issuer}
    JWTClaimsRegistry(iss=ours, aud=ours, exp={"essential": True}).validate(found.claims)
    return found.header, found.claims


def verify_with_pyjwt(issuer: str, alg: str, token: str) -> tuple[Any, Any]:
    key = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json").get_signing_key_from_jwt(token)
    found = jwt.decode_complete(token, key, [alg], audience=issuer, issuer=issuer)
    return found["header"], found["payload"]


def verify_with_jose(issuer: str, alg: str, token: str) -> tuple[Any, Any]:
    found = run_node("jose.mjs", issuer, issuer, alg, token)
    return found["protectedHeader"], found["payload"]


@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")  # joserfc would call EdDSA Ed25519
@pytest.mark.parametrize(
    "verify", [verify_with_joserfc, verify_with_pyjwt, pytest.param(verify_with_jose, marks=needs_node)]
)
def test_a_token_of_every_algorithm_verifies_from_the_jwks(
    signed: list[str], verify: Callable[[str, str, str], tuple[Any, Any]]
) -> None:
    issuer, alg, token, client_id = signed
    header, claims = verify(issuer, alg, token)
    assert (header["alg"], header["typ"]) == (alg, "at+jwt")
    assert claims["client_id"] == client_id


@pytest.mark.parametrize("seconds", [0.2, 5])
def test_pyjwt_with_a_leeway_accepts_a_fresh_token_by_a_clock_behind(
    local: Server, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) - timedelta(seconds=seconds)

    issuer = issuer_of(local)
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")
    token = access_token(local, agent)
    options: Any = {"algorithms": ["ES256"], "audience": issuer, "issuer": issuer}
    monkeypatch.setattr("jwt.api_jwt.datetime", Behind)
    key = keys.get_signing_key_from_jwt(token)
    assert jwt.decode(token, key, leeway=30, **options)["client_id"] == agent["client_id"]
    if seconds > 1:  # with less, it depends on the part of the second
        with pytest.raises(jwt.ImmatureSignatureError):
            jwt.decode(token, key, **options)


def test_pyjwts_key_client_sees_no_gap_when_keys_rotate(serve: Callable[..., Server]) -> None:
    # One worker: another may publish its key set of a second ago, which only a rotation `now` would show.
    server = serve(LOCAL="1", WORKERS="1").wait()
    agent = register(server)
    issuer = issuer_of(server)
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json", cooldown_duration=0)

    def verify(token: str, keys: jwt.PyJWKClient = keys) -> str:
        key = keys.get_signing_key_from_jwt(token)
        jwt.decode(token, key, ["ES256"], audience=issuer, issuer=issuer)
        return str(key.key_id)

    before = access_token(server, agent)
    first = verify(before)
    rotated = requests.post(f"{server.url}/api/keys/rotate", json={}).json()["key"]["kid"]
    after = access_token(server, agent)
    assert verify(before) == verify(after) == first, "the new key is published, and does not sign yet"
    published = {key.key_id for key in jwt.PyJWKClient(keys.uri).get_signing_keys()}
    assert published == {first, rotated}

    leaked = requests.post(f"{server.url}/api/keys/rotate", json={"now": True}).json()["key"]["kid"]
    assert verify(access_token(server, agent)) == leaked, "an unknown kid makes the client fetch the keys"
    with pytest.raises(jwt.PyJWKClientError):
        verify(before)


@pytest.fixture(scope="module")
def lives(
    local: Server, agent: dict[str, Any], key: ECKey, okp_key: OKPKey
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the tokens of each version of openid-client went through, by document and method."""
    variables = {
        "CLIENT_ID": agent["client_id"],
        "CLIENT_SECRET": agent["client_secret"],
        "EC_KEY": json.dumps(key.as_dict(private=True)),
        "OKP_KEY": json.dumps(okp_key.as_dict(private=True)),
    }
    scripts = {"6": "openid_client.mjs", "5": "openid_client_5.mjs"}
    return {version: run_node(script, issuer_of(local), **variables) for version, script in scripts.items()}


@needs_node
@pytest.mark.parametrize("version", ["6", "5"])
@pytest.mark.parametrize("document", ["openid-configuration", "oauth-authorization-server"])
@pytest.mark.parametrize(
    "method",
    ["client_secret_basic", "client_secret_post", "private_key_jwt ES256", "private_key_jwt Ed25519"],
)
def test_openid_client_takes_a_token_through_its_life(
    local: Server, agent: dict[str, Any], lives: dict[str, Any], version: str, document: str, method: str
) -> None:
    seen = lives[version][f"{document} {method}"]
    assert "error" not in seen, seen
    assert seen["metadata"]["issuer"] == issuer_of(local)
    assert method.split()[0] in seen["metadata"]["token_endpoint_auth_methods_supported"]
    assert seen["token"]["scope"] == "read"
    assert seen["introspected"]["active"] is True
    assert seen["introspected"]["client_id"] == agent["client_id"]
    assert seen["introspected"]["scope"] == "read"
    assert seen["refreshed"]["scope"] == "read"
    assert seen["refreshed"]["access_token"] != seen["token"]["access_token"]
    assert seen["revoked"] == {"active": False}
