"""Measure Lanyard beside an empty Flask route: `make bench`, or `python bench/bench.py speed --seconds 1`."""

from __future__ import annotations

import argparse
import base64
import os
import platform
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import FORM, WRK, Load, Result, run
from servers import HERE, OPERATOR, Server

sys.path.insert(0, str(HERE.parent))

from credentials import new_client_id, new_client_secret

POST_FORM: dict[str, Any] = {"method": "POST", "headers": {"Content-Type": FORM}}
EMPTY = Load("/")
SIZES = ((10, 0), (10_000, 100_000), (100_000, 1_000_000))


@dataclass
class Target:
    """A server with agents that share one secret, and an access token."""

    server: Server
    client_ids: list[str]
    secret: str
    access_token: str

    def loads(self, connections: int) -> dict[str, Load]:
        """Return the load of each operation."""
        basic = base64.b64encode(f"{self.client_ids[0]}:{self.secret}".encode()).decode()
        bearer = {"Authorization": f"Bearer {self.access_token}"}
        body = {"method": "POST", "bodies": ['{"name": "one more", "scopes": ["read"]}']}
        return {
            "token": self.token_load(),
            "refresh": Load("/oauth/refresh", **POST_FORM, chain=self.refresh_tokens(connections + 8)),
            "me": Load("/api/agents/me", headers=bearer),
            "introspect": Load(
                "/oauth/introspect",
                "POST",
                {"Content-Type": FORM, "Authorization": f"Basic {basic}"},
                [f"token={self.access_token}"],
            ),
            "jwks": Load("/.well-known/jwks.json"),
            "create": Load("/api/agents", headers={**OPERATOR, "Content-Type": "application/json"}, **body),
        }

    def token_load(self) -> Load:
        """Return the load of token requests, by all agents in turn."""
        return Load("/oauth/token", **POST_FORM, bodies=[self.body(c) for c in self.client_ids])

    def body(self, client_id: str) -> str:
        """Return the body of a token request."""
        return f"grant_type=client_credentials&client_id={client_id}&client_secret={self.secret}"

    def token(self) -> dict[str, Any]:
        """Request a token, and return the response."""
        body = self.body(random.choice(self.client_ids))
        found: dict[str, Any] = self.server.post("/oauth/token", data=body, headers={"Content-Type": FORM})
        return found

    def refresh_tokens(self, count: int) -> list[str]:
        """Return refresh tokens, each of its own family."""
        return [self.token()["refresh_token"] for _ in range(count)]


def new_target(server: Server) -> Target:
    """Return a target with one new agent, whose secret every worker has verified."""
    made = server.post("/api/agents", json={"name": "bench", "scopes": ["read", "write"]}, headers=OPERATOR)
    return warm(server, [made["client_id"]], made["client_secret"])


def warm(server: Server, client_ids: list[str], secret: str) -> Target:
    """Return a target whose workers have all verified the secret, so that none is measured hashing it."""
    target = Target(server, client_ids, secret, "")
    target.access_token = [target.token()["access_token"] for _ in range(20)][-1]
    return target


