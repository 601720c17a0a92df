"""Each fault, done to a server under load; `make soak` plays them long, tests/test_faults.py short."""

from __future__ import annotations

import math
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
from ending import COMMANDS, KEY_ROTATIONS, OVER_HTTP, Ending
from joserfc import jwt
from joserfc.jwk import ECKey
from ledger import CUT, HALF, OPERATOR, Audit, Caller, Change, Ledger, Tally
from load import Load
from server import Server

DAY = 86_400


@dataclass
class Scene:
    """What came of one fault: a row of the soak's table."""

    name: str
    times: int = 0
    acknowledged: int = 0
    lost: int = 0
    tally: Tally = field(default_factory=Tally)


class Stage:
    """A server on a database, everything it acknowledged, and what must be true after every fault.

    :param pause: seconds that each client waits after an answer.
    :param sample: so many agents of earlier scenes are asked about after each.
    """

    def __init__(self, server: Server, clients: int = 8, pause: float = 0, sample: int = 20) -> None:
        self.server = server
        self.clients = clients
        self.pause = pause
        self.sample = sample
        self.ledger = Ledger(server)
        # Somebody is told of every change, and is never there: the deliverer meets each fault too.
        webhook = {"name": "nobody", "url": "http://127.0.0.1:9/", "events": ["agent.*"]}
        Caller(server, Tally()).call("POST", "/api/webhooks", json=webhook, headers=OPERATOR)
        self._log_read = 0
        self._older = 0  # how many agents there were before the scene

    @contextmanager
    def scene(self, name: str, times: int = 1, *, may_cut: float = 0) -> Iterator[Scene]:
        """Everything that is found wrong in the block, or after it, is in the scene's tally.

        :param may_cut: so many requests may go without an answer.
        """
        scene = Scene(name, times)
        acknowledged, self._older = self.ledger.acknowledged, len(self.ledger.agents)
        yield scene
        scene.acknowledged = self.ledger.acknowledged - acknowledged
        cut = scene.tally.answers[CUT] + scene.tally.answers[HALF]
        if cut > may_cut or (scene.tally.answers[HALF] and may_cut < math.inf):
            scene.tally.violation(f"{cut} requests were cut off")
        self.audit(scene)

    def load(self, scene: Scene) -> Load:
        """Clients, while a `with` block runs."""
        return Load(self.ledger, scene.tally, self.clients, self.pause)

    def audit(self, scene: Scene, *, at_end: bool = True) -> None:
        """Ask about all that the scene acknowledged and some of what was before; look into file and log."""
        audit = Audit(self.ledger, scene.tally)
        agents = self.ledger.agents
        older = random.sample(agents[: self._older], min(self.sample, self._older))
        # In the middle of a scene some will do: all come at its end.
        recent = agents[self._older :] if at_end else agents[-self.sample :]
        for agent in [*older, *recent]:
            audit.check(agent)
        scene.lost += audit.lost
        if (found := self.server.integrity()) != "ok":
            scene.tally.violation(f"integrity_check: {found}")
        self._read_log(scene)

    def _read_log(self, scene: Scene) -> None:
        text = self.server.log.read_text()
        new, self._log_read = text[self._log_read :], len(text)
        for found in re.findall(r"^.*(?:Traceback|crashed).*\n(?:.*\n){0,40}", new, re.MULTILINE)[:3]:
            scene.tally.violation(f"in the log: {found}")

    def must_write(self, scene: Scene, within: float = 3) -> None:
        """Work goes on by itself, soon."""
        caller = Caller(self.server, scene.tally)
        until = time.monotonic() + within
        while time.monotonic() < until:
            if Change(self.ledger, caller).create():
                return
            time.sleep(0.1)
        scene.tally.violation(f"no agent could be created {within} seconds after the fault")


def kill_workers(stage: Stage, times: int, seconds: float) -> Scene:
    """kill -9 of a random worker, again and again."""
    with stage.scene("kill -9 of a worker", times, may_cut=math.inf) as scene, stage.load(scene):
        for _ in range(times):
            time.sleep(random.uniform(0.2, 1) * seconds)
            stage.server.kill_worker()
    return scene


def kill_all(stage: Stage, times: int, seconds: float) -> Scene:
    """kill -9 of the master and all workers, and a new start; everything is looked at after each."""
    with stage.scene("kill -9 of everything", times, may_cut=math.inf) as scene, stage.load(scene):
        for _ in range(times):
            time.sleep(random.uniform(0.2, 1) * seconds)
            stage.server.kill_all()
            if (found := stage.server.integrity()) != "ok":
                scene.tally.violation(f"integrity_check: {found}")
            stage.server.start().wait()
    return scene


def terminate(stage: Stage, times: int, seconds: float) -> Scene:
    """SIGTERM: whatever was accepted is answered.

    A client that connects just between a worker's last look and the closing of its socket is reset.
    """
    with stage.scene("SIGTERM", times, may_cut=times) as scene, stage.load(scene):
        for _ in range(times):
            time.sleep(seconds)
            if code := stage.server.terminate():
                scene.tally.violation(f"exit code {code}")
            stage.server.start().wait()
    return scene


def reload(stage: Stage, times: int, seconds: float) -> Scene:
    """SIGHUP: new workers take over, and no request is refused or cut off."""
    with stage.scene("SIGHUP", times) as scene, stage.load(scene):
        for _ in range(times):
            time.sleep(seconds)
            stage.server.reload()
        time.sleep(seconds)
    return scene


def full_disk(stage: Stage, times: int, seconds: float) -> Scene:
    """No space, then space again. The instance must be on a disk of its own."""
    with stage.scene("full disk", times) as scene:
        for _ in range(times):
            _broken(stage, scene, seconds, lambda: faults.full(stage.server.instance))
    return scene


