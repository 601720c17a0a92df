"""Clients that change agents of their own as fast as they are answered."""

from __future__ import annotations

import random
import threading
import time
from typing import Self

from ledger import REFUSED, Agent, Caller, Change, Ledger, Tally

KEPT = 3  # agents that a client has at a time
PAUSE = 0.05  # seconds before asking again when nobody listens
WEIGHTS = {"token": 4, "refresh": 4, "rotate": 2, "deactivate": 1, "delete": 1}


class Load:
    """Runs while the `with` block does; whatever happens in there happens under load.

    :param pause: seconds that each client waits after an answer.
    """

    def __init__(self, ledger: Ledger, tally: Tally, clients: int, pause: float) -> None:
        self._ledger = ledger
        self._tally = tally
        self._pause = pause
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        self._threads.append(threading.Thread(target=self._read))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        change = Change(self._ledger, Caller(self._ledger.server, self._tally))
        mine: list[Agent] = []
        try:
            while not self._stopping.wait(self._pause):
                mine = [agent for agent in mine if not (agent.doubt or agent.is_deleted)]
                if self._step(change, mine) == REFUSED:
                    time.sleep(PAUSE)
        except Exception as error:
            self._tally.violation(f"a client stopped: {error!r}")
            raise
        finally:
            change.caller.session.close()

    def _read(self) -> None:
        """One more client, that only asks: it finds out whether those that write keep others waiting."""
        change = Change(self._ledger, Caller(self._ledger.server, self._tally))
        while not self._stopping.wait(PAUSE):
            change.read()
        change.caller.session.close()

    def _step(self, change: Change, mine: list[Agent]) -> str | None:
        """One change of one agent; returns how it was answered."""
        if len(mine) < KEPT:
            agent = change.create()
            if agent:
                mine.append(agent)
            return change.status
        agent = random.choice(mine)
        if not agent.is_active:
            change.reactivate(agent)
        else:
            [kind] = random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            getattr(change, kind)(agent)
        return change.status
