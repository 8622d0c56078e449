"""The engine's turn: schedule, run, postprocess, and report each step once its time is known.

Owns the order of events: a step's report comes before the end of any session that was in it. Knows no torch (the
runner does) and no channel.
"""

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol

from gpumeter_worker.engine.blocks import Copy, KvBlocks, SlotBlocks
from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit, Token
from gpumeter_worker.engine.scheduler import Limits, Scheduler, Work
from gpumeter_worker.engine.sequence import Finish, Prompt, Sequence, finish_after
from gpumeter_worker.metering.clock import StepClock
from gpumeter_worker.metering.parts import Onward, Part, all_decode

INVALID_TOKEN = -1
"""What a runner returns for a row whose logits are no numbers."""


_AHEAD_STEPS_MAX = 2
"""A device that has the next step at hand is busy. What stands behind that one could not be cancelled any more."""

_NO_PROBABILITIES = "the model gave no valid probabilities for this request"


class Sampled(NamedTuple):
    """A new token. `top` holds the likeliest ones with their natural log probabilities, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Runner(Protocol):
    """Runs a planned step on the device, between the clock's begin and end."""

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        """One new token for every work that samples, in the plan's order."""

    def copy(self, copies: Row[Copy]) -> None:
        """Copy keys and values between blocks of the cache, one after the other, before the next step."""


@dataclass(slots=True)
class _Unreported:
    """A step whose time is not known yet, and the sessions that ended since it was launched."""

    parts: tuple[Part, ...] | Onward
    tokens: tuple[Token, ...]
    running: int
    kv_tokens: int
    ended: list[Ended] = field(default_factory=list)


