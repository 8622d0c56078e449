"""The engine's turn: schedule, run, postprocess, and report each step once its time is known.

Owns the order of events: a step's report comes before the end of any session that was in it. Knows no torch (the
runner does) and no channel.
"""

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import Protocol

from gpumeter_worker.engine.messages import Ended, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Scheduler, Work
from gpumeter_worker.engine.sequence import Finish, Sequence, finish_after
from gpumeter_worker.metering.clock import StepClock
from gpumeter_worker.metering.meter import Part

INVALID_TOKEN = -1
"""What a runner returns for a row whose logits are no numbers."""


class Runner(Protocol):
    """Runs a planned step on the device, between the clock's begin and end."""

    def run(self, plan: Row[Work], clock: StepClock) -> list[int]:
        """One new token for every work that samples, in the plan's order."""


@dataclass(slots=True)
class _Unreported:
    """A step whose time is not known yet, and the sessions that ended since it was launched."""

    parts: tuple[Part, ...]
    tokens: tuple[tuple[str, int], ...]
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
        self._kv_tokens = 0

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
        self._scheduler.add(Sequence.of(command.session_id, command.prompt, command.sampling))

    def cancel(self, session_id: str) -> None:
        """Takes effect before the next step; what has ended already has said so."""
        sequence = self._scheduler.cancel(session_id)
        if sequence is not None:
            self._kv_tokens -= sequence.computed
            self._end(sequence, Finish.CANCELLED)

    def turn(self) -> list[Event]:
        """Run one step if there is work, and report whatever is known to be finished."""
        plan = self._scheduler.plan()
        if plan:
            self._postprocess(plan, self._runner.run(plan, self._clock))
        return self._report()

    def _postprocess(self, plan: list[Work], sampled: list[int]) -> None:
        next_token = iter(sampled)
        parts, tokens, finished = [], [], []
        for work in plan:
            sequence = work.sequence
            given = 0
            context = sequence.computed
            sequence.computed += work.count
            self._kv_tokens += work.count
            if work.samples:
                token = next(next_token)
                if token == INVALID_TOKEN:
                    finished.append((sequence, Finish.FAILED))
                else:
                    given = 1
                    sequence.tokens.append(token)
                    tokens.append((sequence.session_id, token))
                    if finish := finish_after(sequence, self._eos_ids, self._max_length):
                        finished.append((sequence, finish))
            parts.append(Part(sequence.session_id, work.count, context, work.prefill, given))
        running = self._scheduler.running
        for sequence, _ in finished:
            self._scheduler.leave(sequence)
            self._kv_tokens -= sequence.computed
        self._unreported.append(_Unreported(tuple(parts), tuple(tokens), running, self._kv_tokens))
        for sequence, finish in finished:
            self._end(sequence, finish)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        message = "the model gave no valid probabilities for this request" if finish is Finish.FAILED else ""
        ended = Ended(sequence.session_id, finish, message)
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
