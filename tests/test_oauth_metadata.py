"""What the server says of itself, and that it is true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, refused

WELL_KNOWN = ["oauth-authorization-server", "openid-configuration", "oauth-protected-resource", "jwks.json"]


def test_the_metadata_matches_the_endpoints(client: FlaskClient) -> None:
    methods = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
    algorithms = ["RS256", "PS256", "ES256", "EdDSA", "Ed25519"]
    here = "http://localhost:8080"
    assert client.get("/.well-known/oauth-authorization-server").json == {
        "issuer": here,
        "authorization_endpoint": f"{here}/oauth/authorize",
        "token_endpoint": f"{here}/oauth/token",
        "jwks_uri": f"{here}/.well-known/jwks.json",
        "introspection_endpoint": f"{here}/oauth/introspect",
        "revocation_endpoint": f"{here}/oauth/revoke",
        "response_types_supported": ["none"],
        "grant_types_supported": ["client_credentials", "refresh_token"],
        "token_endpoint_auth_methods_supported": methods,
        "token_endpoint_auth_signing_alg_values_supported": algorithms,
        "introspection_endpoint_auth_methods_supported": [*methods, "Bearer"],
        "introspection_endpoint_auth_signing_alg_values_supported": algorithms,
        "revocation_endpoint_auth_methods_supported": methods,
        "revocation_endpoint_auth_signing_alg_values_supported": algorithms,
    }


def test_the_metadata_is_valid(client: FlaskClient) -> None:
    AuthorizationServerMetadata(client.get("/.well-known/oauth-authorization-server").json).validate()


def test_every_endpoint_it_names_is_there(client: FlaskClient) -> None:
    document = client.get("/.well-known/oauth-authorization-server").json
    for name, url in document.items():
        if name.endswith(("_endpoint", "_uri")):
            assert client.get(url.removeprefix("http://localhost:8080")).status_code != 404


def test_openid_clients_find_the_same_document_and_what_they_require(client: FlaskClient) -> None:
    documents = [client.get(f"/.well-known/{name}").json for name in WELL_KNOWN[:2]]
    required = {"subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["ES256"]}
    assert documents[0] | required == documents[1]


def test_an_issuer_with_a_path_has_its_rfc_8414_metadata_url(
    make_app: Callable[..., Flask],
) -> None:
    issuer = "https://id.example.com/lanyard/one"
    client = make_app(ISSUER=issuer).test_client()
    for name in WELL_KNOWN[:3]:
        document = client.get(f"/.well-known/{name}/lanyard/one").json
        assert issuer in (document.get("issuer"), document.get("resource"))
        assert document["jwks_uri"] == f"{issuer}/.well-known/jwks.json"
        assert client.get(f"/.well-known/{name}/another").status_code == 404


@pytest.mark.parametrize("issuer", ["https://id.example.com", "https://id.example.com/"])
def test_the_issuer_is_the_configured_string_exactly(make_app: Callable[..., Flask], issuer: str) -> None:
    document = make_app(ISSUER=issuer).test_client().get("/.well-known/oauth-authorization-server").json
    assert document["issuer"] == issuer
    assert document["token_endpoint"] == "https://id.example.com/oauth/token"


def test_the_protected_resource_names_its_authorization_server(client: FlaskClient) -> None:
    where = (
        client.get("/api/agents/me").headers["WWW-Authenticate"].split('resource_metadata="')[1].rstrip('"')
    )
    document = client.get(where.removeprefix("http://localhost:8080")).json
    assert document["resource"] == "http://localhost:8080"
    assert document["authorization_servers"] == ["http://localhost:8080"]
    assert document["bearer_methods_supported"] == ["header"]


def test_every_bearer_failure_names_the_resource_metadata(client: FlaskClient) -> None:
    for headers in ({}, {"Authorization": "Bearer guess"}):
        challenge = client.get("/api/agents", headers=headers).headers["WWW-Authenticate"]
        assert "/.well-known/oauth-protected-resource" in challenge


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_documents_are_cacheable_and_carry_an_etag(client: FlaskClient, name: str) -> None:
    response = client.get(f"/.well-known/{name}")
    assert response.headers["Cache-Control"].startswith("public, max-age=")
    again = client.get(f"/.well-known/{name}", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["Cache-Control"] == response.headers["Cache-Control"]


def test_the_etag_of_the_keys_changes_with_them(client: FlaskClient) -> None:
    before = client.get("/.well-known/jwks.json").headers["ETag"]
    client.post("/api/keys/rotate", headers=OPERATOR)
    assert client.get("/.well-known/jwks.json").headers["ETag"] != before


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_authorization_endpoint_refuses_every_request(client: FlaskClient, method: str) -> None:
    response = client.open(
        "/oauth/authorize?response_type=code&client_id=x&redirect_uri=https://a", method=method
    )
    assert response.status_code == 400
    if method == "GET":
        refused(response, 400, "unsupported_response_type")
