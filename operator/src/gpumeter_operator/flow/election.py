"""One operator acts, the others stand by: takes the Lease, renews it, and tells why it was lost.

Owns the loop, how old its last round may be, and the sentences. decide.lease says when; flow.tenure is what the holder
is allowed. Does not know what an operator does with it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from gpumeter_operator.adapters.kubernetes import Refused, Unreachable
from gpumeter_operator.adapters.lease import stamp
from gpumeter_operator.decide.lease import (
    SECOND_NS,
    Lease,
    Sighting,
    Terms,
    claim,
    free_at_ns,
    given_back,
    may_act_until_ns,
    next_look_ns,
    renew_at_ns,
    sight,
)
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.flow.tenure import Tenure

log = logging.getLogger(__name__)

OVERDUE_NS = 30 * SECOND_NS  # a round takes at most three requests of 1.5 s each
BLIND_NS = 10 * SECOND_NS  # who stands by and has not seen the Lease for so long could not take over in time
RELEASE_S = 1.0


class LeaseStore(Protocol):
    """Where the Lease is: adapters.lease.Leases."""

    @property
    def reference(self) -> str:
        """NAMESPACE/NAME."""
        ...

    async def read(self) -> Lease | None:
        """The Lease as it is now."""
        ...

    async def write(self, lease: Lease) -> Lease | None:
        """Write over the very version that was read, or create; None where somebody was faster."""
        ...


class Election:
    """One candidate, `me`, whose name no other process has ever had."""

    def __init__(
        self,
        store: LeaseStore,
        tenure: Tenure,
        me: str,
        terms: Terms = Terms(),  # noqa: B008 - frozen
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
        standstill: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`standstill` tells in words that the holder does nothing any more: then nothing is renewed for it."""
        self.won = asyncio.Event()
        self._store = store
        self._tenure = tenure
        self._me = me
        self._terms = terms
        self._clock_ns = clock_ns
        self._wait = wait
        self._standstill = standstill
        self._sighting: Sighting | None = None
        self._told_holder = ""
        self._until_ns = 0
        self._heard_ns = self._ticked_ns = clock_ns()
        self._failure = ""

    async def run(self) -> Problem:
        """Stand by until the Lease is ours (`won`), then keep it; returns why it was lost."""
        log.info("LeaseAwaited: %s stands by for the lease %s.", self._me, self._store.reference)
        held, sent_ns = await self._stand_by()
        self._grant(sent_ns)
        log.info("LeaseHeld: %s holds the lease %s and acts.", self._me, self._store.reference)
        self.won.set()
        lost = await self._hold(held, sent_ns)
        self._tenure.close()
        return lost

    async def release(self) -> bool:
        """Give the Lease back, so that the next one need not wait; only when `run` has ended and nothing is written.

        Reads it first: a renewal that was cut off may have been written all the same.
        """
        try:
            async with asyncio.timeout(RELEASE_S):
                lease = await self._store.read()
                if lease is None or lease.holder != self._me:
                    return False
                return await self._store.write(given_back(lease, stamp())) is not None
        except (Refused, Unreachable, TimeoutError) as problem:
            log.warning("The lease %s could not be given back: %s", self._store.reference, problem)
            return False

    def overdue(self) -> str | None:
        """A sentence when the loop has not come round for too long: it hangs, for a round never takes so long."""
        age_ns = self._clock_ns() - self._ticked_ns
        if age_ns <= OVERDUE_NS:
            return None
        return f"The last look at the lease {self._store.reference} was {age_ns // SECOND_NS} s ago."

    def blind(self) -> str | None:
        """A sentence when this process has not seen the Lease for so long that it could not take over."""
        age_ns = self._clock_ns() - self._heard_ns
        if self._sighting is not None and age_ns <= BLIND_NS:
            return None
        why = f": {self._failure}" if self._failure else ""
        return f"The lease {self._store.reference} has not been read for {age_ns // SECOND_NS} s{why}"

    async def _stand_by(self) -> tuple[Lease, int]:
        while True:
            try:
                async with asyncio.timeout(self._terms.attempt_ns / SECOND_NS):
                    taken = await self._try()
                self._well()
                if taken is not None:
                    return taken
            except (Refused, Unreachable, TimeoutError) as problem:
                self._unwell(problem)
            await self._sleep_until(next_look_ns(self._sighting, self._terms, self._clock_ns()))

    async def _try(self) -> tuple[Lease, int] | None:
        lease = await self._store.read()
        if lease is not None:
            self._sighting = sight(self._sighting, lease, self._clock_ns())
        # A Lease that was deleted is one that was seen: its holder acts on, and makes it again at its next renewal.
        if self._is_held_by_another():
            self._tell_holder()
            return None
        sent_ns = self._clock_ns()
        held = await self._store.write(claim(lease, self._me, self._terms, stamp()))
        return None if held is None else (held, sent_ns)

    def _tell_holder(self) -> None:
        """Once for each holder: the log of who stands by says whose log has the rest."""
        if self._sighting is not None and self._told_holder != self._sighting.lease.holder:
            self._told_holder = self._sighting.lease.holder
            log.info("LeaseAwaited: %s stands by; %s holds %s.", self._me, self._told_holder, self._store.reference)

    def _is_held_by_another(self) -> bool:
        # Ours already, where a claim of ours was written and its answer lost: nobody else has ever had this name.
        seen = self._sighting
        return seen is not None and seen.lease.holder != self._me and free_at_ns(seen) > self._clock_ns()

    async def _hold(self, held: Lease, sent_ns: int) -> Problem:
        failed_ns: int | None = None
        while True:
            await self._sleep_until(min(renew_at_ns(sent_ns, failed_ns, self._terms), self._until_ns))
            now_ns = self._clock_ns()
            if now_ns >= self._until_ns or self._tenure.over():
                return self._not_renewed(now_ns - sent_ns)
            if (why := self._standstill()) is not None:
                self._failure = why
                return self._not_renewed(now_ns - sent_ns)
            try:
                async with asyncio.timeout((self._until_ns - now_ns) / SECOND_NS):
                    renewed = await self._renewed(claim(held, self._me, self._terms, stamp()))
                    if renewed is None:
                        current = await self._store.read()
                        if current is not None and current.holder != self._me:
                            return self._taken(current)
                        # Deleted, annotated by somebody, or written by a request of ours whose answer was lost: once
                        # more, over what there is now. Without a version it is created.
                        held = claim(current, self._me, self._terms, stamp()) if current else _unversioned(held)
                        failed_ns = self._clock_ns() - self._terms.retry_every_ns
                        continue
            except (Refused, Unreachable, TimeoutError) as problem:
                self._unwell(problem)
                failed_ns = self._clock_ns()
                continue
            self._well()
            held, sent_ns, failed_ns = renewed, now_ns, None
            self._grant(sent_ns)

    async def _renewed(self, wanted: Lease) -> Lease | None:
        """Write it as often as it takes. An answer that is late may still come, so it is waited for; its connection may
        be dead, so it is written once more beside it. Whichever comes second finds another version and brings None;
        whose that version is, the Lease says."""
        loop, tries = asyncio.get_running_loop(), set[asyncio.Task[Lease | None]]()
        attempt_s, retry_s = self._terms.attempt_ns / SECOND_NS, self._terms.retry_every_ns / SECOND_NS
        send_s = loop.time()
        try:
            while True:
                if loop.time() >= send_s:
                    tries.add(asyncio.create_task(self._store.write(wanted)))
                    send_s = loop.time() + attempt_s
                ended, tries = await asyncio.wait(
                    tries, timeout=send_s - loop.time(), return_when=asyncio.FIRST_COMPLETED
                )
                for each in sorted(ended, key=lambda one: one.exception() is not None):
                    if (failure := each.exception()) is None or not tries:
                        return each.result()  # or raises what kept the last of them from being answered
                    send_s = min(send_s, loop.time() + retry_s)
                    self._unwell(failure)
                if not ended:
                    self._unwell(TimeoutError())
        finally:
            for each in tries:
                each.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    def _grant(self, sent_ns: int) -> None:
        self._until_ns = may_act_until_ns(sent_ns, self._terms)
        self._tenure.extend(self._until_ns)

    def _taken(self, current: Lease) -> Problem:
        by = f"is held by {current.holder}" if current.holder else "was given back"
        return Problem(
            "LeaseTaken",
            f"The lease {self._store.reference} {by} since {current.renewed}, not by this operator ({self._me}), which "
            "therefore ends at once and stands by when it is started again.",
        )

    def _not_renewed(self, since_ns: int) -> Problem:
        why = self._failure or "the process did not run"
        return Problem(
            "LeaseNotRenewed",
            f"The lease {self._store.reference} could not be renewed for {since_ns / SECOND_NS:.1f} s ({why}). This "
            f"operator ({self._me}) ends before another one may begin, and stands by when it is started again.",
        )

    def _well(self) -> None:
        self._ticked_ns = self._heard_ns = self._clock_ns()
        if self._failure:
            log.info("The lease %s can be reached again.", self._store.reference)
            self._failure = ""

    def _unwell(self, problem: BaseException) -> None:
        said = str(problem) or f"no answer within {self._terms.attempt_ns / SECOND_NS:g} s"
        if not self._failure:  # once: who stands by asks twice a second
            log.warning("The lease %s cannot be reached: %s", self._store.reference, said)
        self._failure = said
        self._ticked_ns = self._clock_ns()

    async def _sleep_until(self, at_ns: int) -> None:
        await self._wait(max(0, at_ns - self._clock_ns()) / SECOND_NS)


def _unversioned(lease: Lease) -> Lease:
    return Lease(lease.holder, lease.duration_s, lease.acquired, lease.renewed, lease.transitions)
