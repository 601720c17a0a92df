"""Client authentication: one method at a time, and nothing learnt from a refusal."""

from __future__ import annotations

import json
import secrets
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from typing import Any

import bcrypt
import pytest
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from flask.testing import FlaskClient
from joserfc import jwt
from joserfc.errors import BadSignatureError
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry
from support.callers import FORM, Operator, ask_refresh, ask_token, refused
from support.clock import Clock
from werkzeug.test import TestResponse

import credentials
from client_auth import ASSERTION_ALGORITHMS
from models import now

WELL_FORMED = f"cs_{'a' * 51}{credentials._checksum('cs_' + 'a' * 51)}"


def ask_basic(client: FlaskClient, username: str, password: str, **form: str) -> TestResponse:
    header = "Basic " + b64encode(f"{username}:{password}".encode()).decode()
    body = {"grant_type": "client_credentials", **form}
    return client.post("/oauth/token", data=body, content_type=FORM, headers={"Authorization": header})


def another_secret() -> str:
    """Well formed, and nobody's."""
    return credentials.new_client_secret(4).text


def test_basic_credentials_work(client: FlaskClient, agent: dict[str, Any]) -> None:
    assert ask_basic(client, agent["client_id"], agent["client_secret"]).status_code == 200


def test_basic_credentials_are_percent_decoded(client: FlaskClient, agent: dict[str, Any]) -> None:
    escaped = ["".join(f"%{ord(c):02X}" for c in agent[name]) for name in ("client_id", "client_secret")]
    assert ask_basic(client, *escaped).status_code == 200


def test_the_client_id_may_be_repeated_beside_basic_credentials(
    client: FlaskClient, agent: dict[str, Any]
) -> None:
    response = ask_basic(client, agent["client_id"], agent["client_secret"], client_id=agent["client_id"])
    assert response.status_code == 200


def test_two_methods_at_once_are_an_invalid_request(client: FlaskClient, agent: dict[str, Any]) -> None:
    both = ask_basic(client, agent["client_id"], agent["client_secret"], client_secret=agent["client_secret"])
    refused(both, 400, "invalid_request")
    other = ask_basic(client, agent["client_id"], agent["client_secret"], client_id="cid_other")
    refused(other, 400, "invalid_request")
    refused(ask_token(client, agent, client_assertion="a.b.c"), 400, "invalid_request")


def test_wrong_secret_and_unknown_client_look_alike(client: FlaskClient, agent: dict[str, Any]) -> None:
    wrong = ask_token(client, agent, client_secret=another_secret())
    unknown = ask_token(client, agent, client_id=credentials.new_client_id())
    malformed = ask_token(client, agent, client_secret="hunter2")
    for response in (wrong, unknown, malformed):
        refused(response, 401, "invalid_client")
        assert response.headers["WWW-Authenticate"] == 'Basic realm="lanyard"'
    assert wrong.data == unknown.data == malformed.data
    headers = [[pair for pair in r.headers if pair[0] != "X-Request-Id"] for r in (wrong, unknown, malformed)]
    assert headers[0] == headers[1] == headers[2]


