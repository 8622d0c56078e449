"""Operators that want one Lease, on made-up time, over a network that loses requests and answers.

Owns the API server's part of a Lease (versions, conflicts), what goes wrong on the way, and who may write when. The
candidates run flow.election as the operator does, each with a clock of its own: another zero, another rate.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.decide.lease import Lease
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.flow.election import Election
from gpumeter_operator.flow.tenure import Tenure
from rigs.virtualtime import now_s


@dataclass
class LeaseServer:
    """The Lease, and all that was written to it."""

    lease: Lease | None = None
    version: int = 0
    away: bool = False
    writes: list[tuple[float, Lease]] = field(default_factory=list)

    def write(self, lease: Lease) -> Lease | None:
        if (self.lease.version if self.lease else "") != lease.version:
            return None
        self.version += 1
        self.lease = replace(lease, version=str(self.version))
        self.writes.append((now_s(), self.lease))
        return self.lease


class Way:
    """One candidate's connection to the server."""

    reference = "gpumeter-system/gpumeter-operator"

    def __init__(self, server: LeaseServer, chance: random.Random) -> None:
        self._server, self._chance = server, chance
        self.cut = False
        self.lossy = 0.0  # share of requests that are lost, half of them on the way back
        self.delay_s = 0.01
        self.slow_s = 0.0  # that the server takes for each request
        self.hold: asyncio.Event | None = None  # the process is frozen while this is not set

    async def read(self) -> Lease | None:
        return await self._exchange(lambda: self._server.lease)

    async def write(self, lease: Lease) -> Lease | None:
        return await self._exchange(lambda: self._server.write(lease))

    async def _exchange(self, act: Callable[[], Lease | None]) -> Lease | None:
        await self.thaw()
        await asyncio.sleep(self.delay_s * self._chance.random() + self.slow_s)
        if self.cut or self._server.away:
            await asyncio.sleep(0.2 if self._chance.random() < 0.5 else 60)
            raise Unreachable("connection refused")
        lost = self._chance.random() < self.lossy
        if lost and self._chance.random() < 0.5:
            await asyncio.sleep(60)  # the request never arrived, and nobody says so
        found = act()
        if lost:
            await asyncio.sleep(60)  # it was done, and nobody says so
        if self._chance.random() < self.lossy / 4:
            raise Refused(500, "InternalError", "etcdserver: request timed out")
        await asyncio.sleep(self.delay_s * self._chance.random())
        await self.thaw()
        return found

    async def thaw(self) -> None:
        if self.hold is not None:
            await self.hold.wait()


class Candidate:
    """One operator process; `rate` is how fast its clock runs."""

    def __init__(self, name: str, server: LeaseServer, chance: random.Random, rate: float = 1.0) -> None:
        self.name, self.rate = name, rate
        self.way = Way(server, chance)
        offset_s = chance.random() * 1e6

        def clock_ns() -> int:
            return int((now_s() * rate + offset_s) * 1e9)

        self.tenure = Tenure(clock_ns)
        self.election = Election(self.way, self.tenure, name, clock_ns=clock_ns, wait=self._wait)
        self.task: asyncio.Task[Problem] = asyncio.create_task(self.election.run())

    @property
    def may_write(self) -> bool:
        return not self.dead and self.tenure.open()

    @property
    def dead(self) -> bool:
        return self.task.done()

    async def kill(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def stop(self) -> bool:
        """As main does at SIGTERM."""
        self.tenure.close()
        await self.kill()
        return await self.election.release()

    def freeze(self) -> None:
        self.way.hold = asyncio.Event()

    def go_on(self) -> None:
        if self.way.hold is not None:
            self.way.hold.set()
            self.way.hold = None

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.rate)
        await self.way.thaw()
