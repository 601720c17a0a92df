"""A clock that a file sets: on PYTHONPATH of a server under test, `time.time` is off by the seconds in it.

Python imports a module of this name at every start. Only the server that is given SOAK_CLOCK is
moved, and nothing else on the machine; Lanyard, Authlib and gunicorn all ask `time.time`.
"""

import os
import time

_real = time.time


def _moved() -> float:
    try:
        with open(os.environ["SOAK_CLOCK"]) as file:
            return _real() + float(file.read() or 0)
    except FileNotFoundError:
        return _real()


if "SOAK_CLOCK" in os.environ:
    time.time = _moved
