"""What strangers, agents and receivers may do to others: floods, while work goes on."""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from ledger import OPERATOR, Caller, Change, Tally
from scenes import Scene, Stage

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `make soak`

from support.hostile import TEN, listening
from support.receiver import Receiver

MOST_LINES = 20  # that a flood may add to the log
CONNECTIONS = 16
SOON = 3  # seconds; 0.3 without the load of the scene

# A byte, half a head, a body that is cut, a chunk that is no chunk, and no HTTP at all.
BROKEN = (
    b"G",
    b"POST /oauth/token HTTP/1.1\r\nHost: x\r\nContent-Le",
    b"POST /oauth/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    b"Content-Length: 99\r\n\r\ngrant_type=client_cred",
    b"POST /oauth/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def log_flood(stage: Stage, times: int) -> Scene:
    """Thousands of broken requests: the log grows by a few lines, and everybody else is answered."""
    with stage.scene("broken requests", times, may_cut=0) as scene, stage.load(scene):
        before = len(stage.server.log.read_text().splitlines())
        for _ in range(times):
            with suppress(OSError), socket.create_connection(("127.0.0.1", stage.server.port), 5) as client:
                client.sendall(random.choice(BROKEN))
        time.sleep(1)
        added = len(stage.server.log.read_text().splitlines()) - before
        scene.tally.count(f"log lines: {added}")
        if added > MOST_LINES:
            scene.tally.violation(f"{added} lines in the log")
    return scene


def rotation_flood(stage: Stage, seconds: float) -> Scene:
    """One agent rotates its secret on many connections: it is soon refused, and others get tokens."""
    with stage.scene("rotations of one agent", 1) as scene:
        caller = Caller(stage.server, Tally())
        made = caller.call("POST", "/api/agents", json={"name": "flood"}, headers=OPERATOR)[1]
        credentials = {name: made[name] for name in ("client_id", "client_secret")}
        body = {"grant_type": "client_credentials", **credentials}
        token = caller.call("POST", "/oauth/token", json=body)[1]["access_token"]
        headers = {"Authorization": f"Bearer {token}"}

        def rotate() -> None:
            flooding.call("POST", "/api/agents/me/rotate", headers=headers)

        flooding = Caller(stage.server, Tally())
        with stage.load(scene), repeated(rotate, CONNECTIONS):
            time.sleep(seconds)
        rotated = flooding.tally.answers["200"]
        scene.tally.count(f"rotations: {rotated}")
        if rotated > 12 * (1 + seconds // 60):
            scene.tally.violation(f"{rotated} rotations in {seconds} seconds")
        scene.tally.violations += flooding.tally.violations
        if not Change(stage.ledger, Caller(stage.server, scene.tally)).create():
            scene.tally.violation("no agent could be created after the flood")
    return scene


def hostile_receivers(stage: Stage, seconds: float) -> Scene:
    """Ten receivers stall, drip, lie and reset; a healthy one is told at once all the same."""
    with stage.scene("hostile receivers", 10) as scene, ExitStack() as stack:
        caller = Caller(stage.server, scene.tally)

        def subscribe(url: str, event: str) -> str:
            body = {"name": "receiver", "url": url, "events": [event]}
            return str(caller.call("POST", "/api/webhooks", json=body, headers=OPERATOR)[1]["webhook"]["id"])

        hooks = [subscribe(stack.enter_context(listening(behave)), "agent.*") for behave in TEN]
        receiver = Receiver()
        stack.callback(receiver.shutdown)
        hooks.append(subscribe(receiver.url, "key.rotated"))
        slowest = 0.0
        with stage.load(scene):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                heard, started = len(receiver.taken), time.monotonic()
                caller.call("POST", "/api/keys/rotate", json={}, headers=OPERATOR)
                receiver.wait_for(partial(_has_more, receiver, heard))
                slowest = max(slowest, time.monotonic() - started)
                time.sleep(0.5)
        scene.tally.count(f"slowest delivery: {slowest:.2f} s")
        if slowest > SOON:
            scene.tally.violation(f"a healthy receiver waited {slowest:.1f} seconds")
        for hook in hooks:
            caller.call("DELETE", f"/api/webhooks/{hook}", headers=OPERATOR)
    return scene


def _has_more(receiver: Receiver, heard: int) -> bool:
    return len(receiver.taken) > heard


@contextmanager
def repeated(work: Callable[[], None], threads: int) -> Iterator[None]:
    """Do it over and over, in so many threads, while the block runs."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            work()

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in running:
            thread.join()