def test_wrong_secret_and_unknown_client_cost_the_same_work(
    client: FlaskClient, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    real = bcrypt.checkpw
    monkeypatch.setattr(bcrypt, "checkpw", lambda word, hashed: (asked.append(hashed), real(word, hashed))[1])
    ask_token(client, agent, client_secret=another_secret())
    ask_token(client, agent, client_id=credentials.new_client_id())
    assert [hashed[:7] for hashed in asked] == [b"$2b$04$"] * 2
    ask_token(client, agent, client_secret="hunter2")
    assert len(asked) == 2, "a malformed secret is not worth a hash"


@pytest.mark.parametrize(
    "fields",
    [
        {"client_id": ""},
        {"client_secret": ""},
        {"client_secret": "x" * 80},
        {"client_secret": "cs_" + "é" * 57},
        {"client_id": "x" * 10_000},
    ],
    ids=["no id", "no secret", "80 bytes", "not ASCII", "long id"],
)
def test_missing_and_misshapen_credentials_are_refused(
    client: FlaskClient, agent: dict[str, Any], fields: dict[str, str]
) -> None:
    refused(ask_token(client, agent, **fields), 401, "invalid_client")


@pytest.mark.parametrize(
    "header",
    [
        "Basic",
        "Basic ",
        "Basic !!!",
        "Basic YTpi\xff",
        "Basic " + b64encode(b"no-colon").decode(),
        "Basic " + b64encode(b"\xff\xfe:\xff").decode(),
        "Basic " + b64encode(b":").decode(),
        "Basic " + b64encode(f"%00:{WELL_FORMED}".encode()).decode(),
        "Basic " + b64encode("é:é".encode()).decode(),
        "Basic " + b64encode(b"a\0b:c").decode(),
        "Bearer eyJ.e30.x",
        "Nonsense",
        ",",
    ],
)
def test_a_strange_authorization_header_is_refused(client: FlaskClient, header: str) -> None:
    body = {"grant_type": "client_credentials"}
    response = client.post("/oauth/token", data=body, content_type=FORM, headers={"Authorization": header})
    refused(response, 401, "invalid_client")


def test_only_the_right_secret_reveals_that_the_agent_is_off(
    client: FlaskClient, operator: Operator, agent: dict[str, Any]
) -> None:
    operator.act(agent, "deactivate")
    stranger = ask_token(client, agent, client_secret=another_secret())
    owner = ask_token(client, agent)
    assert "deactivated" not in refused(stranger, 401, "invalid_client")
    assert "deactivated" in refused(owner, 401, "invalid_client")


# private_key_jwt, RFC 7523


def generate(algorithm: str) -> Key:
    if algorithm == "ES256":
        return ECKey.generate_key("P-256")
    if algorithm in ("EdDSA", "Ed25519"):
        return OKPKey.generate_key("Ed25519")
    return RSAKey.generate_key(2048)


def register(operator: Operator, *keys: Key, **fields: Any) -> dict[str, Any]:
    jwks = {"keys": [key.as_dict(private=False) for key in keys]}
    return operator.create(token_endpoint_auth_method="private_key_jwt", jwks=jwks, **fields)


Sign = Callable[..., str]


@pytest.fixture(scope="module")
def key() -> Key:
    return ECKey.generate_key("P-256")


@pytest.fixture
def keyed_agent(operator: Operator, key: Key) -> dict[str, Any]:
    """An agent without a secret: it signs with `key`."""
    return register(operator, key)


@pytest.fixture
def sign(keyed_agent: dict[str, Any], key: Key, time_machine: Clock) -> Sign:
    """Make an assertion; the arguments replace claims (None leaves one out) and headers."""

    def make(
        header: dict[str, Any] | None = None, signer: Key = key, registry: Any = None, **claims: Any
    ) -> str:
        now = int(time_machine.now().timestamp())
        plain = {
            "iss": keyed_agent["client_id"],
            "sub": keyed_agent["client_id"],
            "aud": "http://localhost:8080",
            "iat": now,
            "exp": now + 300,
            "jti": secrets.token_hex(8),
            **claims,
        }
        body = {name: value for name, value in plain.items() if value is not None}
        registry = registry or JWSRegistry(algorithms=list(JWSRegistry.algorithms), strict_check_header=False)
        return jwt.encode({"alg": "ES256", **(header or {})}, body, signer, registry=registry)

    return make


def ask_signed(client: FlaskClient, assertion: str, **fields: Any) -> TestResponse:
    body = {
        "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": assertion,
        **fields,
    }
    return client.post("/oauth/token", data=body, content_type=FORM)


def test_an_agent_with_keys_has_no_secret(operator: Operator, keyed_agent: dict[str, Any]) -> None:
    assert set(keyed_agent) == {"agent", "client_id"}
    assert keyed_agent["agent"]["token_endpoint_auth_method"] == "private_key_jwt"
    path = f"/{keyed_agent['agent']['id']}"
    assert operator.call("GET", f"{path}/secrets").json == {"secrets": []}
    assert operator.call("POST", f"{path}/rotate").status_code == 409


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA", "Ed25519"])
def test_each_algorithm_proves_an_agent(client: FlaskClient, operator: Operator, algorithm: str) -> None:
    key = generate(algorithm)
    agent = register(operator, key)
    claims = {name: agent["client_id"] for name in ("iss", "sub")}
    moment = int(now().timestamp())
    claims |= {"aud": "http://localhost:8080/oauth/token", "exp": moment + 60, "jti": "once"}
    assertion = jwt.encode({"alg": algorithm}, claims, key, registry=ASSERTION_ALGORITHMS)
    response = ask_signed(client, assertion)
    assert response.status_code == 200, response.text
    assert ask_refresh(client, response.json["refresh_token"]).status_code == 200


def test_authlibs_client_makes_assertions_that_work(client: FlaskClient, operator: Operator) -> None:
    key = RSAKey.generate_key(2048)
    agent = register(operator, key)
    method = PrivateKeyJWT("http://localhost:8080/oauth/token")
    session = type("Session", (), {"client_id": agent["client_id"], "client_secret": key})()
    _, _, body = method(
        session, "POST", "http://localhost:8080/oauth/token", {}, "grant_type=client_credentials"
    )
    assert client.post("/oauth/token", data=body, content_type=FORM).status_code == 200


def test_any_of_several_keys_will_do(client: FlaskClient, operator: Operator, key: Key) -> None:
    other = RSAKey.generate_key(2048)
    agent = register(operator, other, key)
    moment = int(now().timestamp())
    claims = {"iss": agent["client_id"], "sub": agent["client_id"], "jti": "1"}
    claims |= {"aud": "http://localhost:8080", "exp": moment + 60}
    assert ask_signed(client, jwt.encode({"alg": "ES256"}, claims, key)).status_code == 200


def test_an_assertion_works_once(client: FlaskClient, sign: Sign) -> None:
    assertion = sign()
    assert ask_signed(client, assertion).status_code == 200
    assert "jti" in refused(ask_signed(client, assertion), 401, "invalid_client")


def test_the_jti_of_another_agent_is_no_obstacle(
    client: FlaskClient, operator: Operator, key: Key, sign: Sign
) -> None:
    other = register(operator, key)["client_id"]
    assert ask_signed(client, sign(jti="same")).status_code == 200
    assert ask_signed(client, sign(jti="same", iss=other, sub=other)).status_code == 200


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "https://other.example.com"},
        {"aud": ["http://localhost:8080", "https://other.example.com"]},
        {"aud": None},
        {"aud": []},
        {"aud": {"a": 1}},
        {"iss": "someone"},
        {"iss": None},
        {"exp": 1},
        {"exp": None},
        {"exp": 2**70, "iat": None},
        {"exp": "soon"},
        {"iat": 2**40},
        {"nbf": 2**40},
        {"jti": None},
        {"jti": 5},
        {"jti": ""},
    ],
    ids=repr,
)
def test_a_claim_that_is_not_right_is_refused(
    client: FlaskClient, sign: Sign, claims: dict[str, Any]
) -> None:
    refused(ask_signed(client, sign(**claims)), 401, "invalid_client")


