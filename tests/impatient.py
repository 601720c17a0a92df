"""A worker whose clients have half a second: for the tests that would wait too long for Lanyard's own."""

import worker

worker.ARRIVAL = 0.5  # type: ignore[assignment]
Worker = worker.Worker
