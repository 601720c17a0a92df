"""Whatever is sent to whatever address: an answer in the one shape, and a refusal changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st
from support import postgresql as on_postgresql
from support.anything import (
    AGENT,
    JSON_TYPES,
    OPEN_ROUTES,
    ROUTES,
    Shape,
    authorization,
    bodies,
    junk,
    latin,
    methods,
    oauth_pairs,
    odd_json,
    query,
    segment,
)
from support.callers import OPERATOR, Operator, ask_token
from support.instances import close, copy_instance, engine_of, settings_for
from werkzeug.datastructures import Headers
from werkzeug.test import TestResponse

import events
import models
from app import create_app
from ops import cleanup


class Instance(NamedTuple):
    """An app that is fuzzed, and an eye on its database that sees every commit."""

    app: Flask
    eye: sa.Connection

    def version(self) -> object:
        """Something that changes when anybody commits a change."""
        if not on_postgresql.is_used():
            return self.eye.exec_driver_sql("PRAGMA data_version").scalar()
        # A sum over every row of every table.
        rows = "SELECT sum(hashtext(t::text)::numeric * 31 + 1) FROM {} t"
        tables = [f'"{table.name}"' for table in models.Base.metadata.sorted_tables]
        return [self.eye.exec_driver_sql(rows.format(table)).scalar() for table in tables]

    def places(self) -> dict[str, str]:
        """New things to name in a path, and what proves them."""
        operator, client = Operator(self.app), self.app.test_client()
        agent = operator.create(audiences=["a"], scopes=["read", "admin"])
        token = ask_token(client, agent).json
        hook = {"name": "a hook", "url": "http://localhost:1/", "events": ["agent.deleted"]}
        webhook = client.post("/api/webhooks", json=hook, headers=OPERATOR).json["webhook"]["id"]
        test = client.post(f"/api/webhooks/{webhook}/test", json={}, headers=OPERATOR).json
        secrets = operator.call("GET", f"/{agent['agent']['id']}/secrets").json["secrets"]
        return {
            "agent": agent["agent"]["id"],
            "secret": secrets[0]["id"],
            "webhook": webhook,
            "delivery": test["delivery"]["id"],
            "client_id": agent["client_id"],
            "client_secret": agent["client_secret"],
            "access_token": token["access_token"],
            "refresh_token": token["refresh_token"],
        }


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory, first_start: Path) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("fuzzed")
    copy_instance(first_start, folder)
    with pytest.MonkeyPatch.context() as patch:
        # What comes and goes beside the requests would look like a change they made.
        patch.setattr(cleanup, "INTERVAL", 10**9)
        patch.setattr(events, "record_failure", lambda *args: None)
        app = create_app(settings_for(folder, WEBHOOK_ALLOW_PRIVATE="1"), serving=True)
        with engine_of(folder).connect().execution_options(isolation_level="AUTOCOMMIT") as eye:
            yield Instance(app, eye)
        close(app)


def check(response: TestResponse, method: str, shape: Shape = (set(), set())) -> None:
    """The one shape of answers."""
    assert response.status_code < 500, response.text
    assert response.headers["X-Request-Id"]
    if response.status_code == 204:
        assert response.data == b""
        return
    assert response.mimetype == "application/json"
    if method == "HEAD":
        return
    body = response.json
    assert isinstance(body, dict)
    if response.status_code >= 400:
        check_error(body)
        return
    needed, allowed = shape
    assert needed <= set(body) <= needed | allowed
    if "agent" in body:
        assert set(body["agent"]) == AGENT


def check_error(body: dict[str, Any]) -> None:
    assert {"error", "error_description"} <= set(body) <= {"error", "error_description", "fields"}
    assert isinstance(body["error"], str) and body["error"].replace("_", "").isalpha()
    assert isinstance(body["error_description"], str) and len(body["error_description"]) > 10
    for name, messages in body.get("fields", {}).items():
        assert isinstance(name, str) and messages
        assert all(isinstance(message, str) for message in messages)


def check_unchanged_if_refused(response: TestResponse, method: str, *, changed: bool) -> None:
    if response.status_code >= 400 or method in ("GET", "HEAD", "OPTIONS"):
        assert not changed, f"{response.status_code}, and yet something changed"


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=settings.default.max_examples // 3)  # for each of the many
@given(data=st.data())
def test_any_body_to_a_management_route(instance: Instance, route: str, data: st.DataObject) -> None:
    method, path = route.split()
    places = instance.places()
    body = data.draw(bodies(route))
    before = instance.version()
    response = instance.app.test_client().open(
        path.format(**places),
        method=method,
        data=body if method not in ("GET", "DELETE") else None,
        content_type=data.draw(JSON_TYPES),
        headers=OPERATOR,
    )
    check(response, method, ROUTES[route])
    check_unchanged_if_refused(response, method, changed=instance.version() != before)


@given(route=st.sampled_from([*ROUTES, *OPEN_ROUTES]), method=methods, asked=query, data=st.data())
def test_any_query_and_any_name_in_a_path(
    instance: Instance, route: str, method: str, asked: list[tuple[str, str]], data: st.DataObject
) -> None:
    own, path = route.split()
    method = data.draw(st.just(own) | st.just(method))
    places = instance.places() | data.draw(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("agent", "secret", "webhook", "delivery"), segment))
    )
    before = instance.version()
    response = instance.app.test_client().open(
        path.format(**places),
        method=method,
        query_string=urlencode(asked, errors="replace"),
        headers=OPERATOR,
    )
    shape = ROUTES.get(f"{method} {path}", (set(), set(response.json or {}) if response.data else set()))
    check(response, method, shape)
    if not path.startswith("/oauth"):
        check_unchanged_if_refused(response, method, changed=instance.version() != before)


@given(
    path=st.lists(segment, max_size=4).map(lambda parts: "".join("/" + part for part in parts)),
    method=methods,
)
def test_any_path(instance: Instance, path: str, method: str) -> None:
    # The whole address: the client would take what follows two slashes for a host.
    address = f"http://localhost{path}"
    response = instance.app.test_client().open(address, method=method, headers=OPERATOR)
    check(response, method, (set(), set(response.json or {}) if response.data else set()))


@given(
    route=st.sampled_from([*ROUTES, *OPEN_ROUTES]),
    sent=st.lists(authorization, max_size=2),
    request_id=latin,
    address=st.integers(0, 2**32 - 1),
)
def test_any_authorization_header(
    instance: Instance, route: str, sent: list[str], request_id: str, address: int
) -> None:
    method, path = route.split()
    places = instance.places()
    headers = Headers([("Authorization", value.format(**places)) for value in sent])
    headers.add("X-Request-Id", request_id)
    response = instance.app.test_client().open(
        path.format(**places),
        method=method,
        headers=headers,
        # Elsewhere it is tested that an address that guesses too often must wait.
        environ_overrides={"REMOTE_ADDR": ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))},
    )
    check(response, method, (ROUTES | OPEN_ROUTES)[route])


def filled(value: Any, places: dict[str, str]) -> Any:
    return value.format(**places) if isinstance(value, str) else value


@given(
    route=st.sampled_from(list(OPEN_ROUTES)[:4]),
    pairs=oauth_pairs,
    as_json=st.booleans(),
    junk_value=st.none() | junk.filter(lambda value: not isinstance(value, str)),
    raw=st.none()
    | st.none()
    | st.none()
    | odd_json
    | st.binary(max_size=30).map(lambda value: b"token=" + value),
    kind=st.none() | st.none() | JSON_TYPES,
)
def test_any_parameters_to_an_oauth_endpoint(
    instance: Instance,
    route: str,
    pairs: Any,
    as_json: bool,
    junk_value: Any,
    raw: bytes | None,
    kind: str | None,
) -> None:
    method, path = route.split()
    places = instance.places()
    told = [(name, filled(value, places)) for name, value in pairs]
    if as_json:
        named = dict(told) if junk_value is None or not told else {**dict(told), told[-1][0]: junk_value}
        body = json.dumps(named).encode()
    else:
        body = urlencode(told, errors="replace").encode()
    usual = "application/json" if as_json else "application/x-www-form-urlencoded"
    response = instance.app.test_client().open(
        path, method=method, data=body if raw is None else raw, content_type=kind or usual
    )
    check(response, method, OPEN_ROUTES[route])
