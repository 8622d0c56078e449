"""Runs planned steps on a warm engine and times them: what the attribution's parameters are fitted to.

Owns which steps are planned, how often each is run within the time allowed, and that their context lies in memory as
a session's would. Knows no torch (the runner does), and neither fits nor judges: metering.calibration does.

Steps are run once from cheap to dear, and the dearest are left out where the time allowed is short; then all again in
turn, in another order each time, so that a moment in which the machine was busy hits one run of a few steps and not
all runs of one. The shortest of a step's runs counts:
what else runs on the machine only ever adds.
"""

import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpumeter_worker.engine.blocks import Copy, KvBlocks, SlotBlocks
from gpumeter_worker.engine.faults import RankLost
from gpumeter_worker.engine.loop import Runner
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.metering.attribution import Costs, Load, cost_ps
from gpumeter_worker.metering.calibration import Calibration, Observation, Subject, fit, problem
from gpumeter_worker.metering.clock import StepClock
from gpumeter_worker.metering.profiles import stored_fit

log = logging.getLogger("gpumeter_worker.engine.calibrating")

_RUNS = 5
_STEPS_MAX = 72
"""More tell nothing new, and each is run several times; the cheapest and the dearest are always among them."""

_PASSES = (0, 2, 1, 3)
"""Every fourth step first, from the cheapest to the dearest, then those between: where the time allowed ends early, all
sizes were seen, and not only the small ones."""

_FIRST_SHARE = 0.4
"""How much of the time allowed the first run of every step may take; those that are left then are not run."""

_STEP_SHARE = 0.1
"""A step that is expected to take more than this of the time allowed is left out."""

_SLOT_CONTEXT = 8192
"""Memory of a cache of slots is taken where it is written, and it stays taken: so much of it is worth a calibration."""

_PAGED_SHARE = 4
"""A cache of blocks is there in any case; planned steps use at most one part in this many of it."""

_ORDER = Costs(10**9, 10**10, 10**8, 10**6, 10**5)
"""Roughly what steps cost one another, to put them in order before any was timed."""

_POLL_S = 0.0001


@dataclass(frozen=True, slots=True)
class Room:
    """What a step may hold: sequences, new tokens in all, the tokens of one sequence, and of all contexts together."""

    sequences: int
    step_tokens: int
    sequence_tokens: int
    context_tokens: int


def calibrate(
    runner: Runner,
    clock: StepClock,
    blocks: KvBlocks,
    room: Room,
    *,
    subject_of: Callable[[], Subject],
    budget_ns: int,
    stored_in: Path | None,
) -> Calibration | None:
    """What the steps of this engine cost: as a former start has found, or timed now. None with a budget of nothing.

    A step that fails is the calibration's problem and not the engine's, which can serve without one; unless the device
    tells nothing any more or a split model's ranks do not agree any more, and then the error is raised.
    """
    if not budget_ns:
        return None
    subject = subject_of()
    if stored_in is not None and (found := stored_fit(stored_in, subject)) is not None:
        return Calibration(subject, found, stored=True)
    began_ns = time.monotonic_ns()
    begun = clock.begun
    try:
        observations = measure(runner, clock, blocks, room, budget_ns)
    except RankLost:  # no step would be right, a user's least of all
        raise
    except Exception as error:
        log.exception("a planned step failed")
        # The clock must be as if nothing had been: the next step that it times is a user's.
        if clock.begun > begun and not clock.abort():
            raise
        clock.harvest()
        took_ns = time.monotonic_ns() - began_ns
        return Calibration(subject, None, f"a planned step raised {type(error).__name__}", took_ns=took_ns)
    fitted = fit(observations)
    took_ns = time.monotonic_ns() - began_ns
    log.info("timed %d planned steps in %.1f s", len(observations), took_ns / 1e9)
    return Calibration(subject, fitted, problem(fitted), took_ns=took_ns)


def measure(runner: Runner, clock: StepClock, blocks: KvBlocks, room: Room, budget_ns: int) -> list[Observation]:
    """Time as many of the planned steps as the time allowed holds, each as the shortest of its runs."""
    replay = Replay(runner, clock, blocks)
    runs: dict[tuple[Load, ...], list[int]] = {}
    began_ns = time.monotonic_ns()
    ratios: list[float] = []
    plan = planned(room)
    for loads in (loads for first in _PASSES for loads in plan[first :: len(_PASSES)]):
        expected = cost_ps(loads, _ORDER)
        if ratios and statistics.median(ratios) * expected > _STEP_SHARE * budget_ns:
            continue
        gpu_ns = replay.timed(loads)
        if gpu_ns is None:
            continue  # this cache has no room for it
        runs[loads] = [gpu_ns]
        ratios.append(gpu_ns / expected)
        if time.monotonic_ns() - began_ns > _FIRST_SHARE * budget_ns:
            break
    shuffled = list(runs)
    for number in range(1, _RUNS):
        random.Random(number).shuffle(shuffled)
        for loads in shuffled:
            if time.monotonic_ns() - began_ns + runs[loads][0] > budget_ns:
                continue
            if (gpu_ns := replay.timed(loads)) is not None:
                runs[loads].append(gpu_ns)
    return [Observation(loads, min(taken)) for loads, taken in runs.items()]


