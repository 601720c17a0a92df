"""Other people's OAuth and JWT libraries, at their current releases, against real gunicorn."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import ECKey, KeySet
from joserfc.jwt import JWTClaimsRegistry
from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session as RequestsOAuth2Session
from support.programs import NODE, needs_node
from support.servers import Server, access_token, issuer_of, register, running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("local")) as server:
        yield server


@pytest.fixture(scope="module")
def key() -> ECKey:
    """The private key of the agents that sign in with one."""
    private = ECKey.generate_key("P-256", parameters={"use": "sig", "alg": "ES256"})
    private.ensure_kid()
    return private


@pytest.fixture(scope="module")
def agent(local: Server, key: ECKey) -> dict[str, Any]:
    """An agent with a secret and a key."""
    return register(local, jwks={"keys": [key.as_dict(private=False)]})


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


@needs_node
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "private_key_jwt"])
def test_openid_client_takes_a_token_through_its_life(
    local: Server, agent: dict[str, Any], key: ECKey, method: str
) -> None:
    seen = run_node(
        "openid_client.mjs",
        issuer_of(local),
        method,
        CLIENT_ID=agent["client_id"],
        CLIENT_SECRET=agent["client_secret"],
        PRIVATE_JWK=json.dumps(key.as_dict(private=True)),
    )
    assert seen["metadata"]["issuer"] == issuer_of(local)
    assert method in seen["metadata"]["token_endpoint_auth_methods_supported"]
    assert seen["token"]["scope"] == "read"
    assert seen["introspected"]["active"] is True
    assert seen["introspected"]["client_id"] == agent["client_id"]
    assert seen["introspected"]["scope"] == "read"
    assert seen["refreshed"]["scope"] == "read"
    assert seen["refreshed"]["access_token"] != seen["token"]["access_token"]
    assert seen["revoked"] == {"active": False}
