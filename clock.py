"""The one clock: aware UTC in whole seconds. Tests move it here."""

import time
from datetime import UTC, datetime


def now() -> datetime:
    """The present moment, aware UTC, cut to the whole second."""
    return datetime.fromtimestamp(int(time.time()), UTC)
