"""Guessing costs the guesser, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import bcrypt
import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator, ask_token, bearer, forged
from support.clock import Clock
from werkzeug.test import TestResponse

import credentials
from credentials import new_client_id, new_client_secret
from models import FailedSignIns, db
from ops import cleanup

# Failures are forgotten with time: it stands still.
pytestmark = pytest.mark.usefixtures("time_machine")


def guess(
    client: FlaskClient, client_id: str, secret: str | None = None, address: str = "127.0.0.1"
) -> TestResponse:
    """A wrong, well-formed secret, unless another is given."""
    body = {
        "grant_type": "client_credentials",
        "client_id": client_id,
        "client_secret": secret or new_client_secret(4).text,
    }
    return client.post("/oauth/token", json=body, environ_overrides={"REMOTE_ADDR": address})


def guess_until_throttled(client: FlaskClient, client_id: str, **kwargs: Any) -> int:
    """How many guesses are answered as wrong."""
    for count in range(1000):
        status = guess(client, client_id, **kwargs).status_code
        if status != 401:
            assert status == 429
            return count
    raise AssertionError("never throttled")


def test_after_fifty_wrong_secrets_the_guesser_waits(client: FlaskClient, agent: dict[str, Any]) -> None:
    assert guess_until_throttled(client, agent["client_id"]) == 50
    refused = guess(client, agent["client_id"])
    assert refused.json["error"] == "too_many_requests"
    assert 1 <= int(refused.headers["Retry-After"]) <= 6


def test_an_unknown_client_is_throttled_like_a_known_one(client: FlaskClient, agent: dict[str, Any]) -> None:
    known, unknown = agent["client_id"], new_client_id()
    assert guess_until_throttled(client, known) == guess_until_throttled(client, unknown)
    one, other = guess(client, known), guess(client, unknown)
    assert one.data == other.data
    assert one.headers["Retry-After"] == other.headers["Retry-After"]


def test_a_malformed_secret_counts_too(client: FlaskClient, agent: dict[str, Any]) -> None:
    assert guess_until_throttled(client, agent["client_id"], secret="a guess") == 50


def test_the_agent_itself_gets_in_from_the_guessers_address(
    make_app: Callable[..., Flask], client: FlaskClient, agent: dict[str, Any]
) -> None:
    guess_until_throttled(client, agent["client_id"])
    # A worker that has never seen the secret has to hash it, and does.
    assert ask_token(make_app().test_client(), agent).status_code == 200


def test_a_guesser_who_knows_the_hint_waits_too(
    make_app: Callable[..., Flask],
    client: FlaskClient,
    agent: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = agent["client_secret"]
    # Not undo(): the fixture's clock would run again with it.
    with monkeypatch.context() as patch:
        patch.setattr(bcrypt, "checkpw", lambda *_: False)
        assert guess_until_throttled(client, agent["client_id"], secret=secret) == 50
    other = make_app().test_client()
    assert guess(other, agent["client_id"], secret=secret).status_code == 429
    assert guess(other, agent["client_id"], secret=secret, address="192.0.2.7").status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "2001:db8::{:x}"], ids=["one address", "an IPv6 network"])
def test_wrong_secrets_sent_at_once_are_all_counted(app: Flask, agent: dict[str, Any], address: str) -> None:
    def wrong(number: int) -> int:
        caller = {"secret": forged(agent["client_secret"]), "address": address.format(number)}
        return guess(app.test_client(), agent["client_id"], **caller).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(wrong, range(200)))
    assert (statuses.count(401), statuses.count(429)) == (50, 150)


def test_failures_counted_together_do_not_pass_for_a_clock_set_back(app: Flask) -> None:
    def fail(others: int) -> bool:
        """Fail a check that began before some others were counted, as in several processes."""
        with suppress(credentials.Throttled):
            credentials.throttle(lambda: others > 0 and fail(others - 1), "a secret", known=True)
        return False

    with app.test_request_context():
        for _ in range(20):
            fail(others=7)
        with pytest.raises(credentials.Throttled):
            credentials.throttle(lambda: True, "a secret", known=True)


def test_a_remembered_secret_is_never_throttled(client: FlaskClient, agent: dict[str, Any]) -> None:
    ask_token(client, agent)
    guess_until_throttled(client, agent["client_id"])
    assert ask_token(client, agent).status_code == 200


def test_other_addresses_are_not_throttled(client: FlaskClient, agent: dict[str, Any]) -> None:
    guess_until_throttled(client, agent["client_id"])
    assert guess(client, agent["client_id"], address="192.0.2.7").status_code == 401


def test_a_restart_forgets_no_failure(
    make_app: Callable[..., Flask], client: FlaskClient, agent: dict[str, Any]
) -> None:
    guess_until_throttled(client, agent["client_id"])
    assert guess(make_app().test_client(), agent["client_id"]).status_code == 429


def test_nothing_is_hashed_for_a_throttled_guesser(
    client: FlaskClient, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guess_until_throttled(client, agent["client_id"])
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: pytest.fail("a hash was spent"))
    assert guess(client, agent["client_id"]).status_code == 429


def test_a_failure_is_forgotten_after_six_seconds(
    client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    guess_until_throttled(client, agent["client_id"])
    wait = int(guess(client, agent["client_id"]).headers["Retry-After"])
    time_machine.advance(seconds=wait - 1)
    assert guess(client, agent["client_id"]).status_code == 429
    time_machine.advance(seconds=1)
    assert guess_until_throttled(client, agent["client_id"]) == 1
    time_machine.advance(hours=1)
    assert guess_until_throttled(client, agent["client_id"]) == 50


def test_a_clock_set_back_neither_frees_a_guesser_nor_locks_out_for_long(
    client: FlaskClient, agent: dict[str, Any], time_machine: Clock
) -> None:
    guess_until_throttled(client, agent["client_id"])
    time_machine.advance(days=-1)
    assert guess_until_throttled(client, agent["client_id"]) == 1
    assert int(guess(client, agent["client_id"]).headers["Retry-After"]) <= 7
    time_machine.advance(seconds=50 * 6)
    assert guess_until_throttled(client, agent["client_id"]) == 50


def test_guesses_at_many_clients_are_counted_together(client: FlaskClient) -> None:
    answers = [guess(client, new_client_id()).status_code for _ in range(201)]
    assert answers == [401] * 200 + [429]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "unix", False),
    ],
)
def test_an_ipv6_client_is_its_network(one: str, other: str, same: bool) -> None:
    assert (credentials._network(one) == credentials._network(other)) is same


def test_what_is_forgotten_is_swept(client: FlaskClient, app: Flask, time_machine: Clock) -> None:
    guess(client, new_client_id())
    with app.app_context():
        assert db.session.query(FailedSignIns).count() == 2
        time_machine.advance(minutes=5)
        cleanup.delete_batch()
        assert db.session.query(FailedSignIns).count() == 0


# The admin token


def manage(client: FlaskClient, token: str, address: str = "127.0.0.1") -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return client.get("/api/agents", headers=headers, environ_overrides={"REMOTE_ADDR": address}).status_code


def test_guesses_at_the_admin_token_are_throttled(client: FlaskClient) -> None:
    assert [manage(client, f"guess-{i}") for i in range(51)] == [401] * 50 + [429]
    right = OPERATOR["Authorization"].removeprefix("Bearer ")
    assert manage(client, right) == 429
    assert manage(client, right, "192.0.2.7") == 200
    introspected = client.post("/oauth/introspect", data={"token": "x"}, headers=OPERATOR)
    assert introspected.status_code == 429


def test_an_expired_access_token_is_no_guess_at_the_admin_token(
    client: FlaskClient, token: dict[str, Any], time_machine: Clock
) -> None:
    time_machine.advance(days=1)
    for _ in range(51):
        assert client.get("/api/agents", headers=bearer(token)).status_code == 401
    assert client.get("/api/agents", headers=OPERATOR).status_code == 200


def test_guesses_that_look_like_tokens_are_throttled_apart(client: FlaskClient) -> None:
    assert [manage(client, f"eyJ-guess-{i}") for i in range(51)] == [401] * 50 + [429]
    assert manage(client, OPERATOR["Authorization"].removeprefix("Bearer ")) == 200


def test_an_admin_token_that_looks_like_a_token_is_throttled(make_app: Callable[..., Flask]) -> None:
    client = make_app(ADMIN_TOKEN="eyJhbGciOiJSUzI1").test_client()
    assert [manage(client, f"eyJ-guess-{i}") for i in range(50)] == [401] * 50
    assert manage(client, "eyJhbGciOiJSUzI1") == 429


# rate_limit


def test_an_agent_gets_no_more_tokens_a_minute_than_its_limit(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(rate_limit=3)
    token = ask_token(client, agent).json
    time_machine.advance(seconds=20)
    assert client.post("/oauth/refresh", json={"refresh_token": token["refresh_token"]}).status_code == 200
    assert ask_token(client, agent).status_code == 200
    refused = ask_token(client, agent)
    assert (refused.status_code, refused.json["error"]) == (429, "too_many_requests")
    # The first token's second may have begun up to a second before the token.
    assert refused.headers["Retry-After"] == "41"
    time_machine.advance(seconds=40)
    assert ask_token(client, agent).status_code == 429
    time_machine.advance(seconds=1)
    assert [ask_token(client, agent).status_code for _ in range(2)] == [200, 429]
    time_machine.advance(seconds=20)
    assert [ask_token(client, agent).status_code for _ in range(3)] == [200, 200, 429]
    assert operator.get(agent)["token_count"] == 5


def test_no_sixty_seconds_have_more_tokens_than_the_limit(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(rate_limit=30)
    times: list[int] = []
    for second in range(180):
        times += [second for _ in range(3) if ask_token(client, agent).status_code == 200]
        time_machine.advance(seconds=1)
    assert len(times) >= 80
    assert max(sum(start <= moment <= start + 60 for moment in times) for start in range(180)) == 30


def test_a_refused_refresh_leaves_the_refresh_token_as_it_was(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(rate_limit=1)
    refresh = {"refresh_token": ask_token(client, agent).json["refresh_token"]}
    assert client.post("/oauth/refresh", json=refresh).status_code == 429
    time_machine.advance(seconds=61)
    assert client.post("/oauth/refresh", json=refresh).status_code == 200


def test_a_changed_rate_limit_counts_at_once(client: FlaskClient, operator: Operator) -> None:
    agent = operator.create(rate_limit=1)
    assert [ask_token(client, agent).status_code for _ in range(2)] == [200, 429]
    operator.patch(agent, rate_limit=2)
    assert [ask_token(client, agent).status_code for _ in range(2)] == [200, 429]
    operator.patch(agent, rate_limit=None)
    assert ask_token(client, agent).status_code == 200


def test_a_clock_set_back_does_not_stretch_the_minute(
    client: FlaskClient, operator: Operator, time_machine: Clock
) -> None:
    agent = operator.create(rate_limit=1)
    ask_token(client, agent)
    time_machine.advance(days=-1)
    assert ask_token(client, agent).status_code == 200