class Replay:
    """Runs steps of sequences that nobody asked for, of any composition, on an engine that nobody else uses."""

    def __init__(self, runner: Runner, clock: StepClock, blocks: KvBlocks) -> None:
        self._runner = runner
        self._clock = clock
        self._blocks = blocks
        self._written: dict[int, int] = {}

    def timed(self, loads: Sequence[Load], sampling: Sequence[bool] | None = None) -> int | None:
        """Nanoseconds of one such step, by the clock that steps are billed by; None where the cache has no room for it.

        `sampling`: which of the sequences are given a token, all of them unless it is said. Nothing is left in the
        cache that anybody would find.
        """
        works: list[Work] = []
        try:
            for load, samples in zip(loads, sampling or [True] * len(loads), strict=True):
                work = _work(load, samples=samples)
                if not self._blocks.admit(work.sequence):
                    return None
                work.sequence.computed = load.context_tokens
                works.append(work)
            self._write(works)
            self._runner.run(works, self._clock)
            while not (times := self._clock.harvest()):
                time.sleep(_POLL_S)
            return times[-1].gpu_ns
        finally:
            for work in works:
                self._blocks.release(work.sequence)

    def _write(self, works: Sequence[Work]) -> None:
        """Memory that was never written is one page of zeros, which is read faster than a session's context would be.

        Once for every part of a slot: what was copied just now would be in the processor's caches.
        """
        if not isinstance(self._blocks, SlotBlocks):
            return
        for sequence in (work.sequence for work in works):
            slot, tokens = sequence.blocks[0], sequence.computed
            if tokens > self._written.get(slot, 0):
                self._runner.copy([Copy(slot, slot, tokens)])
                self._written[slot] = tokens


def room_of(blocks: KvBlocks, sequences: int, step_tokens: int, sequence_tokens: int, cache_tokens: int) -> Room:
    """What planned steps may take of an engine that nobody uses yet."""
    contexts = _SLOT_CONTEXT if isinstance(blocks, SlotBlocks) else cache_tokens // _PAGED_SHARE
    longest = min(sequence_tokens, blocks.longest) - 1  # a sequence keeps a place for the token that it is given
    return Room(sequences, step_tokens, longest, contexts)


def planned(room: Room) -> list[tuple[Load, ...]]:
    """Decodes, prompts and both together, of every size that fits, cheap ones first; each once."""
    batches = _ladder(1, room.sequences, 4)
    contexts = _ladder(32, room.sequence_tokens - 1, 8)
    chunks = _ladder(8, min(room.step_tokens, room.sequence_tokens), 4)
    steps: list[list[Load]] = []
    for batch in batches:
        fitting = [context for context in contexts if batch * context <= room.context_tokens] or contexts[:1]
        steps += [[Load(1, context)] * batch for context in {fitting[0], fitting[len(fitting) // 2], fitting[-1]}]
        steps.append([Load(1, fitting[index % len(fitting)]) for index in range(batch)])
    steps += [[Load(1, context)] for context in _ladder(8, room.sequence_tokens - 1, 4)]
    for chunk in _ladder(2, min(room.step_tokens, room.sequence_tokens), 2):
        steps += [[Load(chunk, context)] for context in (0, contexts[0])]
    for chunk in chunks:
        steps += [[Load(chunk, context)] for context in contexts[1:]]
        steps.append([Load(chunk, 0)] * 3)
        for batch in batches[1:]:
            steps.append([Load(chunk, 0)] + [Load(1, contexts[0])] * (batch - 1))
            steps.append([Load(chunk, contexts[0])] + [Load(1, contexts[len(contexts) // 2])] * (batch - 1))
    fits = {tuple(loads): None for loads in steps if _fits(loads, room)}
    ordered = sorted(fits, key=lambda loads: (cost_ps(loads, _ORDER), loads))
    if len(ordered) <= _STEPS_MAX:
        return ordered
    return [ordered[place * (len(ordered) - 1) // (_STEPS_MAX - 1)] for place in range(_STEPS_MAX)]


def _work(load: Load, *, samples: bool) -> Work:
    length = load.context_tokens + load.new_tokens
    tokens = [1 + place % 2 for place in range(length)]
    sequence = EngineSequence("", 0, "", tokens, length, Sampling(max_tokens=2), random=random.Random(0))
    return Work(sequence, load.new_tokens, samples=samples, prefill=load.new_tokens > 1)


def _fits(loads: Sequence[Load], room: Room) -> bool:
    return (
        len(loads) <= room.sequences
        and sum(load.new_tokens for load in loads) <= room.step_tokens
        and sum(load.context_tokens for load in loads) <= max(room.context_tokens, room.sequence_tokens)
        and max(load.new_tokens + load.context_tokens for load in loads) <= room.sequence_tokens
    )


def _ladder(first: int, last: int, factor: int) -> list[int]:
    """first, first x factor, ... and last; last alone where it is less than first."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, max(1, last)]
