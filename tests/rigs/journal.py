"""One boot of a worker's journal without a worker: the real meter and the real file, with sessions made up.

Owns what a session of such a boot uses; time passes when it is used. Knows no process and no HTTP.
"""

from pathlib import Path

from gpumeter_usage.record import Status
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.journal import Journal
from gpumeter_worker.metering.meter import Flush, Identity, Meter
from gpumeter_worker.metering.parts import Part

START = 1_700_000_000 * 10**9
WORKER, SERVICE = "worker", "team/model"


def identity(boot_id: str, worker_uid: str = WORKER, service: str = SERVICE) -> Identity:
    """What the records of a boot on a CPU say alike."""
    return Identity(worker_uid, boot_id, service, "model", "cpu", "host")


class Usage:
    """A boot's meter, and the time that it has got to."""

    def __init__(self, name: str, at_ns: int = START) -> None:
        self.meter = Meter(identity(name), uncalibrated(Rule.KNEE, "host"), at_ns)
        self.now = at_ns
        self.meter.enter(Phase.SERVING, at_ns)

    def used(self, session: str, gpu_ns: int = 1000) -> Flush:
        """A flush that holds a whole session."""
        self.meter.begin(session, "acme", self.now)
        self.meter.step(self.now, self.now + gpu_ns, gpu_ns, [Part(session, 1, 0, True, 1, prompt_tokens=1)])
        self.now += gpu_ns
        self.meter.end(session, Status.FINISHED, self.now)
        flush = self.meter.cut(self.now)
        assert flush is not None
        return flush


class Boot(Usage):
    """One boot that works with a real file."""

    def __init__(self, folder: Path, name: str, at_ns: int = START) -> None:
        super().__init__(name, at_ns)
        self.journal = Journal(folder, identity(name), at_ns)