def test_a_header_member_that_is_not_understood_is_ignored(client: FlaskClient, sign: Sign) -> None:
    assert ask_signed(client, sign(header={"note": "x"})).status_code == 200


@pytest.mark.parametrize("crit", [[], ["exp"], ["kid"], "x", None])
def test_a_critical_header_member_is_refused(client: FlaskClient, sign: Sign, crit: object) -> None:
    registry = JWSRegistry(algorithms=["ES256"])
    registry.check_header = lambda header: None  # type: ignore[method-assign]
    assertion = sign(header={"crit": crit, "kid": "x", "exp": 1}, registry=registry)
    refused(ask_signed(client, assertion), 401, "invalid_client")


@pytest.mark.parametrize("named", ["EdDSA", "Ed25519"])
@pytest.mark.parametrize("used", ["EdDSA", "Ed25519"])
def test_both_names_of_one_algorithm_are_equal(
    client: FlaskClient, operator: Operator, sign: Sign, named: str, used: str
) -> None:
    key = generate("Ed25519")
    jwk = {**key.as_dict(private=False), "alg": named}
    agent = operator.create(token_endpoint_auth_method="private_key_jwt", jwks={"keys": [jwk]})
    claims = {"iss": agent["client_id"], "sub": agent["client_id"]}
    registry = credentials.Algorithms(algorithms=[used])  # joserfc's own warns of one of the names
    assertion = sign(header={"alg": used}, signer=key, registry=registry, **claims)
    assert ask_signed(client, assertion).status_code == 200


