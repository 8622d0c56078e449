"""The Lease is kept by a thread: a loop that is busy loses it no more than one that rests; one that is dead does."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent

from gpumeter_operator.candidate import LEASE_LOST, Candidate
from gpumeter_operator.decide.lease import SECOND_NS, Lease, Terms
from gpumeter_operator.flow.tenure import Tenure

# A candidate whose Lease is lost ends its process, which here is that of all tests: a machine that stood still for
# minutes must not be the end of them.
FOR_GOOD_NS = 3_600 * SECOND_NS
BRISK = Terms(
    duration_s=7_200,
    deadline_ns=FOR_GOOD_NS,
    renew_every_ns=SECOND_NS // 20,
    retry_every_ns=SECOND_NS // 20,
    look_every_ns=SECOND_NS // 20,
    attempt_ns=5 * SECOND_NS,
)


@dataclass
class OneLease:
    """A server with one Lease, and the threads that asked it."""

    reference: str = "gpumeter-system/gpumeter-operator"
    lease: Lease | None = None
    writes: int = 0
    closed: bool = False
    threads: set[str] = field(default_factory=set)

    async def read(self) -> Lease | None:
        return self.lease

    async def write(self, lease: Lease) -> Lease | None:
        self.threads.add(threading.current_thread().name)
        self.writes += 1
        self.lease = replace(lease, version=str(self.writes))
        return self.lease

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def standing(server: OneLease, tenure: Tenure) -> AsyncIterator[Candidate]:
    """A candidate whose thread ends with the block, also where the test fails in it."""
    candidate = Candidate(server, tenure, "me", BRISK, stalled_ns=FOR_GOOD_NS)
    candidate.stand()
    try:
        yield candidate
    finally:
        await candidate.close()


async def test_a_loop_that_is_busy_keeps_no_renewal_waiting() -> None:
    server, tenure = OneLease(), Tenure()
    async with standing(server, tenure) as candidate:
        await asyncio.wait_for(candidate.won.wait(), 60)
        before = server.writes
        time.sleep(1.5)  # noqa: ASYNC251 - what thousands of services that come together do to a loop
        assert server.writes > before + 5, "it was renewed meanwhile"
        assert tenure.open(), "and whoever was busy may write at once"
        assert server.threads == {"lease"}

        await candidate.stand_down()
        quiet = server.writes
        await asyncio.sleep(0.2)
        assert server.writes == quiet, "who stands down renews no more"
        assert tenure.open() and await candidate.release()
        assert server.lease is not None and server.lease.holder == ""
    assert server.closed


def test_a_tenure_that_one_thread_ends_while_another_one_looks_at_the_clock_is_over_for_good() -> None:
    def looked() -> int:
        tenure.close()  # the thread that keeps the Lease, between two lines of the one that acts
        return 0

    tenure = Tenure(looked)
    tenure.extend(SECOND_NS)
    tenure.over()
    assert not tenure.open()


async def test_a_candidate_that_never_won_ends_too() -> None:
    server = OneLease(lease=Lease("another", BRISK.duration_s, "", "", 0, "1"))
    async with standing(server, Tenure()) as candidate:
        await asyncio.sleep(0.1)
        assert not candidate.won.is_set()
        await candidate.stand_down()
    assert server.closed and server.writes == 0


def standing_still(before: str = "") -> subprocess.CompletedProcess[str]:
    """A process that wins the Lease, does something and comes round no more for a minute; how it ended."""
    program = f"""
        import asyncio, logging, threading, time
        from test_operator_candidate import BRISK, OneLease
        from gpumeter_operator.candidate import Candidate
        from gpumeter_operator.flow.tenure import Tenure

        async def main() -> None:
            candidate = Candidate(OneLease(), Tenure(), "me", BRISK, stalled_ns=1_500_000_000)
            candidate.stand()
            await candidate.won.wait()
            {before}
            time.sleep(60)

        logging.basicConfig()
        asyncio.run(main())
    """
    return subprocess.run(
        [sys.executable, "-c", dedent(program)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        timeout=120,
    )


def test_a_lost_lease_ends_the_process_though_its_loop_stands_still() -> None:
    done = standing_still()
    assert done.returncode == LEASE_LOST
    assert "LeaseNotRenewed" in done.stderr and "did not come round" in done.stderr


def test_a_lost_lease_ends_a_process_that_gets_no_thread_any_more() -> None:
    done = standing_still("threading.stack_size(2**50)")  # more than there are addresses
    assert done.returncode == LEASE_LOST