def kill_switch(stage: Stage, times: int, seconds: float) -> Scene:
    """Access is ended in every way on a full disk while tokens are asked for, which wait for room."""
    with stage.scene("kill switch on a full disk", times) as scene:
        caller = Caller(stage.server, scene.tally)
        ending = Ending(Change(stage.ledger, caller))
        whole = stage.server.reserve.stat().st_size
        for _ in range(times):
            with stage.load(scene):
                time.sleep(seconds)
            agents = {way: ending.new_agent() for way in (*OVER_HTTP, *COMMANDS)}
            waiting = ending.new_agent()
            with faults.full(stage.server.instance):
                with stage.load(scene):
                    time.sleep(seconds)
                    for way in OVER_HTTP:
                        ending.end(way, agents[way])
                    ending.must_be_refused(waiting)
                for way in COMMANDS:
                    ending.end(way, agents[way])
                for way in KEY_ROTATIONS:
                    ending.rotate_key(way)
            stage.must_write(scene)
            if stage.server.reserve.stat().st_size != whole:
                scene.tally.violation("the reserve was not made again")
        caller.session.close()
    return scene


def read_only(stage: Stage, times: int, seconds: float) -> Scene:
    """Nobody may write the files, then one may again."""
    with stage.scene("read-only files", times) as scene:
        for _ in range(times):
            _broken(stage, scene, seconds, lambda: faults.read_only(stage.server.database))
    return scene


def locked(stage: Stage, times: int, seconds: float) -> Scene:
    """Another process holds the write lock: writes wait for it at first, and reads behind them once."""
    with stage.scene(f"locked for {seconds:g} s", times) as scene:
        for _ in range(times):
            _broken(stage, scene, seconds, lambda: faults.locked(stage.server.database))
    slow = [f"{what} {seconds:.1f} s" for what, seconds in scene.tally.slow if what.startswith("GET")]
    if len(slow) > 3 * times:
        scene.tally.violation(f"reads waited behind writes: {', '.join(slow)}")
    return scene


def _broken(stage: Stage, scene: Scene, seconds: float, fault: Callable[[], Any]) -> None:
    """Under load: half a second that is well, the fault for some, and well again without a restart."""
    workers = set(stage.server.workers())
    with stage.load(scene):
        time.sleep(0.5)
        refused = scene.tally.answers["503"]
        with fault():
            time.sleep(seconds)
        if scene.tally.answers["503"] == refused:
            scene.tally.violation("nothing was refused: the fault did not happen")
        stage.must_write(scene)
    if set(stage.server.workers()) != workers:
        scene.tally.violation("a worker died of it")


def clock_jumps(stage: Stage, seconds: float) -> Scene:
    """A day forward, back, a day backward, back; what was spent stays spent."""
    with stage.scene("clock jumps by a day", 4) as scene:
        spent = Spent(stage, scene)
        for offset in (DAY, 0, -DAY, 0):
            with stage.load(scene):
                stage.server.set_clock(offset)
                time.sleep(seconds)
            stage.audit(scene, at_end=False)
            spent.check()
    return scene


class Spent:
    """A used refresh token and a used assertion, to be tried again."""

    def __init__(self, stage: Stage, scene: Scene) -> None:
        self._tally = scene.tally
        self._caller = Caller(stage.server, scene.tally)
        key = ECKey.generate_key("P-256")
        fields = {"token_endpoint_auth_method": "private_key_jwt"}
        jwks = {"keys": [key.as_dict(private=False)]}
        made = self._post("/api/agents", json={"name": "keyed", "jwks": jwks, **fields}, headers=OPERATOR)
        client_id = made["client_id"]
        claims = {"iss": client_id, "sub": client_id, "jti": str(uuid.uuid4())}
        claims |= {"aud": f"http://localhost:{stage.server.port}", "exp": int(stage.server.now()) + 300}
        self._assertion = {
            "grant_type": "client_credentials",
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": jwt.encode({"alg": "ES256"}, claims, key),
        }
        token = self._post("/oauth/token", data=self._assertion)
        self._refresh = {"refresh_token": token["refresh_token"]}
        self._newest = self._post("/oauth/refresh", json=self._refresh)["refresh_token"]

    def _post(self, path: str, **kwargs: Any) -> Any:
        return self._caller.call("POST", path, **kwargs)[1]

    def check(self) -> None:
        """Neither comes back, whatever the clock says."""
        for path, body in (("/oauth/token", self._assertion), ("/oauth/refresh", self._refresh)):
            status, _ = self._caller.call("POST", path, data=body)
            if status not in ("400", "401"):
                self._tally.violation(f"{path} took again what was spent: {status}")


def damaged(template: Path, folder: Path, damage: str) -> Scene:
    """A start on a damaged file: one sentence, and the file is as it was.

    :param template: a good database of some size, closed.
    """
    scene = Scene(f"start: {damage}", 1)
    instance = folder / "instance"
    instance.mkdir(parents=True)
    server = Server(folder, instance)
    server.database.write_bytes(template.read_bytes())
    faults.DAMAGES[damage](server.database)
    before = server.database.read_bytes()
    server.start()
    try:
        if server.process.wait(20) == 0:
            scene.tally.violation("it said that all was well")
    except Exception as error:
        scene.tally.violation(f"it started: {error!r}")
    finally:
        server.stop()
    told = server.log.read_text()
    if not re.fullmatch(r"Lanyard will not start: The database \S+ cannot be used: .+\.\n", told):
        scene.tally.violation(f"it did not say so in one sentence: {told}")
    if server.database.read_bytes() != before:
        scene.tally.violation("the file was touched")
    return scene
