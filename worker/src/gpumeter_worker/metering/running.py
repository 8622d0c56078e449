"""What runs and is in no record yet: sessions, their slices, and stretches of steps that are alike.

Owns how a step adds to slices, one row at a time or a whole stretch at once; both come to the same numbers. Knows
neither accounts nor records. Times are the worker's UTC nanoseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import add

from gpumeter_usage.apportion import largest_remainder
from gpumeter_usage.record import Status
from gpumeter_worker.metering.attribution import Profile, of_a_context_token, weights
from gpumeter_worker.metering.parts import Onward, all_decode


@dataclass(slots=True)
class Totals:
    """What a session has used so far."""

    gpu_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Held:
    """A session's place in the cache: when a step last held it, and the byte-nanoseconds that no slice states yet.

    `step` is the number of that step, and `gap_ns` how long before it the cache was held without one.
    """

    until_ns: int = 0
    byte_ns: int = 0
    step: int = 0
    gap_ns: int = 0


class Ends:
    """When each of a session's sequences was last in a step, told apart by how many tokens it then had in the cache.

    Sequences of the same length are alike: whichever of them a step takes, the gaps of both together come to the same.
    One that ended or lost its cache leaves its end behind; the latest end is taken first, so nothing held is too much.
    """

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at: dict[int, list[int]] = {}

    def take(self, tokens: int) -> int:
        """The end of the latest step that left a sequence with so many tokens; 0 where there was none."""
        ends = self._at.get(tokens)
        if not ends:
            return 0
        if len(ends) == 1:
            del self._at[tokens]
        return ends.pop()

    def put(self, tokens: int, ended_ns: int) -> None:
        """A step left a sequence with so many tokens. Steps come in order, and what one takes comes before."""
        self._at.setdefault(tokens, []).append(ended_ns)


@dataclass(slots=True)
class Session:
    """A session in flight."""

    tenant: str
    since_ns: int
    """Where the next slice starts: the session's begin, then the end of the slice before."""
    totals: Totals = field(default_factory=Totals)
    held: Held = field(default_factory=Held)
    billed_step: int = 0
    """The number of the step that last took part in a slice."""
    ends: Ends | None = None
    """Of its sequences, where it has several; `held` knows of one."""


@dataclass(slots=True)
class Slice:
    """What a session used since its last record."""

    session_id: str
    tenant: str
    started_ns: int
    ended_ns: int
    held: Held
    status: Status = Status.OPEN
    gpu_ns: int = 0
    prefill_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    batch_ns: int = 0


class Stretch:
    """Steps one after another of the same sequences, each a token further: summed here, booked to slices at its end.

    A step then costs its split and a sum; what all rows have in common is counted once. Of the cache, a row of c tokens
    of context holds c for the gap before its k-th step and c + 1 while it runs, each k tokens more; over the stretch
    that is c times all of the time and a sum that is the same for every row.
    """

    def __init__(self, rows: list[tuple[Session, Slice]], onward: Onward, profile: Profile, ended_ns: int) -> None:
        """`ended_ns`: when the step before this stretch did, which was of the same sequences."""
        self._rows = rows
        self._first = onward.first
        self._contexts = [part.context_tokens for part in onward.first]
        self._further = self._before = onward.further - 1
        self._weights = weights([(1, context + self._further) for context in self._contexts], profile)
        self._grows = of_a_context_token(len(rows), profile)
        self._gpu_ns = [0] * len(rows)
        self._steps = 0
        self._ended_ns = ended_ns
        self._frontier_ns = 0
        self._lasted_ns = 0
        self._further_ns = 0

    def continues(self, onward: Onward) -> bool:
        """Whether this is the step after the stretch's last one."""
        return onward.first is self._first and onward.further == self._further + 1

    def split(self, booked_ns: int) -> list[int]:
        """Each row's share of the next step; they sum to `booked_ns` exactly."""
        return largest_remainder(booked_ns, [weight + self._grows for weight in self._weights])

    def take(self, started_ns: int, ended_ns: int, frontier_ns: int, shares_ns: Sequence[int]) -> None:
        """The next step, as it was split."""
        self._further += 1
        self._steps += 1
        self._weights = [weight + self._grows for weight in self._weights]
        self._gpu_ns = list(map(add, self._gpu_ns, shares_ns))
        gap_ns, lasted_ns = max(0, started_ns - self._ended_ns), max(0, ended_ns - started_ns)
        self._lasted_ns += gap_ns + lasted_ns
        self._further_ns += self._further * gap_ns + (self._further + 1) * lasted_ns
        self._ended_ns, self._frontier_ns = ended_ns, frontier_ns

    def book(self, number: int, kv_token_bytes: int) -> None:
        """Add it all to the slices. `number`: of its last step."""
        if not self._steps:
            return
        batch, steps = len(self._rows), self._steps
        for (session, _), context_tokens in zip(self._rows, self._contexts, strict=True):
            if session.ends is not None:
                session.ends.take(context_tokens + self._before + 1)
        for (session, running), context_tokens, gpu_ns in zip(self._rows, self._contexts, self._gpu_ns, strict=True):
            held = session.held
            held.step, held.until_ns = number, self._ended_ns
            if session.ends is not None:
                session.ends.put(context_tokens + self._further + 1, self._ended_ns)
            held.byte_ns += (context_tokens * self._lasted_ns + self._further_ns) * kv_token_bytes
            running.ended_ns = self._frontier_ns
            running.gpu_ns += gpu_ns
            running.batch_ns += gpu_ns * batch
            running.completion_tokens += steps
            if session.billed_step != number:  # its choices may share a step, which is one step of the session
                session.billed_step = number
                running.steps += steps


def stretch_after(
    onward: Onward, sessions: Mapping[str, Session], slices: Mapping[str, Slice], number: int, profile: Profile
) -> Stretch | None:
    """The stretch that this step begins, where all of its rows were booked by step `number`, the one before it.

    None where that is not so, and the step is to be booked row by row.
    """
    if not onward.first or not all_decode(onward.first):
        return None
    rows = []
    for part in onward.first:
        session, running = sessions.get(part.session_id), slices.get(part.session_id)
        if session is None or running is None or session.billed_step != number:
            return None
        rows.append((session, running))
    return Stretch(rows, onward, profile, rows[0][0].held.until_ns)


def sum_up(totals: Totals, complete: Slice) -> None:
    """A step adds to the running slice alone; a session's totals grow by slices that are complete."""
    totals.gpu_ns += complete.gpu_ns
    totals.prompt_tokens += complete.prompt_tokens
    totals.cached_tokens += complete.cached_tokens
    totals.completion_tokens += complete.completion_tokens
