"""Load on many connections, each as fast as responses come, by `wrk` or by a small client of our own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

WRK = shutil.which("wrk")
FORM = "application/x-www-form-urlencoded"


@dataclass
class Load:
    """A request to repeat.

    `bodies` take turns. `chain` holds refresh tokens: each is used once, and each answer gives the next.
    """

    path: str
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[str] = field(default_factory=list)
    chain: list[str] = field(default_factory=list)


@dataclass
class Result:
    """Requests a second, percentiles in milliseconds, and a count of each status (0: no response)."""

    rate: float
    p50: float
    p99: float
    statuses: dict[int, int]

    @property
    def errors(self) -> int:
        """Number of requests without a 2xx response."""
        return sum(count for status, count in self.statuses.items() if not 200 <= status < 300)


def run(url: str, load: Load, *, connections: int, seconds: float, own_client: bool = False) -> Result:
    """Send the load to `url` for that many seconds."""
    if WRK and not own_client:
        return _run_wrk(url, load, connections, seconds)
    return _run_own(url, load, connections, seconds)


_SCRIPT = """
wrk.method = %(method)s
%(headers)s
local bodies, chain, at = {%(bodies)s}, {%(chain)s}, 0
statuses = ""
local seen = {}
if #chain > 0 then
  request = function()
    return wrk.format(nil, nil, nil, "refresh_token=" .. (table.remove(chain) or "none"))
  end
elseif #bodies == 1 then
  wrk.body = bodies[1]
elseif #bodies > 1 then
  request = function() at = at %% #bodies + 1; return wrk.format(nil, nil, nil, bodies[at]) end
end
if %(watch)s then
  response = function(status, headers, body)
    seen[status] = (seen[status] or 0) + 1
    statuses = ""
    for code, count in pairs(seen) do statuses = statuses .. code .. ":" .. count .. "," end
    local token = string.match(body, '"refresh_token": ?"([^"]+)"')
    if token then table.insert(chain, token) end
  end
end
local worker
setup = function(thread) worker = thread end
done = function(summary, latency, requests)
  local lost = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("RESULT %%d %%d %%d %%d %%d %%d %%s\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), summary.errors.status, lost, worker:get("statuses")))
end
"""


def _run_wrk(url: str, load: Load, connections: int, seconds: float) -> Result:
    values = {
        "method": _lua(load.method),
        "headers": "\n".join(f"wrk.headers[{_lua(n)}] = {_lua(value)}" for n, value in load.headers.items()),
        "bodies": ",".join(map(_lua, load.bodies)),
        "chain": ",".join(map(_lua, load.chain)),
        # Reading responses costs the client time: only where it must.
        "watch": "true" if load.chain or len(load.bodies) > 1 else "false",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT % values)
        script.flush()
        options = [
            "-t1",
            "--timeout",
            "30s",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "-s",
            script.name,
        ]
        command = [str(WRK), *options, url + load.path]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ?(\S*)", out)
    if not found:
        raise SystemExit(f"Unexpected output of wrk: {out}")
    total, duration, p50, p99, refused, lost = map(int, found.groups()[:6])
    if found[7]:
        pairs = [pair.split(":") for pair in found[7].strip(",").split(",")]
        statuses = {int(status): int(count) for status, count in pairs}
    else:
        statuses = {200: total - refused, 500: refused}
    return Result(total / duration * 1e6, p50 / 1e3, p99 / 1e3, statuses | {0: lost})


def _lua(text: str) -> str:
    return json.dumps(text)


def _run_own(url: str, load: Load, connections: int, seconds: float) -> Result:
    spec = json.dumps({"url": url, "load": asdict(load), "connections": connections, "seconds": seconds})
    command = [sys.executable, __file__]
    out = subprocess.run(command, input=spec, capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    return Result(**{**found, "statuses": {int(s): count for s, count in found["statuses"].items()}})


async def _ask(
    url: str, load: Load, next_body: Any, until: float, times: list[float], seen: Counter[int]
) -> None:
    host = urlsplit(url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    head = f"{load.method} {load.path} HTTP/1.1\r\nHost: {host.netloc}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    token = load.chain.pop() if load.chain else None
    while (started := time.perf_counter()) < until:
        body = f"refresh_token={token}" if token else next(next_body)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        try:
            answered = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", answered)
            content = await reader.readexactly(int(length[1]) if length else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            seen[0] += 1
            return
        times.append(time.perf_counter() - started)
        seen[int(answered[9:12])] += 1
        token = json.loads(content).get("refresh_token") if token else None
    writer.close()


async def _ask_together(url: str, load: Load, connections: int, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    seen: Counter[int] = Counter()
    bodies = cycle(load.bodies or [""])
    started = time.perf_counter()
    until = started + seconds
    await asyncio.gather(*(_ask(url, load, bodies, until, times, seen) for _ in range(connections)))
    taken = time.perf_counter() - started
    times.sort()
    p50, p99 = (times[int(len(times) * share)] * 1e3 if times else 0.0 for share in (0.5, 0.99))
    return {"rate": len(times) / taken, "p50": p50, "p99": p99, "statuses": seen}


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps(asyncio.run(_ask_together(**{**wanted, "load": Load(**wanted["load"])}))))
