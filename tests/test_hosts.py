"""Where Lanyard runs: other servers, other apps, read-only file systems, any user."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from support.hostile import drip, listening, say_nothing
from support.receiver import Receiver
from support.servers import Server, as_user, instead, register, token_body

from config import HERE

pytestmark = pytest.mark.long

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


def can_mount() -> bool:
    """Whether this process may make file systems read-only for its children."""
    command = ["unshare", "--mount", "mount", "--options", "remount,bind,ro", "/"]
    may = os.geteuid() == 0 and shutil.which("unshare") is not None
    return may and subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs root and its own mounts")
needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"),
    reason="needs root and setpriv",
)

READ_ONLY = f"""
mount --bind "$LANYARD_INSTANCE" "$LANYARD_INSTANCE"
for mounted in $(cut -d ' ' -f 2 /proc/mounts); do
    case $mounted in
        "$LANYARD_INSTANCE" | /proc*) ;;
        *) mount -o remount,bind,ro "$mounted" 2> /dev/null ;;
    esac
done
for folder in /tmp /var/tmp /dev/shm {HERE}; do
    test -w "$folder" && echo "$folder can be written"
done
HOME=/nowhere exec {sys.executable} -m gunicorn wsgi:app
"""


def run_as(uid: int) -> tuple[str, ...]:
    """The server as this user of group 0."""
    return instead(*as_user(uid), sys.executable, "-m", "gunicorn", "wsgi:app")


@needs_mounts
def test_only_the_instance_needs_to_be_writable(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "instance").mkdir()
    server = serve(LOCAL="1", program=instead("unshare", "-m", "sh", "-c", READ_ONLY)).wait()
    agent = register(server)
    assert requests.post(f"{server.url}/oauth/token", json=token_body(agent)).status_code == 200
    assert "lanyard_tokens_issued_total 1.0" in requests.get(f"{server.url}/metrics").text
    log = server.stop()
    assert log.startswith("Lanyard listens on "), log
    assert len(log.splitlines()) == 5
    left = {path.name for path in server.instance.iterdir() if not path.name.startswith("lanyard.db")}
    assert left == {"admin_token", "serving.json"}


@needs_users
@pytest.mark.sqlite
def test_any_user_whom_the_folders_group_lets_write_runs_it(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "instance"
    folder.mkdir()
    folder.chmod(0o770)
    first = serve(LOCAL="1", program=run_as(1_000_740_000)).wait()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    agent = register(first)
    first.stop()
    for file in folder.iterdir():
        file.chmod(0o660)
    database = folder / "lanyard.db"
    second = serve(LOCAL="1", program=run_as(1_000_750_000)).wait()
    assert requests.post(f"{second.url}/oauth/token", json=token_body(agent)).status_code == 200
    assert (database.stat().st_uid, database.stat().st_mode & 0o777) == (1_000_740_000, 0o660)


@needs_users
@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("name", "mode"),
    [(".", 0o750), ("lanyard.db", 0o600), ("lanyard.db.lock", 0o600)],
)
def test_what_another_user_owns_is_named_with_both_users(
    serve: Serve, tmp_path: Path, name: str, mode: int
) -> None:
    folder = tmp_path / "instance"
    folder.mkdir()
    folder.chmod(0o770)
    if name != ".":
        (folder / name).touch()
    (folder / name).chmod(mode)
    server = serve(program=run_as(1_000_740_000))
    assert server.process.wait(20) != 0
    log = server.log.read_text()
    assert log.startswith("Lanyard will not start: LANYARD_INSTANCE must be a folder that can be written: ")
    assert f"; {folder / name} is of uid 0 and gid 0, mode {mode:o}, and" in log
    assert log.endswith("this process has uid 1000740000 and gid 0.\n")
    assert log.count("\n") == 1