def speed(options: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Measure each operation and the empty route in turn."""
    empty = start(started, folder / "empty", "empty:app", "/")
    target = new_target(start(started, folder / "lanyard"))
    rows: dict[tuple[str, int], list[tuple[Result, float]]] = {}
    for count, connections in rounds(options):
        floor = ask(options, empty.url, EMPTY, connections)
        found = {"empty route": floor}
        for name, load in target.loads(connections).items():
            if name in options.only:
                found[name] = ask(options, target.server.url, load, connections)
        for name, result in found.items():
            rows.setdefault((name, connections), []).append((result, result.rate / floor.rate))
        progress(f"round {count}, {connections} connections")
    print("\n| operation | connections | requests/s | p50 ms | p99 ms | errors | of empty |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for (name, connections), several in rows.items():
        share = statistics.median(one[1] for one in several)
        print(f"| {name} | {connections} | {cells([one[0] for one in several])} | {share:.2f} |")


def stored(options: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Measure the operations with more and more rows stored."""
    from fill import fill

    targets = {}
    for agents, refresh_tokens in SIZES[: options.sizes]:
        instance = folder / f"stored-{agents}"
        client_ids, secret = fill(instance, agents, refresh_tokens)
        size = (instance / "lanyard.db").stat().st_size / 1e6
        name = f"{agents:,} agents, {refresh_tokens:,} refresh tokens, {size:,.0f} MB"
        targets[name] = warm(start(started, instance), client_ids, secret)
        progress(f"filled: {name}")
    rows: dict[tuple[str, str], list[Result]] = {}
    for _ in range(options.rounds):
        for operation in [name for name in ("token", "refresh", "me", "introspect") if name in options.only]:
            for name, target in targets.items():
                load = target.loads(16)[operation]
                rows.setdefault((operation, name), []).append(ask(options, target.server.url, load, 16))
    print("\n| 16 connections | stored | requests/s | p50 ms | p99 ms | errors | of the smallest |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    for (operation, name), found in rows.items():
        floor = rows[operation, next(iter(targets))]
        share = statistics.median(one.rate / other.rate for one, other in zip(found, floor, strict=True))
        print(f"| {operation} | {name} | {cells(found)} | {share:.2f} |")


def attack(options: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Measure token requests alone, and beside clients that guess secrets at full speed."""
    target = new_target(start(started, folder / "attack"))
    wrong = [new_client_secret(4).text for _ in range(2000)]
    good = target.token_load()
    one = [f"grant_type=client_credentials&client_id={target.client_ids[0]}&client_secret={s}" for s in wrong]
    any_ = [f"grant_type=client_credentials&client_id={new_client_id()}&client_secret={s}" for s in wrong]
    attacks = {"nobody": None, "guesses at this agent": one, "guesses at unknown clients": any_}
    rows: dict[str, list[Result]] = {}
    guesses: dict[str, list[Result]] = {}
    for _ in range(options.rounds):
        for name, bodies in attacks.items():
            with ExitStack() as beside:
                if bodies:
                    load = Load("/oauth/token", **POST_FORM, bodies=bodies)
                    guesses.setdefault(name, []).append(beside.enter_context(guessing(options, target, load)))
                rows.setdefault(name, []).append(ask(options, target.server.url, good, 16))
    print("\n| token requests beside | requests/s | p50 ms | p99 ms | errors | responses to the guesses |")
    print("| --- | --: | --: | --: | --: | --- |")
    for name, found in rows.items():
        responses: Counter[int] = Counter()
        for result in guesses.get(name, []):
            responses.update(result.statuses)
        counts = ", ".join(f"{status}: {number:,}" for status, number in sorted(responses.items()) if number)
        print(f"| {name} | {cells(found)} | {counts} |")


def memory(options: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Measure the time from the start to the first response, and the memory in use."""
    fresh, again = [], []
    for number in range(options.rounds):
        for times in (fresh, again):
            server = Server(folder / f"start-{number}")
            times.append(server.first_answer)
            server.stop()
    print("\n| start to first response, seconds | median | longest |\n| --- | --: | --: |")
    for name, times in (("a new instance", fresh), ("an existing instance", again)):
        print(f"| {name} | {statistics.median(times):.2f} | {max(times):.2f} |")
    target = new_target(start(started, folder / "memory"))
    print("\n| MB in memory, all processes | shared pages counted once | resident, summed up |")
    print("| --- | --: | --: |")
    print(f"| at rest | {memory_cells(target.server)} |", flush=True)
    asked = 0
    for wanted in (1000, options.requests // 2, options.requests):
        while asked < wanted:
            for operation in ("token", "me"):
                result = ask(options, target.server.url, target.loads(16)[operation], 16)
                asked += sum(result.statuses.values())
        print(f"| after {asked:,} requests | {memory_cells(target.server)} |", flush=True)


class guessing:
    """Run a load of guesses while the block runs; its result is filled in at the end."""

    def __init__(self, options: argparse.Namespace, target: Target, load: Load) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(1)
        self._result = Result(0, 0, 0, {})
        self._future = self._pool.submit(ask, options, target.server.url, load, 16)

    def __enter__(self) -> Result:
        return self._result

    def __exit__(self, *_: object) -> None:
        self._result.__dict__.update(self._future.result().__dict__)
        self._pool.shutdown()


def start(started: ExitStack, instance: Path, app: str = "wsgi:app", path: str = "/health") -> Server:
    """Start a server that stops with the stack."""
    server = Server(instance, app, path)
    started.callback(server.stop)
    return server


def rounds(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Return the number of each round with each number of connections."""
    return ((number + 1, c) for number in range(options.rounds) for c in options.connections)


def ask(options: argparse.Namespace, url: str, load: Load, connections: int) -> Result:
    """Run one load."""
    own_client = options.client == "own"
    return run(url, load, connections=connections, seconds=options.seconds, own_client=own_client)


def cells(found: list[Result]) -> str:
    """Format the medians of rate, p50 and p99 over several runs, and the sum of their errors."""
    middle = [statistics.median(getattr(result, name) for result in found) for name in ("rate", "p50", "p99")]
    errors = sum(result.errors for result in found)
    return f"{middle[0]:,.0f} | {middle[1]:.1f} | {middle[2]:.1f} | {errors}"


def memory_cells(server: Server) -> str:
    """Format the memory in use for the table."""
    return " | ".join(f"{megabytes:.0f}" for megabytes in server.memory())


def progress(text: str) -> None:
    """Print progress to standard error, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


PARTS = {"speed": speed, "stored": stored, "attack": attack, "memory": memory}
OPERATIONS = ("token", "refresh", "me", "introspect", "jwks", "create")


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=3, help="of one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--requests", type=int, default=200_000, help="for memory's growth")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the databases to fill")
    parser.add_argument("--client", choices=("wrk", "own"), default="wrk" if WRK else "own")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, load by {options.client}.")
    for name, measure in PARTS.items():
        if not options.parts or name in options.parts:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
                measure(options, Path(folder), started)


if __name__ == "__main__":
    main()
