"""Decides what shares the next step: running sequences first, then prompts in chunks under a token budget.

Owns who runs and who waits, and what happens when the cache is full. Knows no torch and no clock; whose blocks hold
what is the cache's business (engine.blocks), and which tenant goes first is a matter of engine.fairness.

Whoever goes first by fairness and finds no room waits for it, and nobody overtakes: those who run end in bounded time,
and everyone who is let past would put that off. A running sequence that needs a block when none is left takes it from
the newest sequence of the tenant that was served most, never from the oldest sequence of all: so there is always one
that comes to its end, whoever fills the cache pays in delay, and what was lost is computed again at the platform's
cost.
"""

from dataclasses import dataclass

from gpumeter_worker.engine.blocks import KvBlocks
from gpumeter_worker.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, Lines
from gpumeter_worker.engine.sequence import Sequence

_CHUNK_TOKENS_MIN = 16
"""A smaller piece of a prompt is not worth cutting off for another prompt's sake."""


_BACKLOG_STEPS = 32
"""A backlog of prompts is worked off in about so many steps, whatever running streams would like: one prompt does not
hold them up, but a crowd of them is not served one drop at a time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`sequences` run at once; a step computes at most `step_tokens` tokens; at most `waiting` sequences wait.

    `mixed_prefill_tokens`: how many prompt tokens may share a step with decodes, so that a running stream's next token
    does not wait for a whole prompt; 0: as many as the step has room for. Where so many prompts wait that a step with
    more of them is worth it to all, it may hold more; where more prompts wait for their first token than streams for
    their next one, it holds what it can.
    """

    sequences: int
    step_tokens: int
    mixed_prefill_tokens: int = 0
    waiting: int = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """`count` tokens of a sequence, from `sequence.computed` on. `samples`: the last of them yields a new token.

    `recompute`: they were computed before and lost by a preemption.
    """

    sequence: Sequence
    count: int
    samples: bool
    prefill: bool
    recompute: bool = False