class Engine:
    """The state of one engine process. Without `blocks` the cache has a slot for each sequence and finds nothing."""

    def __init__(  # noqa: PLR0917
        self,
        runner: Runner,
        clock: StepClock,
        limits: Limits,
        eos_ids: frozenset[int],
        max_length: int,
        blocks: KvBlocks | None = None,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._blocks = blocks or SlotBlocks(limits.sequences, max_length, prefix=False)
        self._scheduler = Scheduler(limits, self._blocks)
        self._eos_ids = eos_ids
        self._max_length = max_length
        self._unreported: deque[_Unreported] = deque()
        self._ended: list[Ended] = []
        self._attempted: list[Work] = []
        self._steady: tuple[list[Work], Onward] | None = None

    @property
    def waiting(self) -> int:
        """Sequences that have no place in the cache."""
        return self._scheduler.waiting

    @property
    def busy(self) -> bool:
        """Whether another turn has something to do."""
        return bool(self.started or self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Sequences that have a place in the cache."""
        return self._scheduler.running

    @property
    def started(self) -> bool:
        """Whether anything but waiting sequences is left to do."""
        return bool(self._scheduler.running or self._unreported or self._ended)

    @property
    def stepping(self) -> bool:
        """Whether the next turn runs a step: there is work, and the device has not come too far behind."""
        return len(self._unreported) < _AHEAD_STEPS_MAX and bool(self._scheduler.waiting or self._scheduler.running)

    def submit(self, command: Submit) -> None:
        """A request that the API process admitted. One that cannot be run is answered with its end."""
        length = len(command.prompt)
        sequence = Sequence(
            session_id=command.session_id,
            choice=command.choice,
            tenant=command.tenant,
            tokens=list(command.prompt),
            prompt_length=length,
            sampling=command.sampling,
            random=Random(command.sampling.seed),
            prompt=self._prompt(command),
        )
        if 0 < length <= self._max_length:
            self._scheduler.add(sequence)
        else:
            message = f"a prompt of {length} tokens cannot be run; it must have 1 to {self._max_length}"
            self._end(sequence, Finish.FAILED, message)

    def cancel(self, command: Cancel) -> None:
        """Takes effect before the next step; what has ended already has said so."""
        for sequence in self._scheduler.cancel(command.session_id, command.choice):
            self._end(sequence, Finish.CANCELLED)

    def turn(self) -> list[Event]:
        """Run one step if there is work, and report whatever is known to be finished.

        Nothing is launched while two steps are not known to be finished. A chunk of a prompt that samples nothing is
        never waited for, so a long prompt would be launched whole, and nobody could cancel it or come in between.
        """
        plan = self._scheduler.plan() if len(self._unreported) < _AHEAD_STEPS_MAX else []
        for sequence, message in self._scheduler.take_failed():
            self._end(sequence, Finish.FAILED, message)
        if plan:
            if copies := self._blocks.take_copies():
                self._runner.copy(copies)
            self._attempted = plan
            begun = self._clock.begun
            try:
                sampled = self._runner.run(plan, self._clock)
            except Exception:
                self._steady = None
                if self._clock.begun > begun:
                    self._book_failed(plan)
                raise
            self._attempted = []
            self._postprocess(plan, sampled)
        return self._report()

    def shed(self, message: str) -> list[Event] | None:
        """After a turn whose step had too little memory: end whom it took in, or else its newest sequence.

        The others lose nothing, because a step moves nobody on before it has run; what it drew for them is drawn again.
        None when there was no such step and nobody was ended. Else what can be told already: an end that comes while
        the device is behind is told after the step that it is behind with.
        """
        attempted, self._attempted = self._attempted, []
        taken_in = [
            work.sequence for work in attempted if work.prefill and work.sequence.computed == work.sequence.cached
        ]
        newest = [work.sequence for work in sorted(attempted, key=lambda work: work.sequence.arrival)[-1:]]
        for sequence in taken_in or newest:
            self._scheduler.leave(sequence)
            self._end(sequence, Finish.FAILED, message)
        for work in attempted:
            _rewind(work.sequence)
        return self._report() if attempted else None

    def leave(self) -> list[Event]:
        """After the last turn: what no turn has reported, which waits for the device where it has a step."""
        if self._unreported:
            self._clock.abort()
        return self._report()

    def last_report(self) -> list[Event]:
        """After a turn that failed for good: the steps that are known to be finished. Nothing else may follow."""
        return self._report()

    def _prompt(self, command: Submit) -> Prompt:
        """What this choice has in common with those of its prompt that are still here."""
        if command.counts_prompt:
            return Prompt()
        for one in self._scheduler.of_session(command.session_id):
            if one.prompt_length == len(command.prompt) and one.tokens[: one.prompt_length] == command.prompt:
                return one.prompt
        return Prompt(settled=len(command.prompt))

    def _postprocess(self, plan: list[Work], sampled: list[Sampled]) -> None:
        parts = self._parts(plan, sampled)
        next_token = iter(sampled)
        tokens, finished = [], []
        for work in plan:
            sequence = work.sequence
            new = next(next_token) if work.samples else None
            sequence.computed += work.count
            sequence.cached = 0
            self._scheduler.computed(sequence)
            if new is None:
                continue
            if new.token == INVALID_TOKEN:
                self._blocks.discard(sequence)
                finished.append((sequence, Finish.FAILED))
                continue
            sequence.tokens.append(new.token)
            tokens.append(Token(sequence.session_id, sequence.choice, new.token, new.logprob, new.top))
            if finish := finish_after(sequence, self._eos_ids, self._max_length):
                finished.append((sequence, finish))
        running, kv_tokens = self._scheduler.running, self._scheduler.cache_tokens
        for sequence, _ in finished:
            self._scheduler.leave(sequence)
        self._unreported.append(_Unreported(parts, tuple(tokens), running, kv_tokens))
        for sequence, finish in finished:
            self._end(sequence, finish, _NO_PROBABILITIES if finish is Finish.FAILED else "")

    def _parts(self, plan: list[Work], sampled: list[Sampled]) -> tuple[Part, ...] | Onward:
        """Who shares a step that has moved nobody on yet. A step like the one before it is said in a word."""
        valid = all(new.token != INVALID_TOKEN for new in sampled)
        steady, self._steady = self._steady, None
        if steady is not None and valid and plan == steady[0]:
            onward = Onward(steady[1].first, steady[1].further + 1)
            self._steady = plan, onward
            return onward
        next_token = iter(sampled)
        parts = tuple(_settle(work, sampled=work.samples and next(next_token).token != INVALID_TOKEN) for work in plan)
        if valid and all_decode(parts):
            self._steady = plan, Onward(parts, 0)
        return parts

    def _book_failed(self, plan: list[Work]) -> None:
        """A step that failed after its first kernel, wherever: its time is the platform's as far as it was measured.

        Nobody gets anything of it, and whoever goes on does that work again. Every step that the clock is going to
        return stands in `_unreported`, so that later times are not given to the wrong steps.
        """
        if not self._clock.abort():
            return
        parts = tuple(
            Part(
                work.sequence.session_id,
                work.count,
                work.sequence.computed,
                work.prefill,
                sampled=0,
                recompute=True,
            )
            for work in plan
        )
        self._unreported.append(_Unreported(parts, (), self._scheduler.running, self._scheduler.cache_tokens))

    def _end(self, sequence: Sequence, finish: Finish, message: str = "") -> None:
        ended = Ended(sequence.session_id, finish, sequence.choice, message)
        (self._unreported[-1].ended if self._unreported else self._ended).append(ended)

    def _report(self) -> list[Event]:
        events: list[Event] = [*self._ended]
        self._ended = []
        for time in self._clock.harvest():
            step = self._unreported.popleft()
            events.append(
                StepReport(
                    time.started_ns,
                    time.ended_ns,
                    time.gpu_ns,
                    step.parts,
                    step.tokens,
                    step.running,
                    step.kv_tokens,
                    self._clock.drift_ppb,
                )
            )
            events += step.ended
        return events


def _rewind(sequence: Sequence) -> None:
    """Same seed, same tokens: every token so far took one number from its source, and nothing else did."""
    if (seed := sequence.sampling.seed) is not None:
        sequence.random = Random(seed)
        for _ in range(sequence.generated):
            sequence.random.random()


def _settle(work: Work, *, sampled: bool) -> Part:
    """A sequence's part in a step that has not moved it on yet; the prompt's tokens that it settles are settled now.

    A token of a prompt is settled by the first step that reports it, whichever of the prompt's choices that step ran:
    as `cached` if the sequence found it when it was admitted, as computed else. So no token is counted twice, whatever
    a preemption made the engine compute or find again, and a part that is recompute never settles anything.
    """
    sequence = work.sequence
    prompt, context_tokens = sequence.prompt, sequence.computed
    prompt_tokens = cached_tokens = 0
    if prompt.settled < sequence.prompt_length:  # of most works, all of the prompt is
        end = min(context_tokens + work.count, sequence.prompt_length)
        if end > prompt.settled:
            prompt_tokens = end - prompt.settled
            cached_tokens = max(0, min(sequence.cached, end) - prompt.settled)
            prompt.settled = end
    return Part(
        sequence.session_id,
        work.count,
        context_tokens,
        work.prefill,
        int(sampled),
        prompt_tokens,
        cached_tokens,
        work.recompute,
    )
