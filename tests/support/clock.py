"""A clock that tests stop and move."""

from __future__ import annotations

from datetime import datetime, timedelta

import models


class Clock:
    """The test's hand on the one clock."""

    def __init__(self) -> None:
        self.moment = models.now()

    def now(self) -> datetime:
        return self.moment

    def time(self) -> float:
        """Stand in for `time.time` in models.py."""
        return self.moment.timestamp()

    def advance(self, **by: float) -> None:
        self.moment += timedelta(**by)
