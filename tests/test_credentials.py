"""Secrets: their form, their hashes, and the memory of verified ones."""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bcrypt
import pytest
from flask import Flask

import credentials
from credentials import NewSecret

CLIENT_ID = credentials.new_client_id()


def make() -> NewSecret:
    return credentials.new_client_secret(4)


@pytest.fixture
def verify(app: Flask) -> Callable[[str, bytes | None], bool]:
    """`credentials.verify` in a request of its own."""

    def verify(secret: str, stored: bytes | None) -> bool:
        with app.test_request_context():
            return credentials.verify(secret, stored, CLIENT_ID)

    return verify


def test_a_client_secret_has_a_hint_and_fits_into_bcrypt() -> None:
    secret = make()
    assert re.fullmatch(r"cs_[A-Za-z0-9_-]{57}", secret.text)
    assert secret.text[3:11] == secret.hint == credentials.client_secret_hint(secret.text)
    assert len(secret.text) <= 72


def test_client_ids_and_refresh_tokens_carry_their_prefix() -> None:
    assert re.fullmatch(r"cid_[A-Za-z0-9_-]{22}", credentials.new_client_id())
    assert re.fullmatch(r"rt_[A-Za-z0-9_-]{65}", credentials.new_refresh_token(credentials.new_family_id()))


def test_the_next_refresh_token_names_the_same_family() -> None:
    family = credentials.new_family_id()
    first = credentials.new_refresh_token(family)
    following = credentials.new_refresh_token(family)
    assert credentials.refresh_token_family(first) == family
    assert credentials.refresh_token_family(following) == family
    assert following != first


def test_a_jti_shows_its_grant_but_not_its_family() -> None:
    family = credentials.new_family_id()
    jtis = [credentials.new_jti(family) for _ in range(2)]
    assert [jti.split(".")[0] for jti in jtis] == [credentials.grant_id(family)] * 2
    assert jtis[0] != jtis[1]
    assert family not in jtis[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text[:20] + ("A" if text[20] != "A" else "B") + text[21:],
        lambda text: "xx_" + text[3:],
        lambda text: text[:-1] + "é",
        lambda text: text + "\n",
    ],
    ids=["empty", "short", "long", "one letter wrong", "wrong prefix", "not ASCII", "newline"],
)
def test_a_malformed_client_secret_has_no_hint(spoil: object) -> None:
    assert callable(spoil)
    assert credentials.client_secret_hint(spoil(make().text)) is None


def test_a_secret_matches_its_own_hash_only(verify: Callable[..., bool]) -> None:
    one, other = make(), make()
    assert verify(one.text, one.hash)
    assert not verify(other.text, one.hash)
    assert not verify(one.text, None)


@pytest.fixture
def bcrypt_checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every hash that bcrypt is really asked about."""
    asked: list[bytes] = []
    real = bcrypt.checkpw

    def checkpw(password: bytes, hashed: bytes) -> bool:
        asked.append(hashed)
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    return asked


def test_a_secret_is_remembered_once_it_was_right(
    verify: Callable[..., bool], bcrypt_checks: list[bytes]
) -> None:
    secret, wrong = make(), make()
    assert not verify(wrong.text, secret.hash)
    assert not verify(secret.text, None)
    assert verify(secret.text, secret.hash)
    assert len(bcrypt_checks) == 3
    assert verify(secret.text, secret.hash)
    assert len(bcrypt_checks) == 3
    assert not verify(secret.text, wrong.hash)
    assert not verify(secret.text, None)
    assert not verify(wrong.text, secret.hash)
    assert len(bcrypt_checks) == 6


def test_a_wrong_secret_costs_bcrypt_every_time(
    verify: Callable[..., bool], bcrypt_checks: list[bytes]
) -> None:
    secret, wrong = make(), make()
    verify(secret.text, secret.hash)
    assert not verify(wrong.text, secret.hash)
    assert not verify(wrong.text, secret.hash)
    assert len(bcrypt_checks) == 3


def test_an_unknown_client_costs_the_same_bcrypt(
    verify: Callable[..., bool], bcrypt_checks: list[bytes]
) -> None:
    secret = make()
    verify(secret.text, None)
    assert [hashed[:7] for hashed in bcrypt_checks] == [secret.hash[:7]]


def test_the_memory_is_bounded(
    verify: Callable[..., bool], bcrypt_checks: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "VERIFIED_CACHE_SIZE", 2)
    made = [make() for _ in range(3)]
    for secret in [*made, *made[1:], made[0]]:
        assert verify(secret.text, secret.hash)
    assert bcrypt_checks == [secret.hash for secret in [*made, made[0]]]


def test_a_secret_that_cannot_be_right_does_not_wait_for_others(
    verify: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = make()
    begun, go_on = threading.Event(), threading.Event()

    def checkpw(password: bytes, hashed: bytes) -> bool:
        begun.set()
        return go_on.wait(10)

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(verify, secret.text, secret.hash)
        begun.wait(10)
        second = pool.submit(verify, secret.text, secret.hash)
        with pytest.raises(credentials.Throttled):
            verify(secret.text, None)
        go_on.set()
        assert first.result(10)
        assert second.result(10)


def test_hashing_yields_to_everything_else(
    verify: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpw(password: bytes, hashed: bytes) -> bool:
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine + 10
        return True

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    secret = make()
    assert verify(secret.text, secret.hash)


def test_comparison_takes_strings_of_any_length() -> None:
    assert credentials.same("token", "token")
    assert not credentials.same("token", "token longer")