class Scheduler:
    """Continuous batching: every step takes each running sequence one token further and fills up with prompt chunks."""

    def __init__(self, limits: Limits, blocks: KvBlocks) -> None:
        if limits.sequences < 1 or limits.step_tokens < limits.sequences:
            raise ValueError("a step must have room for one token of every running sequence")
        self._limits = limits
        self._blocks = blocks
        self._lines = Lines()
        self._arrivals = 0
        self._sessions: dict[str, list[Sequence]] = {}
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._decodes: dict[Sequence, Work] = {}
        self._decode_order: list[Work] | None = []  # None: who decodes has changed
        self._failed: list[tuple[Sequence, str]] = []

    @property
    def waiting(self) -> int:
        """How many sequences have no place in the cache: not yet, or not any more."""
        return len(self._lines)

    @property
    def running(self) -> int:
        """How many sequences have a place in the cache."""
        return len(self._running)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the cache that running sequences use."""
        return self._blocks.used_tokens

    def add(self, sequence: Sequence) -> None:
        """It waits from now on, or is among those that `take_failed` gives when too many wait already."""
        if len(self._lines) >= self._limits.waiting:
            self._failed.append((sequence, f"{self._limits.waiting} sequences wait already; try again later"))
            return
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sessions.setdefault(sequence.session_id, []).append(sequence)
        self._lines.enter(sequence)

    def of_session(self, session_id: str) -> list[Sequence]:
        """The sequences of a session that have not ended, in the order in which they came."""
        return self._sessions.get(session_id, [])

    def plan(self) -> list[Work]:
        """What the next step computes, decodes first; empty when there is nothing to do."""
        self._make_room()
        decodes = self._ordered_decodes()
        room = self._limits.step_tokens - len(decodes)
        if self._limits.mixed_prefill_tokens and self._prompts() <= len(decodes):
            room = min(room, max(self._limits.mixed_prefill_tokens, self._backlog() // _BACKLOG_STEPS))
        plan = decodes + self._prefill(room)
        for work in plan:
            if work.samples:
                self._lines.charge(work.sequence.tenant, OUTPUT_WEIGHT)
        return plan

    def _prompts(self) -> int:
        """Prompts that a step could work on: those of running sequences, and of as many others as have a place."""
        return len(self._prefilling) + self._places()

    def _places(self) -> int:
        return min(len(self._lines), self._limits.sequences - len(self._running))

    def _backlog(self) -> int:
        """Prompt tokens of these that are still to be computed."""
        waiting, places = len(self._lines), self._places()
        others = self._lines.waiting_tokens * places // waiting if waiting else 0
        return sum(map(_left, self._prefilling)) + others

    def take_failed(self) -> list[tuple[Sequence, str]]:
        """Sequences that can never run, each with a sentence that says why. They have left already."""
        failed, self._failed = self._failed, []
        return failed

    def computed(self, sequence: Sequence) -> None:
        """A step has moved this sequence on."""
        self._blocks.computed(sequence)
        if sequence in self._prefilling and not sequence.prefilling:
            del self._prefilling[sequence]
            self._computes_no_prompt(sequence)
            self._decode_from_now_on(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        self._distrust(sequence)
        self._stop(sequence)
        self._forget(sequence)

    def cancel(self, session_id: str, choice: int | None) -> list[Sequence]:
        """Take a session's sequences out, or one of them, wherever they are; those that were still here."""
        gone = [one for one in self.of_session(session_id) if choice in (None, one.choice)]
        for sequence in gone:
            if sequence in self._running:
                self._distrust(sequence)
                self._stop(sequence)
            else:
                self._lines.take(sequence)
            self._forget(sequence)
        return gone

    def _ordered_decodes(self) -> list[Work]:
        """Neighbours in the cache are read without being gathered first."""
        if self._decode_order is None:
            self._decode_order = sorted(self._decodes.values(), key=lambda work: work.sequence.blocks[0])
        return self._decode_order

    def _make_room(self) -> None:
        """A place in the cache for every decode's next token, whoever has to go for it.

        Whoever goes is not back in this step: `admit` wants as many blocks as it had, and one for each that runs.
        """
        grow = self._blocks.grow
        short = [work.sequence for work in self._ordered_decodes() if not grow(work.sequence, 1)]
        for sequence in sorted(short, key=_arrival):
            while sequence in self._running and not grow(sequence, 1):
                if sequence.computed >= self._blocks.longest or len(self._running) == 1:
                    self.leave(sequence)
                    self._fail(sequence)
                else:
                    self._preempt(self._victim())

    def _victim(self) -> Sequence:
        oldest = min(self._running, key=_arrival)
        return max(
            (one for one in self._running if one is not oldest),
            key=lambda one: (self._lines.served(one.tenant), one.arrival),
        )

    def _preempt(self, sequence: Sequence) -> None:
        # It was in the step it was admitted for, so a report has said what it found and computed: all of that is lost.
        sequence.recompute_until = max(sequence.recompute_until, sequence.computed)
        self._stop(sequence)
        sequence.computed = 0
        self._lines.put_back(sequence)

    def _prefill(self, room: int) -> list[Work]:
        """Share out the step's room for prompts.

        The oldest prompt gets up to half of it and so is done in bounded time; then come the shortest, so that short
        ones do not queue behind long ones, each with up to half of what is left; then those who wait, the same way.
        What is left after that goes to whoever needs the least to be done.
        """
        counts: dict[Sequence, int] = {}
        line = sorted(self._prefilling, key=_left)
        if len(line) > 1:
            oldest = min(line, key=_arrival)
            line.remove(oldest)
            line.insert(0, oldest)
        for place, sequence in enumerate(line):
            if not room:
                break
            last = place + 1 == len(line) and not self._lines
            counts[sequence] = _piece(sequence, room, last=last)
            room -= counts[sequence]
        while room and len(self._running) < self._limits.sequences and (newcomer := self._admit()):
            counts[newcomer] = _piece(newcomer, room, last=not self._lines)
            room -= counts[newcomer]
        for sequence in sorted(counts, key=_left) if room else ():
            more = min(_chunk(sequence) - counts[sequence], room)
            counts[sequence] += more
            room -= more
        works = [self._work(sequence, count) for sequence, count in counts.items()]
        works.sort(key=_prefills)  # one that found all that a preemption took from it decodes at once
        return works

    def _work(self, sequence: Sequence, count: int) -> Work:
        if not sequence.prefilling:
            return self._decodes[sequence]
        end = sequence.computed + count
        recompute = end <= sequence.recompute_until
        return Work(
            sequence, count, samples=end == sequence.prompt_length and not recompute, prefill=True, recompute=recompute
        )

    def _admit(self) -> Sequence | None:
        """Give whoever goes first a place in the cache; None: nobody waits, or there is no room."""
        while sequence := self._lines.first(_held):
            if len(sequence.tokens) > self._blocks.longest:
                self._lines.take(sequence)
                self._forget(sequence)
                self._fail(sequence)
                continue
            if not self._blocks.admit(sequence):
                return None
            self._lines.take(sequence)
            self._running[sequence] = None
            self._lines.charge(sequence.tenant, PROMPT_WEIGHT * _unserved(sequence))
            if not sequence.prefilling:
                self._decode_from_now_on(sequence)
                return sequence
            self._prefilling[sequence] = None
            if self._blocks.finds_prefixes and _worth_waiting_for(sequence, self._blocks.unit_tokens):
                sequence.prompt.computing = sequence
            return sequence
        return None

    def _decode_from_now_on(self, sequence: Sequence) -> None:
        self._decodes[sequence] = Work(sequence, 1, samples=True, prefill=False)
        self._decode_order = None

    def _stop(self, sequence: Sequence) -> None:
        """It runs no longer; its place in the cache is free."""
        del self._running[sequence]
        if self._decodes.pop(sequence, None) is not None:
            self._decode_order = None
        self._prefilling.pop(sequence, None)
        self._computes_no_prompt(sequence)
        self._lines.charge(sequence.tenant, -PROMPT_WEIGHT * _unserved(sequence))
        self._blocks.release(sequence)

    def _distrust(self, sequence: Sequence) -> None:
        """Nobody finds what a sequence computed that was given no token: whether it is numbers shows only then."""
        if not sequence.generated:
            self._blocks.discard(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """It has ended, and is neither running nor waiting."""
        self._lines.exit(sequence)
        of_session = self._sessions[sequence.session_id]
        of_session.remove(sequence)
        if not of_session:
            del self._sessions[sequence.session_id]

    def _fail(self, sequence: Sequence) -> None:
        self._failed.append(
            (
                sequence,
                f"the request has come to {len(sequence.tokens)} tokens and the cache holds {self._blocks.longest}; "
                "ask for fewer tokens, or give the worker more memory",
            )
        )

    @staticmethod
    def _computes_no_prompt(sequence: Sequence) -> None:
        if sequence.prompt.computing is sequence:
            sequence.prompt.computing = None


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _prefills(work: Work) -> bool:
    return work.prefill


def _held(sequence: Sequence) -> bool:
    """Choices of one prompt wait until the first one has computed it, and then find it in the cache."""
    return sequence.prompt.computing is not None


def _worth_waiting_for(sequence: Sequence, unit_tokens: int) -> bool:
    """Whether it computes a whole unit of its prompt that another choice would find."""
    return (sequence.prompt_length - 1) // unit_tokens * unit_tokens > sequence.computed


def _left(sequence: Sequence) -> int:
    return max(sequence.prompt_length, sequence.recompute_until) - sequence.computed


def _unserved(sequence: Sequence) -> int:
    """Prompt tokens that are computed for the tenant: what was found or computed before is no service."""
    return max(0, sequence.prompt_length - max(sequence.computed, sequence.recompute_until))


def _chunk(sequence: Sequence) -> int:
    """The most that one work may hold: the end of what is recomputed, or of the prompt."""
    if sequence.computed < sequence.recompute_until:
        return sequence.recompute_until - sequence.computed
    return max(1, sequence.prompt_length - sequence.computed)


def _piece(sequence: Sequence, room: int, *, last: bool) -> int:
    return min(_chunk(sequence), room if last else max(room // 2, min(room, _CHUNK_TOKENS_MIN)))
