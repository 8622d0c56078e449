"""Attribution against the measured Shapley value: real batches of a real engine, every subset of each run and timed.

Owns which batches are taken and in which order their subsets are run. The engine is the worker's own, on whatever
device it is given; its clock is the one that steps are billed by. A subset is run as the worker's calibration runs a
step: the same number of new tokens on the same number of cached ones.

Subsets of all batches are run in turn, in another order in every round, so that a moment in which the machine was busy
hits a few runs of many subsets and not all runs of one. How far the rounds agree is measured as well: the value from
every other round against the value from the rest is the floor below which no rule's error can be seen.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.attribution_sim import all_shares
from gpumeter_worker.engine.calibrating import Replay, measure, room_of
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import EngineOptions, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.attribution import Load, Profile, Rule, uncalibrated
from gpumeter_worker.metering.calibration import Fit, Observation, fit, problem
from gpumeter_worker.metering.clock import StepClock, StepTime, step_clock
from rigs.shapley import members, misplaced, shapley

ROUNDS_MIN, ROUNDS_WANTED, ROUNDS_MAX = 3, 7, 41
KINDS = ("decode", "mixed", "prompts")
_WAVES = 8


@dataclass(frozen=True)
class Batch:
    """A step that the engine ran for its users: what it held, and which of the sequences were given a token."""

    loads: tuple[Load, ...]
    sampling: tuple[bool, ...]

    @property
    def kind(self) -> str:
        """Whether it held decodes, prompts or both."""
        prompts = sum(load.new_tokens > 1 for load in self.loads)
        return "decode" if not prompts else "prompts" if prompts == len(self.loads) else "mixed"


@dataclass
class Measured:
    """The runs of every subset of a batch, in nanoseconds, by round."""

    batch: Batch
    runs: list[list[int]] = field(default_factory=list)

    def value(self, rounds: slice, take: Callable[[Sequence[int]], float]) -> list[float]:
        """The Shapley value from some of the rounds."""
        costs = [take(taken[rounds]) for taken in self.runs]
        return shapley(len(self.batch.loads), lambda who: costs[sum(1 << one for one in who) - 1])


@dataclass(frozen=True)
class Result:
    """What was found: the fit, its problem if it has one, and for every batch what each rule misplaced of the step."""

    found: Fit | None
    problem: str
    rounds: int
    batches: list[dict[str, Any]]
    observations: list[Observation]


def replay_subsets(
    options: EngineOptions,
    *,
    largest: int,
    per_kind: int,
    minutes: float,
    calibration_s: float,
    take: str,
    cpu_time: bool = False,
) -> Result:
    """Start an engine, calibrate it as a worker does, let it serve, and run the subsets of what it served."""
    from gpumeter_worker.engine.model import ModelRunner

    runner, clock = ModelRunner(options), ThreadClock() if cpu_time else step_clock(options.device)
    runner.warm_up(clock)
    blocks = runner.blocks()
    room = room_of(blocks, runner.limits.sequences, options.max_batch_tokens, runner.max_model_len, runner.cache_tokens)
    print(f"calibrating for {calibration_s:.0f} s", flush=True)
    observations = measure(runner, clock, blocks, room, round(calibration_s * 1e9))
    found = fit(observations)
    served = _serve(runner, clock, largest, options, seed=3)
    batches = _choose(served, per_kind)
    print(f"{len(served)} batches were served, {len(batches)} of them are taken apart", flush=True)
    measured = _run_subsets(Replay(runner, clock, blocks), batches, minutes * 60)
    profiles = {
        "knee, stand-in": uncalibrated(Rule.KNEE, clock.kind),
        "tokens": uncalibrated(Rule.TOKENS, clock.kind),
    }
    if found is not None:
        profiles = {"knee, fitted": Profile("fitted", Rule.KNEE, *found.costs), **profiles}
    chosen = statistics.median if take == "median" else min
    flops = _flops(options)
    return Result(
        found,
        problem(found),
        len(measured[0].runs[0]),
        [_judged(one, profiles, flops, chosen) for one in measured],
        observations,
    )


class ThreadClock:
    """How long the processor worked for one thread: what a step takes on a machine that others use as well."""

    kind = "host"

    def __init__(self) -> None:
        self._began_ns = 0
        self._finished: list[StepTime] = []

    def begin(self) -> None:
        self._began_ns = time.thread_time_ns()

    def end(self) -> None:
        ended_ns = time.thread_time_ns()
        self._finished.append(StepTime(self._began_ns, ended_ns, ended_ns - self._began_ns))

    def harvest(self) -> list[StepTime]:
        finished, self._finished = self._finished, []
        return finished


def _judged(
    one: Measured, profiles: dict[str, Profile], flops: tuple[float, float], take: Callable[[Sequence[int]], float]
) -> dict[str, Any]:
    value = one.value(slice(None), take)
    total = sum(value)
    errors = {
        name: misplaced([share * total for share in shares], value)
        for name, shares in all_shares(one.batch.loads, profiles, flops).items()
    }
    even, odd = one.value(slice(0, None, 2), take), one.value(slice(1, None, 2), take)
    even = [share * sum(odd) / sum(even) for share in even]
    return {
        "kind": one.batch.kind,
        "loads": [list(load) for load in one.batch.loads],
        "step_ns": round(total),
        "value_ns": [round(share) for share in value],
        "errors": errors,
        "floor": misplaced(even, odd),
        "runs_ns": one.runs,
    }


def _run_subsets(replay: Replay, batches: Sequence[Batch], limit_s: float) -> list[Measured]:
    measured = [Measured(batch, [[] for _ in range(2 ** len(batch.loads) - 1)]) for batch in batches]
    work = [(one, coalition) for one in measured for coalition in range(1, 2 ** len(one.batch.loads))]
    began_s = told_s = time.monotonic()
    for number in range(ROUNDS_MAX):
        random.Random(number).shuffle(work)
        for one, coalition in work:
            who = members(coalition)
            gpu_ns = replay.timed([one.batch.loads[i] for i in who], [one.batch.sampling[i] for i in who])
            if gpu_ns is None:
                raise ValueError("the cache has no room for a batch that it held before")
            one.runs[coalition - 1].append(gpu_ns)
        spent_s = time.monotonic() - began_s
        if number == 0 and spent_s * ROUNDS_WANTED > limit_s:
            kept = max(len(KINDS), int(len(measured) * limit_s / (ROUNDS_WANTED * spent_s)))
            measured = measured[:kept]
            work = [(one, coalition) for one, coalition in work if one in measured]
            print(f"a round takes {spent_s:.0f} s: {kept} batches are kept", flush=True)
        if time.monotonic() - told_s > 15 or number == 0:
            told_s = time.monotonic()
            print(f"round {number + 1}: {spent_s:.0f} of {limit_s:.0f} s", flush=True)
        if number + 1 >= ROUNDS_MIN and spent_s * (number + 2) / (number + 1) > limit_s:
            break
    return measured


class _Recording:
    """A runner that remembers what every step held."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.batches: list[Batch] = []

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        loads = tuple(Load(work.count, work.sequence.computed) for work in plan)
        self.batches.append(Batch(loads, tuple(work.samples for work in plan)))
        return self._runner.run(plan, clock)  # type: ignore[no-any-return]

    def copy(self, copies: Any) -> None:
        self._runner.copy(copies)


