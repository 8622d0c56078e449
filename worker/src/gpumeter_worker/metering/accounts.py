"""Where every nanosecond of the worker's life belongs: the partition of time among accounts.

Owns the state machine that is in exactly one account at a time, and the cut at every UTC minute. Does not know whose
step it was, how a step is split, or where records go. All times are the worker's own line of UTC nanoseconds (see
metering.clock.Anchor); the clock is always an argument.

The frontier rule: time up to the frontier is booked and never changes. While no session is in flight the frontier can
follow the clock; while one is, it stands at the end of the last finished step, because a step that is not yet reported
may own what came after. Where that step's report never comes, the frontier passes its time and no account gets it: it
was not measured, no record states it, and the ledger finds it as `unaccounted`.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from gpumeter_usage.period import next_minute_edge_ns
from gpumeter_usage.record import Account


class Phase(StrEnum):
    """What the worker is doing apart from its sessions' steps."""

    INIT = "init"
    LOAD = "load"
    WARMUP = "warmup"
    SERVING = "serving"
    DRAIN = "drain"


_OWN_ACCOUNT = {
    Phase.INIT: Account.INIT,
    Phase.LOAD: Account.LOAD,
    Phase.WARMUP: Account.WARMUP,
    Phase.DRAIN: Account.DRAIN,
}


@dataclass(slots=True)
class Segment:
    """The accounts of one stretch of time, which never crosses a UTC minute edge."""

    started_ns: int
    ended_ns: int = 0
    sums_ns: dict[Account, int] = field(default_factory=dict)

    def add(self, account: Account, duration_ns: int) -> None:
        """Book a duration; nothing is booked twice and nothing negative."""
        if duration_ns < 0:
            raise ValueError(f"{duration_ns} ns cannot be booked to {account}")
        if duration_ns:
            self.sums_ns[account] = self.sums_ns.get(account, 0) + duration_ns


class Accounts:
    """The partition of time from the process's start up to the frontier. Methods return the segments they closed.

    There is one line of time for all `devices` of the worker, and each nanosecond of it counts once for each of them:
    they load, compute and wait together. So what is booked is device-nanoseconds, and the sum of `totals_ns` and
    `unmeasured_ns` is the time from `started_ns` to `frontier_ns` times `devices`, always.
    """

    def __init__(self, started_ns: int, devices: int = 1) -> None:
        self.started_ns = started_ns
        self.devices = devices
        self.frontier_ns = started_ns
        self.in_flight = 0
        self.totals_ns: dict[Account, int] = dict.fromkeys(Account, 0)
        self.unmeasured_ns = 0
        self._phase = Phase.INIT
        self._coming: deque[tuple[int, Phase]] = deque()  # phases that begin after the frontier
        self._open = Segment(started_ns)

    @property
    def phase(self) -> Phase:
        """The phase in force at the latest time that the accounts heard of."""
        return self._coming[-1][1] if self._coming else self._phase

    def enter(self, phase: Phase, at_ns: int) -> list[Segment]:
        """From `at_ns` on, time that no step owns belongs to this phase's account."""
        self._coming.append((max(at_ns, self.frontier_ns), phase))
        return self.catch_up(at_ns)

    def begin(self, at_ns: int) -> list[Segment]:
        """A session is now in flight."""
        closed = self.catch_up(at_ns)
        self.in_flight += 1
        return closed

    def end(self, at_ns: int) -> list[Segment]:
        """A session left, and the engine has promised that no later step holds it."""
        if self.in_flight == 0:
            raise ValueError("a session ended that was not in flight")
        closed = self._advance(at_ns) if self.in_flight == 1 else []
        self.in_flight -= 1
        return closed

    def catch_up(self, at_ns: int) -> list[Segment]:
        """Book the time up to now, if nothing is in flight that may still claim it."""
        return [] if self.in_flight else self._advance(at_ns)

    def step(self, started_ns: int, ended_ns: int, gpu_ns: int) -> tuple[int, list[Segment]]:
        """Make room for a finished step: returns the device-nanoseconds that its sessions are to be booked for.

        That is `gpu_ns` on every device, unless it is longer than the time since the frontier: two clocks differ by
        parts per million, and no second may be sold twice. A step belongs to the minute of its end. The caller books
        the time by `own`. Raises ValueError, and changes nothing, for a negative time.
        """
        if gpu_ns < 0:
            raise ValueError(f"a step of {gpu_ns} ns cannot be booked")
        closed = self._advance(started_ns)
        gap_from_ns = self.frontier_ns
        closed += self._advance(ended_ns, book=False)
        span_ns = max(0, ended_ns - gap_from_ns)
        taken_ns = min(gpu_ns, span_ns)
        self._book(self._account(), (span_ns - taken_ns) * self.devices)
        return taken_ns * self.devices, closed

    def own(self, attributed_ns: int, nonbillable_ns: int = 0) -> None:
        """Book what `step` returned to its sessions; what no session owns is the platform's."""
        self._book(Account.ATTRIBUTED, attributed_ns)
        self._book(Account.NONBILLABLE, nonbillable_ns)

    def lose(self, at_ns: int) -> list[Segment]:
        """What ran is lost at `at_ns`, with the report of a step that may have begun any time since the frontier.

        Nobody can say how much of that time was the step's and how much a gap, so it is booked to nobody. Without a
        session in flight nothing ran.
        """
        if not self.in_flight:
            return self.catch_up(at_ns)
        from_ns = self.frontier_ns
        closed = self._advance(at_ns, book=False)
        self.unmeasured_ns += (self.frontier_ns - from_ns) * self.devices
        return closed

    def cut(self) -> list[Segment]:
        """Close the open segment at the frontier, if it holds anything."""
        if self.frontier_ns == self._open.started_ns and not self._open.sums_ns:
            return []
        return [self._close(self.frontier_ns)]

    def _advance(self, to_ns: int, *, book: bool = True) -> list[Segment]:
        """Move the frontier, minute by minute and phase by phase. Time never runs backwards: an older time is now."""
        closed: list[Segment] = []
        while self.frontier_ns < to_ns or (self._coming and self._coming[0][0] <= self.frontier_ns):
            while self._coming and self._coming[0][0] <= self.frontier_ns:
                self._phase = self._coming.popleft()[1]
            if self.frontier_ns >= to_ns:
                break
            # An edge is closed by whatever ends after it, so that what ends exactly on it belongs to its minute.
            edge_ns = next_minute_edge_ns(self._open.started_ns)
            if self.frontier_ns == edge_ns:
                closed.append(self._close(edge_ns))
                continue
            until_ns = min(to_ns, edge_ns)
            if self._coming:
                until_ns = min(until_ns, self._coming[0][0])
            if book:
                self._book(self._account(), (until_ns - self.frontier_ns) * self.devices)
            self.frontier_ns = until_ns
        return closed

    def _account(self) -> Account:
        if self._phase is Phase.SERVING:
            return Account.HOST_GAP if self.in_flight else Account.IDLE
        return _OWN_ACCOUNT[self._phase]

    def _book(self, account: Account, duration_ns: int) -> None:
        self._open.add(account, duration_ns)
        self.totals_ns[account] += duration_ns

    def _close(self, at_ns: int) -> Segment:
        segment, self._open = self._open, Segment(at_ns)
        segment.ended_ns = at_ns
        return segment
