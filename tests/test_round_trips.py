"""What goes in comes out: whatever is said of an agent, whatever page it is on, whatever finds it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.callers import Operator
from support.instances import close, copy_instance, settings_for

from app import create_app


def line(least: int, most: int, also: str = "") -> st.SearchStrategy[str]:
    """Unicode of any kind, without control characters but for those in `also`, not all spaces."""
    characters = st.characters(exclude_categories=("Cs", "Cc"), include_characters=also)
    return st.text(characters, min_size=least, max_size=most).filter(lambda text: not text.isspace())


words = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='"\\')
names = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='#"\\<>')
scopes = st.lists(st.text(words, min_size=1, max_size=128), unique=True, max_size=64)
audiences = st.lists(st.text(names, min_size=1, max_size=255), unique=True, max_size=16)
# An edge comes as often as all that lies between.
ttl = st.none() | st.sampled_from([1, 86_400]) | st.integers(1, 86_400)
rate_limit = st.none() | st.sampled_from([1, 1_000_000]) | st.integers(1, 1_000_000)
said_of_agents = st.fixed_dictionaries(
    {"name": line(1, 128) | st.just("\U0001f600" * 128)},
    optional={
        "description": st.none() | line(0, 1024, "\t\n\r"),
        "owner": st.none() | line(0, 256),
        "metadata": st.dictionaries(line(1, 64), line(0, 512, "\t\n\r"), max_size=32),
        "scopes": scopes,
        "audiences": audiences,
        "token_ttl": ttl,
        "rate_limit": rate_limit,
    },
)
UNSAID: dict[str, Any] = {
    "description": None,
    "owner": None,
    "metadata": {},
    "scopes": [],
    "audiences": [],
    "token_ttl": None,
    "rate_limit": None,
}


@pytest.fixture(scope="module")
def anybody(tmp_path_factory: pytest.TempPathFactory, first_start: Path) -> Iterator[Operator]:
    """The operator of an instance that all examples share."""
    folder = tmp_path_factory.mktemp("round-trips")
    copy_instance(first_start, folder)
    app = create_app(settings_for(folder), serving=True)
    yield Operator(app)
    close(app)


def said(agent: dict[str, Any]) -> dict[str, Any]:
    """What the operator said of the agent, as the API has it, the order of its metadata included."""
    told = {name: agent[name] for name in ("name", *UNSAID)}
    return {**told, "metadata": list(told["metadata"].items())}


def as_said(fields: dict[str, Any]) -> dict[str, Any]:
    return said({**UNSAID, **fields})


@given(at_first=said_of_agents, later=said_of_agents, method=st.sampled_from(["PATCH", "PUT"]))
def test_an_agent_shows_the_fields_it_was_given(
    anybody: Operator, at_first: dict[str, Any], later: dict[str, Any], method: str
) -> None:
    made = anybody.call("POST", json=at_first)
    assert made.status_code == 201, made.text
    path = f"/{made.json['agent']['id']}"
    assert said(made.json["agent"]) == as_said(at_first)
    assert anybody.call("GET", path).json["agent"] == made.json["agent"]
    changed = anybody.call(method, path, json=later)
    assert changed.status_code == 200, changed.text
    assert said(changed.json["agent"]) == as_said({**at_first, **later})
    assert anybody.call("GET", path).json["agent"] == changed.json["agent"]
    assert anybody.call("GET", "?limit=1").json["agents"] == [changed.json["agent"]]


def pages(anybody: Operator, **query: Any) -> Iterator[list[dict[str, Any]]]:
    """All pages of a list, by following `next`."""
    after: dict[str, str] = {}
    while True:
        response = anybody.call("GET", "?" + urlencode({**query, **after}))
        assert response.status_code == 200, response.text
        yield response.json["agents"]
        if response.json["next"] is None:
            return
        after = {"after": response.json["next"]}


def ids(page: list[dict[str, Any]]) -> list[str]:
    return [agent["id"] for agent in page]


@given(count=st.integers(0, 12), limit=st.integers(1, 13), gone=st.sets(st.integers(0, 11), max_size=4))
def test_pages_visit_each_agent_once_newest_first(
    anybody: Operator, count: int, limit: int, gone: set[int]
) -> None:
    owner = anybody.create()["agent"]["id"]
    made = [anybody.create(owner=owner)["agent"]["id"] for _ in range(count)]
    for index in gone & set(range(count)):
        anybody.call("DELETE", f"/{made[index]}")
    there = [made[index] for index in range(count - 1, -1, -1) if index not in gone]
    found = [ids(page) for page in pages(anybody, owner=owner, limit=limit)]
    assert list(chain.from_iterable(found)) == there
    assert all(len(page) == limit for page in found[:-1])
    assert len(found[-1]) <= limit


@given(count=st.integers(1, 8), limit=st.integers(1, 4), data=st.data())
def test_changes_between_pages_repeat_or_hide_no_other_agent(
    anybody: Operator, count: int, limit: int, data: st.DataObject
) -> None:
    owner = anybody.create()["agent"]["id"]
    staying = [anybody.create(owner=owner)["agent"]["id"] for _ in range(count)]
    seen: list[str] = []
    for page in pages(anybody, owner=owner, limit=limit):
        seen += ids(page)
        anybody.create(owner=owner)
        leaving = data.draw(st.none() | st.sampled_from(staying))
        if leaving:
            anybody.call("DELETE", f"/{leaving}")
            staying.remove(leaving)
        if not staying:
            break
    assert len(seen) == len(set(seen))
    assert set(staying) <= set(seen)


@given(agent=said_of_agents, data=st.data())
def test_an_agent_is_found_by_its_fields(
    anybody: Operator, agent: dict[str, Any], data: st.DataObject
) -> None:
    made = anybody.create(**{"scopes": [], **agent})["agent"]
    queries: list[dict[str, str]] = [{"q": made["client_id"][:9]}]
    for name in ("name", "owner", "description"):
        text = made[name]
        if text:
            start = data.draw(st.integers(0, len(text) - 1))
            queries.append({"q": text[start : start + data.draw(st.integers(1, 128))]})
    if made["owner"]:
        queries.append({"owner": made["owner"]})
    queries += [{"scope": scope} for scope in made["scopes"][:3]]
    for query in queries:
        value = next(iter(query.values()))
        # What a query may hold is one line.
        if not value.isspace() and not set(value) & set("\t\n\r"):
            assert made["id"] in ids(anybody.call("GET", "?" + urlencode(query)).json["agents"])


@given(held=st.lists(st.sampled_from(["a", "ab", "b", "a:b", "%", "_"]), unique=True), data=st.data())
def test_a_scope_finds_exactly_its_holders(anybody: Operator, held: list[str], data: st.DataObject) -> None:
    owner = anybody.create()["agent"]["id"]
    anybody.create(owner=owner, scopes=held)
    asked = data.draw(st.sampled_from(["a", "ab", "b", "a:b", "%", "_", "B", ":"]))
    found = anybody.call("GET", "?" + urlencode({"owner": owner, "scope": asked})).json["agents"]
    assert len(found) == (asked in held)


@given(text=line(1, 20), other=line(1, 20))
def test_a_text_not_in_its_name_does_not_find_an_agent(anybody: Operator, text: str, other: str) -> None:
    assume(text.casefold() not in other.casefold())
    made = anybody.create(name=other)["agent"]
    found = anybody.call("GET", "?" + urlencode({"q": text, "limit": 200})).json["agents"]
    assert made["id"] not in ids(found)