def _serve(runner: Any, clock: StepClock, largest: int, options: EngineOptions, seed: int) -> list[Batch]:
    """Users who come in waves, the first few of each at the same moment, and what the engine made of them."""
    rng, recording = random.Random(seed), _Recording(runner)
    limits = Limits(min(largest, runner.limits.sequences), options.max_batch_tokens, runner.limits.mixed_prefill_tokens)
    engine = Engine(recording, clock, limits, frozenset(), runner.max_model_len, runner.blocks())
    longest = runner.max_model_len // 2
    for wave in range(_WAVES):
        waiting = [min(rng.choice((8, 24, 60, 120, 300)), longest) for _ in range(largest)]
        for number, length in enumerate(waiting):
            tokens = [rng.randrange(3, 200) for _ in range(length)]
            answer = Sampling(max_tokens=rng.choice((8, 24, 48)), seed=number)
            engine.submit(Submit(f"s-{wave}-{number}", tokens, answer))
            for _ in range(0 if number < wave % largest else rng.choice((1, 2, 5))):
                engine.turn()
        while engine.busy:
            engine.turn()
    clock.harvest()
    return recording.batches


def _choose(served: Sequence[Batch], per_kind: int) -> list[Batch]:
    """Some of every kind, spread over all that were served; kinds in turn, so that whatever is dropped is the last."""
    several = [batch for batch in dict.fromkeys(served) if len(batch.loads) > 1]
    of_kind = {kind: [batch for batch in several if batch.kind == kind] for kind in KINDS}
    rng = random.Random(1)
    picked = {kind: rng.sample(found, min(per_kind, len(found))) for kind, found in of_kind.items()}
    return [picked[kind][place] for place in range(per_kind) for kind in KINDS if place < len(picked[kind])]


def _flops(options: EngineOptions) -> tuple[float, float]:
    """Of a token's linear layers and of a pair of tokens, as a model's files say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model_path)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
    return 2.0 * layers * (attention + 3 * width * inner), 4.0 * layers * config.num_attention_heads * head
