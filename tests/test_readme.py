"""The verifiers that the README has to copy, taken out of it and run on good tokens and on others."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from conftest import Server, engine_of
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from test_real_clients import NODE, access_token, issuer_of, needs_node
from test_real_clients import running as running_server
from test_serving import register

from config import HERE

SECTION = "## Verify a token in your app"
CLIENT_ID = "cid_x"
needs_go = pytest.mark.skipif(not shutil.which("go"), reason="needs go")

# What calls the README's `verify` for each line of its input; anything but the documented refusal ends it.
PYTHON_CALLER = """
import sys
import jwt
from verify import verify

for line in sys.stdin:
    try:
        print(verify(line.strip())["client_id"])
    except jwt.PyJWTError:
        print("refused")
"""
NODE_CALLER = """
import { createInterface } from 'node:readline'
import { errors } from 'jose'
import { verify } from './verify.mjs'

for await (const line of createInterface({ input: process.stdin })) {
  try {
    console.log((await verify(line)).client_id)
  } catch (error) {
    if (!(error instanceof errors.JOSEError)) throw error
    console.log('refused')
  }
}
"""
GO_CALLER = """
package main

import (
	"bufio"
	"fmt"
	"os"
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		claims, err := Verify(lines.Text())
		if err == nil {
			fmt.Println(claims.ClientID)
		} else if err == ErrInvalid {
			fmt.Println("refused")
		} else {
			panic(err)
		}
	}
}
"""


@pytest.fixture(scope="module")
def lanyard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("lanyard"), WORKERS="1") as server:
        yield server


@pytest.fixture(scope="module")
def good(lanyard: Server, forge: Callable[..., str]) -> dict[str, str]:
    """Tokens to accept, by what they are."""
    issuer = issuer_of(lanyard)
    return {
        "as Lanyard made it": access_token(lanyard, register(lanyard)),
        "with a list of audiences": forge(aud=["http://localhost:1", issuer]),
    }


@pytest.fixture(scope="module")
def bad(lanyard: Server, forge: Callable[..., str]) -> dict[str, str]:
    """Tokens to refuse, by what is wrong with them."""
    agent = register(lanyard, audiences=["http://localhost:1"])
    elsewhere = {"grant_type": "client_credentials", "resource": "http://localhost:1"}
    basic = (agent["client_id"], agent["client_secret"])
    answer = requests.post(f"{lanyard.url}/oauth/token", data=elsewhere, auth=basic).json()
    header, claims, signature = forge().split(".")
    stranger = rsa.generate_private_key(65537, 2048)
    more = encoded({**json.loads(base64.urlsafe_b64decode(claims + "==")), "scope": "admin"})
    return {
        "expired": forge(exp=int(time.time())),
        "for ever": forge(exp=None),
        "for another audience": answer["access_token"],
        "for other audiences": forge(aud=["http://localhost:1", "http://localhost:2"]),
        "for nobody": forge(aud=None),
        "of another issuer": forge(iss="http://localhost:1"),
        "of no issuer": forge(iss=None),
        "no access token": forge(head={"typ": "JWT"}),
        "of no type": forge(head={"typ": None}),
        "foreign, with a kid of ours": forge(key=stranger),
        "foreign": forge(key=stranger, head={"kid": "x"}),
        "tampered with": f"{header}.{more}.{signature}",
        "with another signature": f"{header}.{claims}.{'A' * 8}{signature[8:]}",
        "with no signature": f"{header}.{claims}.",
        "alg none": forge(head={"alg": "none"}).rpartition(".")[0] + ".",
        "alg HS256 with the public key": forge(head={"alg": "HS256"}),
        "alg RS512": forge(head={"alg": "RS512"}),
        "alg changed": forge(head={"alg": "ES256"}),
        "alg missing": forge(head={"alg": None}),
        "nothing": "",
        "rubbish": "x.y.z",
        "no objects": "W10.W10.W10",
    }


@pytest.fixture(scope="module")
def forge(lanyard: Server) -> Callable[..., str]:
    """Make a token that says whatever it is told to, signed as its header says; None leaves a field out."""
    with engine_of(lanyard.instance).connect() as connection:
        kid, jwk = connection.exec_driver_sql("SELECT kid, jwk FROM signing_keys").one()
    ours: rsa.RSAPrivateKey = jwt.PyJWK.from_json(jwk, algorithm="RS256").key
    issuer = issuer_of(lanyard)

    def make(key: rsa.RSAPrivateKey = ours, head: dict[str, Any] | None = None, **claims: Any) -> str:
        now = int(time.time())
        header = {"alg": "RS256", "typ": "at+jwt", "kid": kid, **(head or {})}
        usual = {"iss": issuer, "aud": issuer, "sub": CLIENT_ID, "client_id": CLIENT_ID, "exp": now + 60}
        text = f"{encoded(header)}.{encoded({'scope': 'read', **usual, **claims})}"
        return f"{text}.{encoded_bytes(signature_of(text.encode(), key, header['alg']))}"

    return make


def signature_of(text: bytes, key: rsa.RSAPrivateKey, alg: str | None) -> bytes:
    if alg == "HS256":
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return hmac.digest(public, text, hashlib.sha256)
    algorithm: HashAlgorithm = SHA512() if alg == "RS512" else SHA256()
    return key.sign(text, padding.PKCS1v15(), algorithm)


def encoded(fields: dict[str, Any]) -> str:
    return encoded_bytes(json.dumps({k: v for k, v in fields.items() if v is not None}).encode())


def encoded_bytes(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def snippet(language: str, issuer: str) -> str:
    """The section's one block in the language, for the issuer given."""
    _, _, section = (HERE / "README.md").read_text().partition(f"\n{SECTION}\n")
    section = section.partition("\n## ")[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "http://localhost:8080" in block
    return str(block).replace("http://localhost:8080", issuer)


def python(folder: Path, issuer: str) -> list[str]:
    (folder / "verify.py").write_text(snippet("python", issuer))
    (folder / "main.py").write_text(PYTHON_CALLER)
    return [sys.executable, "-W", "error", "main.py"]


def node(folder: Path, issuer: str) -> list[str]:
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    (folder / "verify.mjs").write_text(snippet("js", issuer))
    (folder / "main.mjs").write_text(NODE_CALLER)
    return ["node", "main.mjs"]


def go(folder: Path, issuer: str) -> list[str]:
    (folder / "go.mod").write_text("module example\n\ngo 1.19\n")
    (folder / "verify.go").write_text(snippet("go", issuer))
    (folder / "main.go").write_text(GO_CALLER)
    done = subprocess.run(["go", "build", "-o", "main"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["./main"]


@pytest.mark.parametrize(
    "language", [python, pytest.param(node, marks=needs_node), pytest.param(go, marks=needs_go)]
)
def test_the_verifier_takes_good_tokens_and_no_others(
    lanyard: Server,
    good: dict[str, str],
    bad: dict[str, str],
    tmp_path: Path,
    language: Callable[[Path, str], list[str]],
) -> None:
    command = language(tmp_path, issuer_of(lanyard))
    tokens = {**good, **bad}
    text = "".join(f"{token}\n" for token in tokens.values())
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    accepted = [
        name
        for name, said in zip(tokens, done.stdout.splitlines(), strict=True)
        if re.fullmatch("cid_.+", said)
    ]
    assert accepted == list(good)
