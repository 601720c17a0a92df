"""The page at /docs: whole, and with nothing that has to come from elsewhere."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256

from flask.testing import FlaskClient

import openapi


def test_the_page_tells_of_every_operation(client: FlaskClient) -> None:
    page = client.get("/docs").text
    for path, method, operation in openapi.operations(client.get("/openapi.json").json):
        assert f'<article id="{operation["operationId"]}">' in page
        assert f'<b class="{method}">{method}</b> <a href="#{operation["operationId"]}">{path}</a>' in page


def test_every_link_within_the_page_leads_somewhere(client: FlaskClient) -> None:
    page = client.get("/docs").text
    names = re.findall(r'id="([^"]+)"', page)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(names)


def test_nothing_is_run_and_nothing_comes_from_elsewhere(client: FlaskClient) -> None:
    page = client.get("/docs").text
    assert not re.search(r"<script|<iframe|<object|<form|@import|url\(|\son\w+=|\ssrc=|\sstyle=", page)
    elsewhere = {link for link in re.findall(r'href="([^"#]+)', page) if link != "data:,"}
    assert elsewhere == {"http://localhost:8080/openapi.json"}


def test_its_policy_lets_in_its_own_style_alone(client: FlaskClient) -> None:
    response = client.get("/docs")
    found = re.search(r"<style>(.*?)</style>", response.text, re.DOTALL)
    assert found
    digest = b64encode(sha256(found[1].encode()).digest()).decode()
    assert response.headers["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )


def test_it_is_html_that_caches_may_keep(client: FlaskClient) -> None:
    response = client.get("/docs")
    assert response.mimetype == "text/html"
    assert response.headers["Cache-Control"] == "public, max-age=3600"
    again = client.get("/docs", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_a_body_is_shown_with_its_fields_and_limits(client: FlaskClient) -> None:
    page = client.get("/docs").text
    article = page[page.index('<article id="create_agent">') :]
    article = article[: article.index("</article>")]
    assert "array, at most 64" in article
    assert "integer or null, at least 1, at most 86400" in article
    assert "$ADMIN_TOKEN" in article
