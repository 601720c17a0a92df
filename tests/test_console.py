"""The page at /docs: Swagger UI from this server alone, on which requests can be tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from support import chromium
from support.servers import Server, running

CREATE = "#operations-agents-create_agent"

needs_chromium = pytest.mark.skipif(chromium.COMMAND is None, reason="Chromium is not installed here.")


def test_the_page_and_its_assets_are_cacheable(client: FlaskClient) -> None:
    page = client.get("/docs")
    assert page.mimetype == "text/html"
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 4
    for path in ["/docs", *(f"/{asset}" for asset in assets)]:
        response = client.get(path)
        assert (response.status_code, response.headers["Cache-Control"]) == (200, "public, max-age=3600")
        again = client.get(path, headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")


def test_no_other_file_is_served(client: FlaskClient) -> None:
    for name in ("index.html", "oauth2-redirect.html", "../docs_page.py", ""):
        assert client.get(f"/docs/{name}").json["error"] == "not_found"


def test_the_policy_lets_no_inline_script_run(client: FlaskClient) -> None:
    response = client.get("/docs")
    policy = dict(part.split(maxsplit=1) for part in response.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe-eval" not in str(policy)
    assert not re.search(r"<script>|\son\w+=|https?://", response.text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), WORKERS="1") as server:
        yield server


@pytest.fixture(params=[1280, 390])
def browser(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[chromium.Browser]:
    browser = chromium.Browser(tmp_path / "browser", width=request.param)
    yield browser
    browser.close()


@pytest.mark.long
@needs_chromium
def test_a_request_can_be_tried(server: Server, browser: chromium.Browser) -> None:
    browser.open(f"{server.url}/docs#/agents/create_agent")
    browser.until(f"!!document.querySelector('{CREATE} .try-out__btn')")
    browser.run(f"document.querySelector('{CREATE} .try-out__btn').click()")
    browser.until(f"!!document.querySelector('{CREATE} .execute')")
    browser.run(f"document.querySelector('{CREATE} .execute').click()")
    status = f"{CREATE} .live-responses-table tbody .response-col_status"
    assert browser.until(f"document.querySelector('{status}')?.innerText") == "201"
    # Nothing was refused by the policy, nothing asked of another host, and nothing is cut off at the side.
    assert browser.complaints() == []
    assert {url for url in browser.requested() if not url.startswith((server.url, "data:"))} == set()
    assert browser.run("document.documentElement.scrollWidth <= innerWidth && innerWidth") == browser.width