@pytest.mark.parametrize(
    "aud",
    [
        ["http://localhost:8080", "http://localhost:8080/oauth/token"],
        "http://localhost:8080/",
        ["HTTP://localhost:8080/oauth/token"],
    ],
)
def test_an_assertion_may_be_for_any_of_our_names(client: FlaskClient, sign: Sign, aud: object) -> None:
    assert ask_signed(client, sign(aud=aud)).status_code == 200


def test_an_assertion_may_be_for_the_endpoint_that_is_called(client: FlaskClient, sign: Sign) -> None:
    for endpoint in ("introspect", "revoke"):
        body = {
            "token": "x",
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": sign(aud=f"http://localhost:8080/oauth/{endpoint}"),
        }
        assert client.post(f"/oauth/{endpoint}", data=body).status_code == 200
    refused(ask_signed(client, sign(aud="http://localhost:8080/oauth/revoke")), 401, "invalid_client")


def test_an_audience_in_a_list_of_one_is_fine(client: FlaskClient, sign: Sign) -> None:
    assert ask_signed(client, sign(aud=["http://localhost:8080"])).status_code == 200


def test_an_assertion_is_good_for_five_minutes_at_most(
    client: FlaskClient, sign: Sign, time_machine: Clock
) -> None:
    now = int(time_machine.now().timestamp())
    assert ask_signed(client, sign(iat=None, exp=now + 330)).status_code == 200
    refused(ask_signed(client, sign(iat=None, exp=now + 331)), 401, "invalid_client")
    assert ask_signed(client, sign(iat=now - 329, exp=now + 3600)).status_code == 200
    refused(ask_signed(client, sign(iat=now - 330, exp=now + 3600)), 401, "invalid_client")


def test_a_spent_assertion_is_remembered_as_long_as_it_could_live(
    client: FlaskClient, sign: Sign, time_machine: Clock
) -> None:
    assertion = sign()
    assert ask_signed(client, assertion).status_code == 200
    time_machine.advance(seconds=329)
    assert "jti" in refused(ask_signed(client, assertion), 401, "invalid_client")


def test_a_stranger_learns_nothing(client: FlaskClient, key: Key, sign: Sign) -> None:
    unknown = ask_signed(client, sign(iss="cid_x", sub="cid_x"))
    forged = ask_signed(client, sign(signer=ECKey.generate_key("P-256")))
    garbage = ask_signed(client, "a.b.c")
    for response in (unknown, forged, garbage):
        refused(response, 401, "invalid_client")
    assert unknown.data == forged.data == garbage.data


