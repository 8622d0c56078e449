"""A small world for tests of the collector: workers that keep a real hash chain, and the real ledger on a real file.

Owns fake workers that implement the collector's port and a fake clock. What they can do wrong is what workers, networks
and disks do: answer late or twice, lose an acknowledgement, crash, vanish.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sqlalchemy import event

from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, WorkerRefuses, WorkerSilent
from gpumeter_operator.billing.facts import Worker
from gpumeter_usage.chain import GENESIS, Link, link
from gpumeter_usage.page import Acknowledgement, Boot, JournalStatus, Page
from gpumeter_usage.period import SECOND_NS, Granularity, next_minute_edge_ns, rfc3339
from gpumeter_usage.record import Account, Kind, Record, Status, canonical, parse

T = TypeVar("T")
START_NS = 1_795_255_200 * SECOND_NS  # 2026-11-21 10:00:00 UTC, a full hour
TOKEN = "the usage token of every fake worker"
TENANTS = ("acme", "beta-corp")


async def inline(call: Callable[[], T]) -> T:
    """Run the ledger's calls where they are made: a simulation has one thread, so that a seed is a run."""
    return call()


def worker(number: int = 1, *, service: str = "smollm2", devices: int = 1, gpu_class: str = "h100") -> Worker:
    return Worker(f"pod-uid-{number}", "team-a", service, "svc-uid", service, gpu_class, devices, f"{service}-{number}")


@dataclass
class Chain:
    """One boot's records as a worker's journal holds them."""

    boot_id: str
    links: list[Link] = field(default_factory=list)
    acknowledged_seq: int = 0
    trimmed: int = 0
    sealed: bool = False

    @property
    def head_hash(self) -> str:
        return self.links[-1].hash if self.links else GENESIS

    @property
    def acknowledged_hash(self) -> str:
        return self.links[self.acknowledged_seq - 1].hash if self.acknowledged_seq else GENESIS


