"""The one clock: aware UTC in whole seconds. Tests move it here."""

import time
from datetime import UTC, datetime


def now() -> datetime:
    """The present moment, aware UTC, cut to the whole second."""
    return datetime.fromtimestamp(int(time.time()), UTC)


def rfc3339(moment: datetime) -> str:
    """A moment in UTC as everything Lanyard says has it: `2026-06-01T12:00:00Z`."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