def test_an_agent_without_keys_and_none_cost_the_same_work(
    client: FlaskClient, agent: dict[str, Any], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    decode = jwt.decode
    monkeypatch.setattr(
        jwt, "decode", lambda *args, **kwargs: (checked.append("x"), decode(*args, **kwargs))[1]
    )
    counts = []
    for claims in ({}, {"sub": agent["client_id"]}, {"sub": credentials.new_client_id()}):
        checked.clear()
        refused(ask_signed(client, sign(signer=ECKey.generate_key("P-256"), **claims)), 401, "invalid_client")
        counts.append(len(checked))
    assert min(counts) >= 1


@pytest.mark.parametrize(
    ("header", "signer"),
    [
        ({"alg": "HS256"}, OctKey.import_key("x" * 32)),
        ({"alg": "RS512"}, RSAKey.generate_key(2048)),
        ({"alg": "ES384"}, ECKey.generate_key("P-384")),
    ],
    ids=["HS256", "RS512", "ES384"],
)
def test_other_algorithms_are_refused(
    client: FlaskClient, sign: Sign, header: dict[str, Any], signer: Key
) -> None:
    refused(ask_signed(client, sign(header=header, signer=signer)), 401, "invalid_client")


@pytest.mark.parametrize("sub", [None, 5, "", "a\0", {}])
def test_a_strange_subject_is_refused(client: FlaskClient, sign: Sign, sub: object) -> None:
    refused(ask_signed(client, sign(sub=sub, iss=sub)), 401, "invalid_client")


@pytest.mark.parametrize("assertion", ["x", "...", "é.é.é", "e30.e30.e30", "bnVsbA.bnVsbA.", "W10.W10.W10"])
def test_a_strange_assertion_is_refused(client: FlaskClient, assertion: str) -> None:
    refused(ask_signed(client, assertion), 401, "invalid_client")


def test_a_subject_that_utf_8_cannot_carry_is_refused(client: FlaskClient) -> None:
    payload = b64encode(b'{"sub": "\\ud800"}').decode().rstrip("=")
    refused(ask_signed(client, f"eyJhbGciOiJFUzI1NiJ9.{payload}.x"), 401, "invalid_client")


def test_a_deeply_nested_assertion_is_refused(client: FlaskClient) -> None:
    payload = b64encode(b"[" * 30_000).decode().rstrip("=")
    refused(ask_signed(client, f"eyJhbGciOiJFUzI1NiJ9.{payload}.x"), 401, "invalid_client")


def test_the_assertion_type_must_be_named(client: FlaskClient, sign: Sign) -> None:
    text = refused(ask_signed(client, sign(), client_assertion_type="x"), 400, "invalid_request")
    assert "client_assertion_type" in text


def test_a_client_id_beside_an_assertion_must_be_its_subject(
    client: FlaskClient, keyed_agent: dict[str, Any], sign: Sign
) -> None:
    assert ask_signed(client, sign(), client_id=keyed_agent["client_id"]).status_code == 200
    refused(ask_signed(client, sign(), client_id="cid_other"), 400, "invalid_request")


def test_an_agent_that_is_off_cannot_sign_in(
    client: FlaskClient, operator: Operator, keyed_agent: dict[str, Any], sign: Sign
) -> None:
    operator.act(keyed_agent, "deactivate")
    assert "deactivated" in refused(ask_signed(client, sign()), 401, "invalid_client")


def test_keys_can_be_replaced_but_not_all_taken(
    client: FlaskClient, operator: Operator, keyed_agent: dict[str, Any], sign: Sign
) -> None:
    new = ECKey.generate_key("P-256")
    assert operator.patch(keyed_agent, jwks=None).status_code == 409
    assert operator.patch(keyed_agent, jwks={"keys": [new.as_dict(private=False)]}).status_code == 200
    refused(ask_signed(client, sign()), 401, "invalid_client")
    assert ask_signed(client, sign(signer=new)).status_code == 200


def test_an_agent_with_a_secret_may_have_keys_as_well(
    client: FlaskClient, operator: Operator, key: Key
) -> None:
    agent = operator.create(jwks={"keys": [key.as_dict(private=False)]})
    moment = int(now().timestamp())
    claims = {"iss": agent["client_id"], "sub": agent["client_id"], "jti": "1"}
    claims |= {"aud": "http://localhost:8080", "exp": moment + 60}
    assert ask_signed(client, jwt.encode({"alg": "ES256"}, claims, key)).status_code == 200
    assert ask_token(client, agent).status_code == 200


@pytest.mark.filterwarnings("ignore:Key size should be")
@pytest.mark.parametrize(
    "make",
    [
        lambda: ECKey.generate_key("P-256").as_dict(private=True),
        lambda: RSAKey.generate_key(2048).as_dict(private=True),
        lambda: OctKey.generate_key(256).as_dict(),
        lambda: RSAKey.generate_key(1024).as_dict(private=False),
        lambda: ECKey.generate_key("P-384").as_dict(private=False),
        lambda: OKPKey.generate_key("X25519").as_dict(private=False),
        lambda: {**ECKey.generate_key("P-256").as_dict(private=False), "use": "enc"},
        lambda: {**ECKey.generate_key("P-256").as_dict(private=False), "kid": 5},
        lambda: {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        lambda: {"kty": "EC"},
        lambda: {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        lambda: {"kty": ["RSA"]},
        lambda: {},
        lambda: "key",
        lambda: None,
    ],
    ids=[
        "private EC", "private RSA", "symmetric", "short RSA", "P-384", "X25519", "for encryption",
        "kid a number", "not on the curve", "no point", "tiny RSA", "kty a list", "empty", "a string", "null",
    ],
)  # fmt: skip
def test_a_key_that_is_private_or_no_good_is_refused(operator: Operator, make: Callable[[], Any]) -> None:
    jwk = make()
    response = operator.call("POST", json={"name": "x", "jwks": {"keys": [jwk]}})
    assert response.status_code == 400
    assert list(response.json["fields"]) == ["jwks"]
    if isinstance(jwk, dict) and "d" in jwk:
        assert json.dumps(jwk["d"]) not in response.text


def test_a_private_key_is_refused_without_a_search_for_its_primes(operator: Operator) -> None:
    """Which takes seconds of a core for this one."""
    number = urlsafe_b64encode(b"\xff" * 2048).decode().rstrip("=")
    jwk = {"kty": "RSA", "n": number, "e": "AQAB", "d": number}
    began = time.monotonic()
    response = operator.call("POST", json={"name": "x", "jwks": {"keys": [jwk]}})
    assert time.monotonic() < began + 1
    assert "private" in response.json["fields"]["jwks"][0]


def rsa_key(bits: int, e: int = 65537, last: int = 1) -> dict[str, str]:
    """A public key of numbers that nobody has looked for: what they are made of does not show."""
    numbers = {"n": (1 << bits - 1) + last, "e": e}
    written = {name: number.to_bytes(-(-number.bit_length() // 8)) for name, number in numbers.items()}
    return {"kty": "RSA"} | {name: urlsafe_b64encode(n).decode().rstrip("=") for name, n in written.items()}


@pytest.mark.parametrize(
    "jwk",
    [
        pytest.param(rsa_key(6145), id="long"),
        pytest.param(rsa_key(16_384), id="very long"),
        pytest.param(rsa_key(2048, e=2**32 + 1), id="large exponent"),
        pytest.param(rsa_key(2048, e=2**2000 + 1), id="very large exponent"),
        pytest.param(rsa_key(2048, last=0), id="even"),
    ],
)
def test_an_rsa_key_that_is_slow_or_cannot_verify_is_refused(operator: Operator, jwk: dict[str, str]) -> None:
    response = operator.call("POST", json={"name": "x", "jwks": {"keys": [jwk]}})
    assert response.status_code == 400
    assert "6144 bits" in response.json["fields"]["jwks"][0]


@pytest.mark.parametrize(
    "jwk",
    [rsa_key(6144), rsa_key(2048, e=3), rsa_key(2048, e=2**32 - 1)],
    ids=["6144 bits", "exponent 3", "32 bits of exponent"],
)
def test_the_longest_rsa_key_and_the_usual_exponents_are_taken(
    operator: Operator, jwk: dict[str, str]
) -> None:
    assert operator.create(jwks={"keys": [jwk]})


def test_the_longest_rsa_signature_is_read() -> None:
    head = urlsafe_b64encode(b'{"alg": "RS256"}').decode().rstrip("=")
    signature = urlsafe_b64encode(bytes(6144 // 8)).decode()
    # A longer one is refused for its length.
    with pytest.raises(BadSignatureError):
        jwt.decode(f"{head}.e30.{signature}", RSAKey.import_key(rsa_key(6144)), registry=ASSERTION_ALGORITHMS)


@pytest.mark.parametrize("jwks", [[], {}, {"keys": []}, {"keys": {}}, {"keys": [], "x": 1}, "x", 5])
def test_a_jwks_is_a_set_of_keys(operator: Operator, jwks: object) -> None:
    response = operator.call("POST", json={"name": "x", "jwks": jwks})
    assert (response.status_code, list(response.json["fields"])) == (400, ["jwks"])


def test_only_the_public_members_of_a_key_are_kept(operator: Operator, key: Key) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    jwk = {**key.as_dict(private=False), "note": deep}
    assert operator.create(jwks={"keys": [jwk]})


def test_private_key_jwt_needs_keys(operator: Operator) -> None:
    response = operator.call("POST", json={"name": "x", "token_endpoint_auth_method": "private_key_jwt"})
    assert (response.status_code, list(response.json["fields"])) == (400, ["jwks"])


def test_bad_assertions_are_throttled_and_good_ones_are_not(client: FlaskClient, sign: Sign) -> None:
    forged = [ask_signed(client, sign(signer=generate("ES256"))).status_code for _ in range(51)]
    assert forged == [401] * 50 + [429]
    assert ask_signed(client, sign()).status_code == 200