class FakeWorker:
    """A worker with a journal: books all of its time, cut at every minute, exactly as the real one must."""

    def __init__(self, identity: Worker, started_ns: int, boot_id: str = "boot-1", clock: str = "cuda") -> None:
        self.identity = identity
        self.clock = clock
        self.tells_acknowledged = True  # workers of earlier builds do not
        self.profile_hash = ""  # of the profile by which sessions' steps are split
        self.frontier_ns = started_ns
        self.boots: list[Chain] = [Chain(boot_id)]
        self.acknowledgements: list[Acknowledgement] = []
        self.acknowledged: dict[str, int] = {}

    @property
    def boot(self) -> Chain:
        return self.boots[-1]

    def spend(self, account: Account, until_ns: int) -> None:
        """Book the time up to `until_ns` on one account."""
        while self.frontier_ns < until_ns:
            edge_ns = min(until_ns, next_minute_edge_ns(self.frontier_ns))
            self._append(Kind.ACCOUNT, account, self.frontier_ns, edge_ns, gpu_ns=edge_ns - self.frontier_ns)
            self.frontier_ns = edge_ns

    def serve(
        self, session_id: str, tenant: str, until_ns: int, status: Status = Status.FINISHED, batch: int = 1
    ) -> None:
        """Book the time up to `until_ns` as one session's, in slices that end with the minutes."""
        while self.frontier_ns < until_ns:
            edge_ns = min(until_ns, next_minute_edge_ns(self.frontier_ns))
            used_ns = edge_ns - self.frontier_ns
            self._append(
                Kind.SESSION,
                Account.ATTRIBUTED,
                self.frontier_ns,
                edge_ns,
                session_id=session_id,
                tenant=tenant,
                gpu_ns=used_ns,
                prefill_ns=used_ns // 3,
                decode_ns=used_ns - used_ns // 3,
                prompt_tokens=7,
                completion_tokens=11,
                steps=11,
                kv_byte_s=5_000,
                profile_hash=self.profile_hash,
                batch_ns=used_ns * batch,
                status=status if edge_ns == until_ns else Status.OPEN,
            )
            self._append(Kind.ACCOUNT, Account.ATTRIBUTED, self.frontier_ns, edge_ns, gpu_ns=used_ns)
            self.frontier_ns = edge_ns

    def draw(self, attributed_mj: int, platform_mj: int) -> None:
        """State energy at the frontier, as a worker does where there is NVML."""
        for account, energy_mj in ((Account.ATTRIBUTED, attributed_mj), (Account.IDLE, platform_mj)):
            self._append(Kind.ACCOUNT, account, self.frontier_ns, self.frontier_ns, energy_mj=energy_mj)

    def seal(self, status: Status = Status.DRAINED) -> None:
        """End the chain of the running boot at the frontier."""
        self._append(Kind.SEAL, "", self.frontier_ns, self.frontier_ns, status=status)
        self.boot.sealed = True

    def restart(self, boot_id: str, at_ns: int) -> None:
        """Start anew over the same journal: close the former boot's chain where it stood."""
        if not self.boot.sealed:
            self.seal(Status.RECOVERED)
        self.frontier_ns = at_ns
        self.boots.append(Chain(boot_id))

    def _append(self, kind: Kind, account: str, started_ns: int, ended_ns: int, **values: object) -> None:
        fields: dict[str, object] = {
            "worker_uid": self.identity.worker_uid,
            "boot_id": self.boot.boot_id,
            "seq": len(self.boot.links) + 1,
            "kind": kind,
            "account": str(account),
            "service": self.identity.service_key,
            "model": self.identity.model,
            "started_at": started_ns,
            "ended_at": ended_ns,
            "gpu_ns": 0,
            "gpu_class": self.identity.gpu_class,
            "clock": self.clock,
        }
        body = canonical(Record(**(fields | values)))  # type: ignore[arg-type]
        self.boot.links.append(link(self.boot.head_hash, body))

    def status(self) -> JournalStatus:
        boots = tuple(
            Boot(
                boot.boot_id,
                len(boot.links),
                boot.head_hash,
                boot.acknowledged_seq,
                boot.sealed,
                boot.acknowledged_hash if self.tells_acknowledged else "",
            )
            for boot in self.boots
            if not (boot.sealed and boot.acknowledged_seq == len(boot.links) and boot is not self.boot)
        )
        return JournalStatus(self.identity.worker_uid, self.identity.service_key, self.frontier_ns, boots)

    def page(self, boot_id: str, after: int, limit: int = 5000) -> Page:
        boot = next(boot for boot in self.boots if boot.boot_id == boot_id)
        if after < boot.trimmed:
            raise WorkerRefuses(f"GET /records was answered with 410: records up to {boot.trimmed} are trimmed")
        links = tuple(boot.links[after : after + limit])
        return Page(self.identity.worker_uid, self.identity.service_key, boot_id, after, self.frontier_ns, links)

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        boot = next(boot for boot in self.boots if boot.boot_id == acknowledgement.boot_id)
        assert boot.links[acknowledgement.seq - 1].hash == acknowledgement.hash, "a foreign chain was acknowledged"
        boot.acknowledged_seq = max(boot.acknowledged_seq, acknowledgement.seq)
        boot.trimmed = boot.acknowledged_seq
        self.acknowledgements.append(acknowledgement)


class FakeNetwork:
    """Implements the collector's port towards many fake workers; `trouble` is asked before each exchange."""

    def __init__(self, page_limit: int = 5000) -> None:
        self.workers: dict[str, FakeWorker] = {}
        self.page_limit = page_limit
        self.trouble: Callable[[str], None] = lambda _: None

    def add(self, host: str, fake: FakeWorker) -> Target:
        self.workers[host] = fake
        return Target(host, TOKEN)

    async def status(self, target: Target) -> JournalStatus:
        self.trouble("status")
        return self._of(target).status()

    async def page(self, target: Target, boot_id: str, after: int, limit: int) -> Page:
        self.trouble("page")
        fake, limit = self._of(target), min(limit, self.page_limit)
        page = fake.page(boot_id, after, limit)
        # A journal cuts between flushes where it can: a slice and the account of its flush go in one page.
        cut = len(page.links) == limit > 1 and parse(page.links[-1].body).kind is Kind.SESSION
        return fake.page(boot_id, after, limit - 1) if cut else page

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        self.trouble("acknowledge")
        self._of(target).acknowledge(acknowledgement)
        self.trouble("acknowledged")

    def _of(self, target: Target) -> FakeWorker:
        if target.host not in self.workers:
            raise WorkerSilent(f"{target.host} cannot be reached: no route")
        if target.token != TOKEN:
            raise WorkerRefuses("GET /status was answered with 401: the token is not this worker's")
        return self.workers[target.host]


class Clock:
    """Time that passes when told."""

    def __init__(self, now_ns: int = START_NS) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


