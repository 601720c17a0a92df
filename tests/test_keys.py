"""Signing keys: one at the first start, kept, named by its thumbprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import settings_for
from flask import Flask
from joserfc.jwk import import_key

from app import create_app


def published(app: Flask) -> list[dict[str, str]]:
    keys: list[dict[str, str]] = app.test_client().get("/.well-known/jwks.json").json["keys"]
    return keys


@pytest.mark.parametrize(
    ("algorithm", "members"),
    [
        ("RS256", {"kty": "RSA"}),
        ("ES256", {"kty": "EC", "crv": "P-256"}),
        ("EdDSA", {"kty": "OKP", "crv": "Ed25519"}),
    ],
)
def test_the_first_start_makes_one_key(tmp_path: Path, algorithm: str, members: dict[str, str]) -> None:
    (key,) = published(create_app(settings_for(tmp_path, SIGNING_ALG=algorithm)))
    assert key["kid"] == import_key(dict(key)).thumbprint()
    assert {name: key[name] for name in ("alg", "use", *members)} == {
        "alg": algorithm,
        "use": "sig",
        **members,
    }
    assert "d" not in key


def test_a_restart_keeps_the_key(make_app: Callable[..., Flask]) -> None:
    assert published(make_app()) == published(make_app())


def test_a_new_algorithm_gets_a_key_of_its_own_and_the_old_one_stays_published(
    make_app: Callable[..., Flask],
) -> None:
    before = published(make_app())
    after = published(make_app(SIGNING_ALG="ES256"))
    assert [key["alg"] for key in after] == ["RS256", "ES256"]
    assert after[0] == before[0]
    assert published(make_app()) == after
