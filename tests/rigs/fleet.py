"""Thousands of workers in one process: each keeps a real chain of real records, made when somebody asks for them.

Owns what such a worker measures, a flush every five seconds of its time, and that it forgets what was acknowledged.
Time is the caller's. Knows no HTTP; `Fleet` is the collector's port towards all of them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpumeter_operator.adapters.workers import Target, WorkerRefuses, WorkerSilent
from gpumeter_operator.billing.facts import Worker
from gpumeter_usage.chain import GENESIS, Link, link
from gpumeter_usage.page import Acknowledgement, Boot, JournalStatus, Page
from gpumeter_usage.period import SECOND_NS, next_minute_edge_ns
from gpumeter_usage.record import Account, Kind, Record, Status, canonical
from rigs.ledger import TOKEN

CHECKPOINT_NS = 5 * SECOND_NS
SLICES = 2
"""Sessions with a slice in each flush."""

SILENT_S = 3.0
"""How long it takes to find that a worker does not answer, as on a network."""


@dataclass
class Measured:
    """One worker of a fleet: serves two sessions half of its time, and idles the other half."""

    identity: Worker
    frontier_ns: int
    boot_id: str = "boot-1"
    links: list[Link] = field(default_factory=list)
    trimmed: int = 0
    head_hash: str = GENESIS
    sealed: bool = False

    @property
    def head_seq(self) -> int:
        return self.trimmed + len(self.links)

    def live(self, until_ns: int) -> None:
        """Flush every checkpoint up to a time."""
        while self.frontier_ns + CHECKPOINT_NS <= until_ns:
            self.flush(min(self.frontier_ns + CHECKPOINT_NS, next_minute_edge_ns(self.frontier_ns)))

    def flush(self, end_ns: int) -> None:
        """The slices of the sessions, and the accounts that they sum to."""
        begin_ns, whole_ns = self.frontier_ns, end_ns - self.frontier_ns
        busy_ns = whole_ns // 2
        for number in range(SLICES):
            share_ns = busy_ns // SLICES + (busy_ns % SLICES if number == 0 else 0)
            self._append(
                Kind.SESSION,
                Account.ATTRIBUTED,
                begin_ns,
                end_ns,
                session_id=f"s-{self.identity.pod}-{self.head_seq // 64}-{number}",
                tenant=("acme", "beta-corp")[number % 2],
                gpu_ns=share_ns,
                prefill_ns=share_ns // 3,
                decode_ns=share_ns - share_ns // 3,
                prompt_tokens=17,
                completion_tokens=40,
                steps=40,
                batch_ns=share_ns * SLICES,
                status=Status.OPEN,
            )
        self._append(Kind.ACCOUNT, Account.ATTRIBUTED, begin_ns, end_ns, gpu_ns=busy_ns)
        self._append(Kind.ACCOUNT, Account.IDLE, begin_ns, end_ns, gpu_ns=whole_ns - busy_ns)
        self.frontier_ns = end_ns

    def seal(self) -> None:
        self._append(Kind.SEAL, "", self.frontier_ns, self.frontier_ns, status=Status.DRAINED)
        self.sealed = True

    def _append(self, kind: Kind, account: str, started_ns: int, ended_ns: int, **values: object) -> None:
        fields: dict[str, object] = {
            "worker_uid": self.identity.worker_uid,
            "boot_id": self.boot_id,
            "seq": self.head_seq + 1,
            "kind": kind,
            "account": str(account),
            "service": self.identity.service_key,
            "model": self.identity.model,
            "started_at": started_ns,
            "ended_at": ended_ns,
            "gpu_ns": 0,
            "gpu_class": self.identity.gpu_class,
            "clock": "cuda",
        }
        chained = link(self.head_hash, canonical(Record(**(fields | values))))  # type: ignore[arg-type]
        self.links.append(chained)
        self.head_hash = chained.hash

    def status(self) -> JournalStatus:
        boot = Boot(self.boot_id, self.head_seq, self.head_hash, self.trimmed, self.sealed)
        return JournalStatus(self.identity.worker_uid, self.identity.service_key, self.frontier_ns, (boot,))

    def page(self, boot_id: str, after: int, limit: int) -> Page:
        if after < self.trimmed:
            raise WorkerRefuses(f"GET /records was answered with 410: records up to {self.trimmed} are trimmed")
        first = after - self.trimmed
        links = tuple(self.links[first : first + limit])
        return Page(self.identity.worker_uid, self.identity.service_key, boot_id, after, self.frontier_ns, links)

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        count = acknowledgement.seq - self.trimmed
        if count > 0:
            assert self.links[count - 1].hash == acknowledgement.hash, "a foreign chain was acknowledged"
            del self.links[:count]
            self.trimmed = acknowledgement.seq


def worker_of_fleet(number: int, services: int) -> Worker:
    """Workers are spread over services of one team each."""
    service = number % services
    name = f"model-{service}"
    pod = f"{name}-{number}"
    return Worker(f"uid-{number:06}", f"team-{service % 50}", name, f"svc-{service}", name, "h100", 1, pod)


def address(number: int) -> str:
    """One of this machine's own addresses for each worker."""
    return f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"


class Fleet:
    """The collector's port towards workers in this process."""

    def __init__(self, workers: Sequence[Measured], clock_ns: Callable[[], int]) -> None:
        self.by_host = {address(number): worker for number, worker in enumerate(workers)}
        self.silent: set[str] = set()  # hosts
        self.making_s = 0.0
        self._clock_ns = clock_ns

    def targets(self) -> list[tuple[Worker, Target]]:
        return [(worker.identity, Target(host, TOKEN)) for host, worker in self.by_host.items()]

    async def status(self, target: Target) -> JournalStatus:
        if target.host in self.silent:
            await asyncio.sleep(SILENT_S)
            raise WorkerSilent(f"{target.host} cannot be reached: no route")
        begun_s = time.perf_counter()
        worker = self.by_host[target.host]
        worker.live(self._clock_ns())
        status = worker.status()
        self.making_s += time.perf_counter() - begun_s
        await asyncio.sleep(0)  # a network's answer is never there at once
        return status

    async def page(self, target: Target, boot_id: str, after: int, limit: int) -> Page:
        await asyncio.sleep(0)
        return self.by_host[target.host].page(boot_id, after, limit)

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        await asyncio.sleep(0)
        self.by_host[target.host].acknowledge(acknowledgement)