def live(fake: FakeWorker, random_: random.Random, until_ns: int) -> None:
    """Fill a worker's time with idling and sessions of two tenants, at random."""
    while fake.frontier_ns < until_ns:
        step_ns = min(until_ns, fake.frontier_ns + random_.randrange(1, 20 * SECOND_NS))
        if random_.random() < 0.5:
            account = random_.choice((Account.IDLE, Account.HOST_GAP, Account.NONBILLABLE))
            fake.spend(account, step_ns)
        else:
            status = random_.choice((Status.FINISHED, Status.CANCELLED, Status.FAILED))
            session = f"s-{random_.randrange(2**64):032x}"
            fake.serve(session, random_.choice(TENANTS), step_ns, status, random_.randrange(1, 8))


class Crash(BaseException):
    """The collector was killed: nothing that it would have done after this point was done."""


class CrashAt:
    """Counts every statement, commit and exchange, and kills the collector before the `at`-th."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def __call__(self, *_: object, **__: object) -> None:
        self.count += 1
        if 0 < self.at <= self.count:
            raise Crash

    @property
    def happened(self) -> bool:
        return 0 < self.at <= self.count

    def watch(self, ledger: Ledger) -> None:
        event.listen(ledger.engine, "before_cursor_execute", self)
        event.listen(ledger.engine, "commit", self)


def open_ledger(where: Path | str, granularity: Granularity = Granularity.MINUTE) -> Ledger:
    """The ledger in a file, or at a URL, with periods of this length from the beginning."""
    url = where if isinstance(where, str) else f"sqlite:///{where}"
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and file.parent.is_dir() and not file.exists():
        file.write_bytes(_migrated())
    ledger = Ledger(url)
    ledger.set_granularity(granularity, START_NS)
    return ledger


@cache
def _migrated() -> bytes:
    """A file with the newest schema and nothing in it: hundreds of tests need one, and the migrations take a while."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        Ledger(f"sqlite:///{path}").close()
        return path.read_bytes()


def started(container_id: str, at_ns: int) -> ContainerEvent:
    return ContainerEvent(container_id, "started", at_ns)


def ended(container_id: str, at_ns: int) -> ContainerEvent:
    return ContainerEvent(container_id, "ended", at_ns)


def gone(at_ns: int) -> ContainerEvent:
    return ContainerEvent("", "gone", at_ns)


def finals(ledger: Reader, service: tuple[str, str] = ("team-a", "smollm2")) -> dict[tuple[int, str], dict[str, Any]]:
    """The Final reports of a service as the ledger keeps them, by end of period and tenant."""
    return {(end, tenant): json.loads(body) for end, tenant, body in ledger.final_reports(*service)}


def service_manifest(of: Worker) -> dict[str, Any]:
    """The InferenceService that a worker belongs to."""
    return {
        "metadata": {"name": of.service, "namespace": of.namespace, "uid": of.service_uid},
        "spec": {"model": {"name": of.model}, "pricing": {"planRef": {"name": "default"}}},
    }


def pod_manifest(of: Worker, address: str, *lives: tuple[str, int, int | None]) -> dict[str, Any]:
    """A worker pod; `lives` are its container's lives as (container id, start, end or None), the last one current."""
    status: dict[str, Any] = {"phase": "Running", "podIP": address}
    if lives:
        *_, former, current = (None, *lives)
        container: dict[str, Any] = {"name": "main", "containerID": current[0], "state": _state(current)}
        if former is not None:
            container["lastState"] = _state(former)
        status["containerStatuses"] = [container]
    return {
        "metadata": {
            "name": of.pod,
            "namespace": of.namespace,
            "uid": of.worker_uid,
            "labels": {"gpumeter.io/inferenceservice": of.service},
            "annotations": {
                "gpumeter.io/service-uid": of.service_uid,
                "gpumeter.io/devices": str(of.devices),
                "gpumeter.io/gpu-class": of.gpu_class,
            },
        },
        "status": status,
    }


def _state(life: tuple[str, int, int | None]) -> dict[str, Any]:
    container_id, started_ns, ended_ns = life
    if ended_ns is None:
        return {"running": {"startedAt": rfc3339(started_ns)}}
    times = {"startedAt": rfc3339(started_ns), "finishedAt": rfc3339(ended_ns)}
    return {"terminated": {"containerID": container_id, **times}}
