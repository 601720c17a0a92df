"""Where Lanyard runs: on a server without its configuration, and mounted in another app."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from support.hostile import drip, listening, say_nothing
from support.receiver import Receiver
from support.servers import Server, register

from config import HERE

Serve = Callable[..., Server]

# Without gunicorn.conf.py, and so without gevent.
PLAIN = """
import os
bind = f"127.0.0.1:{os.environ['LANYARD_PORT']}"
workers = int(os.environ["LANYARD_WORKERS"])
control_socket_disable = True
"""
HOST = """
from flask import Flask

app = Flask(__name__)
"""


def plain(folder: Path, app: str, *options: str) -> tuple[str, ...]:
    """A gunicorn that is started in another folder, with a configuration of its own."""
    (folder / "plain.py").write_text(PLAIN)
    return (
        "-P",
        "-m",
        "gunicorn",
        "--chdir",
        str(folder),
        "--config",
        str(folder / "plain.py"),
        *options,
        app,
    )


def subscribe(base: str, url: str) -> dict[str, str]:
    body = {"name": "hook", "url": url, "events": ["agent.created"]}
    response = requests.post(f"{base}/api/webhooks", json=body)
    assert response.status_code == 201, response.text
    return dict(response.json()["webhook"])


@pytest.mark.parametrize(
    "options", [(), ("--threads", "4"), ("--preload",)], ids=["sync", "gthread", "preload"]
)
def test_plain_gunicorn_delivers_webhooks(
    serve: Serve, receive: Callable[..., Receiver], tmp_path: Path, options: tuple[str, ...]
) -> None:
    program = plain(tmp_path, "wsgi:app", "--pythonpath", str(HERE), *options)
    server, receiver = serve(LOCAL="1", program=program).wait(), receive()
    subscribe(server.url, receiver.url)
    register(server)
    receiver.wait_for(lambda: len(receiver.taken) == 1)
    log = server.stop()
    assert "Traceback" not in log
    assert "Error" not in log


def test_a_mounted_app_delivers_webhooks(
    serve: Serve, receive: Callable[..., Receiver], tmp_path: Path
) -> None:
    (mount,) = re.findall(r"^```python\n(.*?)^```$", (HERE / "docs/deploy.md").read_text(), re.M | re.S)
    (tmp_path / "host.py").write_text(HOST)
    (tmp_path / "mount.py").write_text(mount.replace("/opt/lanyard", str(HERE)))
    program = plain(tmp_path, "mount:application", "--threads", "4")
    server, receiver = serve(LOCAL="1", program=program).wait(), receive()
    base = f"{server.url}/lanyard"
    subscribe(base, receiver.url)
    assert requests.post(f"{base}/api/agents", json={"name": "x"}).status_code == 201
    receiver.wait_for(lambda: len(receiver.taken) == 1)


def test_plain_gunicorn_stops_quietly_while_it_delivers(
    serve: Serve, receive: Callable[..., Receiver], tmp_path: Path
) -> None:
    chance = random.Random(7)

    def slowly(event_id: str) -> int:
        time.sleep(0.5 + chance.random())  # so that not all end at once
        return 204

    receiver = receive(slowly)
    program = plain(tmp_path, "wsgi:app", "--pythonpath", str(HERE), "--threads", "4")
    server = serve(LOCAL="1", program=program).wait()
    subscribe(server.url, receiver.url)
    for _ in range(20):
        register(server)
    receiver.wait_for(lambda: len(receiver.taken) > 0)
    log = server.stop()
    assert "Traceback" not in log, log
    again = serve(LOCAL="1").wait()
    receiver.wait_for(lambda: len(receiver.ids()) == 20)
    again.stop()
    assert len(receiver.taken) == 20, "what was in flight at the stop was sent again"


def test_slow_receivers_are_cut_off_without_gevent(
    serve: Serve, receive: Callable[..., Receiver], tmp_path: Path
) -> None:
    program = plain(tmp_path, "wsgi:app", "--pythonpath", str(HERE), "--threads", "4")
    server, receiver = serve(LOCAL="1", program=program).wait(), receive()
    with listening(drip) as dripping, listening(say_nothing) as silent:
        slow = [subscribe(server.url, url)["id"] for url in (dripping, silent)]
        subscribe(server.url, receiver.url)
        started = time.monotonic()
        register(server)
        receiver.wait_for(lambda: len(receiver.taken) == 1)
        for webhook in slow:
            while (found := attempts(server, webhook))[0]["attempts"] == 0:
                assert time.monotonic() < started + 25
                time.sleep(0.1)
            assert "no response within 10 seconds" in found[0]["error"] or "timed out" in found[0]["error"]


def attempts(server: Server, webhook: str) -> list[dict[str, object]]:
    return list(requests.get(f"{server.url}/api/webhooks/{webhook}/deliveries").json()["deliveries"])


def test_the_page_names_every_module_that_a_host_must_not_have() -> None:
    text = (HERE / "docs/deploy.md").read_text().partition("## In another app")[2].partition("\n## ")[0]
    modules = {path.stem for path in HERE.glob("*.py")} - {"gunicorn.conf"}
    modules |= {path.parent.name for path in HERE.glob("*/*.py")} - {"tests", "bench", "examples"}
    assert {name for name in modules if f"`{name}`" not in text} == set()
