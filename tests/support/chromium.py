"""Headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol): no driver to install."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

COMMAND = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 20  # seconds
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


class Browser:
    """One tab.

    :param width: of the window, in CSS pixels.
    """

    def __init__(self, folder: Path, width: int = 1280) -> None:
        assert COMMAND
        self.width = width
        reads, self._to, self._from, writes = (_moved(end) for end in (*os.pipe(), *os.pipe()))
        options = (*_OPTIONS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank")
        # The browser reads from descriptor 3 and writes to 4.
        move = (
            f"import os, sys; os.dup2({reads}, 3); os.dup2({writes}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", move, COMMAND, *options]
        self._process = subprocess.Popen(command, pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command of the protocol; returns its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], PATIENCE)[0], "the browser does not answer"
            received = os.read(self._from, 1 << 16)
            assert received, "the browser has ended"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page; returns its value."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = PATIENCE) -> Any:
        """Evaluate JavaScript until its value is true; returns the value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def complaints(self) -> list[str]:
        """Errors on the console: of scripts, of the network, of the content security policy."""
        self.run("0")
        logged = [event["params"] for event in self.events if event["method"] == "Log.entryAdded"]
        thrown = [event for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        errors = [entry["entry"] for entry in logged if entry["entry"]["level"] == "error"]
        return [str(found) for found in (*errors, *thrown)]

    def requested(self) -> set[str]:
        """The URLs of all requests so far."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return {parameters["request"]["url"] for parameters in sent}

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the window."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


def _moved(end: int) -> int:
    """Move a descriptor to a number above 4, so that giving 3 and 4 to the browser does not close it."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
