"""Compare the token requests of two checkouts: `bench/compare.py OLD_DIR NEW_DIR`.

Every round measures both, the other one first each time; the table has medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from load import Result, run
from servers import Server

from bench import cells, new_target, progress


def main() -> None:
    """Start both servers, measure them in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of one run")
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    os.environ.setdefault("BENCH_WORKERS", "2")
    trees = {"old": options.old.resolve(), "new": options.new.resolve()}
    results: dict[str, list[Result]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        targets = {}
        for name, tree in trees.items():
            server = Server(Path(folder) / name, tree=tree)
            stack.callback(server.stop)
            targets[name] = new_target(server)
        for number in range(options.rounds):
            for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
                load = targets[name].token_load()
                url = targets[name].server.url
                result = run(url, load, connections=options.connections, seconds=options.seconds)
                results[name].append(result)
                progress(f"round {number + 1}, {name}: {result.rate:,.0f} tokens/s")
    print(f"| {options.connections} connections | tokens/s | p50 ms | p99 ms | errors |")
    print("| --- | --: | --: | --: | --: |")
    for name, found in results.items():
        print(f"| {name} | {cells(found)} |")
    pairs = list(zip(results["new"], results["old"], strict=True))
    ratios = [
        statistics.median(getattr(new, what) / getattr(old, what) for new, old in pairs)
        for what in ("rate", "p50", "p99")
    ]
    print("| new / old | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |")


if __name__ == "__main__":
    main()
