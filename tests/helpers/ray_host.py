"""A host that can be told to die or to hang: a module of its own, so that an actor's process can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fedloom.messages import wire
from fedloom.runtimes.ray_host import Host


class Faulty(Host):
    """A file `ROUND-CLIENT` in the folder $FEDLOOM_TEST_FAULTS, holding `die` or `hang`, happens once, to training."""

    def work(self, start, body, digest, state):
        assignment = wire.decode_assignment(wire.Split(start, body.data, digest))
        fault = Path(os.environ["FEDLOOM_TEST_FAULTS"]) / f"{assignment.round}-{assignment.client}"
        if assignment.kind == "train" and fault.exists():
            what = fault.read_text()
            fault.unlink()
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().work(start, body, digest, state)
