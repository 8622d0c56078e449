"""The engine's turn: schedule, run, postprocess, and report each step once its time is known.

Owns the order of events: a step's report comes before the end of any session that was in it. Knows no torch (the
runner does) and no channel.
"""

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol

from gpumeter_worker.engine.messages import Cancel, Ended, Event, StepReport, Submit, Token
from gpumeter_worker.engine.scheduler import Limits, Scheduler, Work
from gpumeter_worker.engine.sequence import Finish, Sequence, finish_after
from gpumeter_worker.metering.clock import StepClock
from gpumeter_worker.metering.meter import Part

INVALID_TOKEN = -1
"""What a runner returns for a row whose logits are no numbers."""


class Sampled(NamedTuple):
    """A new token. `top` holds the likeliest ones with their natural log probabilities, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Runner(Protocol):
    """Runs a planned step on the device, between the clock's begin and end."""

    def run(self, plan: Row[Work], clock: StepClock) -> list[Sampled]:
        """One new token for every work that samples, in the plan's order."""


@dataclass(slots=True)
class _Unreported:
    """A step whose time is not known yet, and the sessions that ended since it was launched."""

    parts: tuple[Part, ...]
    tokens: tuple[Token, ...]
    running: int
    kv_tokens: int
    ended: list[Ended] = field(default_factory=list)


class Engine:
    """The state of one engine process."""

    def __init__(
        self, runner: Runner, clock: StepClock, limits: Limits, eos_ids: frozenset[int], max_length: int
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(limits)
        self._eos_ids = eos_ids
        self._max_length = max_length
        self._unreported: deque[_Unreported] = deque()
        self._ended: list[Ended] = []

    @property
    def waiting(self) -> int:
        """Sequences that have not been in a step yet."""
        return self._scheduler.waiting

    @property
    def busy(self) -> bool:
        """Whether another turn has something to do."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._unreported or self._ended)

    @property
    def stepping(self) -> bool:
        """Whether the next turn runs a step."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def submit(self, command: Submit) -> None:
        """A request that the API process admitted."""
        self._scheduler.add(
            Sequence(
                session_id=command.session_id,
                choice=command.choice,
                tenant=command.tenant,
                tokens=list(command.prompt),
                prompt_length=len(command.prompt),
                sampling=command.sampling,
                counts_prompt=command.counts_prompt,
                random=Random(command.sampling.seed),
            )
        )

    def cancel(self, command: Cancel) -> None:
        """Takes effect before the next step; what has ended already has said so."""
        for sequence in self._scheduler.cancel(command.session_id, command.choice):
            self._end(sequence, Finish.CANCELLED)

    def turn(self) -> list[Event]:
        """Run one step if there is work, and report whatever is known to be finished."""
        plan = self._scheduler.plan()
        if plan:
            self._postprocess(plan, self._runner.run(plan, self._clock))
        return self._report()

    def _postprocess(self, plan: list[Work], sampled: list[Sampled]) -> None:
        next_token = iter(sampled)
        parts, tokens, finished = [], [], []
        for work in plan:
            sequence = work.sequence
            parts.append(_part(work))
            sequence.computed += work.count
            sequence.cached = 0
            self._scheduler.computed(sequence)
            if not work.samples:
                continue
            new = next(next_token)
            if new.token == INVALID_TOKEN:
                finished.append((sequence, Finish.FAILED))
                continue
            sequence.tokens.append(new.token)
            tokens.append(Token(sequence.session_id, sequence.choice, *new))
            parts[-1] = parts[-1]._replace(sampled=1)
            if finish := finish_after(sequence, self._eos_ids, self._max_length):
                finished.append((sequence, finish))
        running = self._scheduler.running
        for sequence, _ in finished:
            self._scheduler.leave(sequence)
        self._unreported.append(_Unreported(tuple(parts), tuple(tokens), running, self._scheduler.cache_tokens))
        for sequence, finish in finished:
            self._end(sequence, finish)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        message = "the model gave no valid probabilities for this request" if finish is Finish.FAILED else ""
        ended = Ended(sequence.session_id, finish, sequence.choice, message)
        (self._unreported[-1].ended if self._unreported else self._ended).append(ended)

    def _report(self) -> list[Event]:
        events: list[Event] = [*self._ended]
        self._ended = []
        for time in self._clock.harvest():
            step = self._unreported.popleft()
            events.append(
                StepReport(
                    time.started_ns, time.ended_ns, time.gpu_ns, step.parts, step.tokens, step.running, step.kv_tokens
                )
            )
            events += step.ended
        return events


def _part(work: Work) -> Part:
    """A sequence's part in a step that has not moved it on yet."""
    sequence = work.sequence
    start, end = sequence.computed - sequence.cached, sequence.computed + work.count
    settled = max(0, min(end, sequence.prompt_length) - max(start, 0)) if not work.recompute else 0
    counts = sequence.counts_prompt and start < sequence.prompt_length
    return Part(
        session_id=sequence.session_id,
        new_tokens=work.count,
        context_tokens=sequence.computed,
        prefill=work.prefill,
        sampled=0,
        prompt_tokens=settled if counts else 0,
        cached_tokens=sequence.cached if counts else 0,
        recompute=work.recompute,
    )
