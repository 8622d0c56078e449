"""How many workers a service that scales should have now, and why.

Owns the order of the rules: HPA's formula on waiting requests; GPUs may raise its answer while something waits and keep
it from falling while they are busy; no worker goes whose requests would find no place in the others' batches; then
HPA's windows and policies; then what the cluster can hold. To zero only after a worker was ready and nothing was asked
for a while; from zero at once. Pure: what is seen, what is remembered and the clock come in, a decision and the new
memory go out. Does not know how any of it is measured, nor how a number is reached.
"""

from dataclasses import dataclass

from gpumeter_operator.decide.crew import NOBODY, Door, Load
from gpumeter_operator.decide.hpa import Change, Recommendation, asked_for, limited, recent, remembered, stabilized
from gpumeter_operator.decide.scaling import Scaling
from gpumeter_operator.decide.spec import Problem

# A request waits in a worker until the next step takes it in, so one look in ten may see one that merely passes. What
# is seen at every look for this long really waits.
WAITS_MS = 10_000
# Those that stay keep a tenth of their places free: requests come in bunches, and a worker that is missed is back only
# after its start. (bench-trace: at 100 requests wait again, at 80 it costs 4 % more GPU-hours for nothing.)
ROOM_PERCENT = 90


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that gets requests, or will when it is ready. `load` is None where it told nothing lately."""

    ready: bool
    placed: bool
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a service. `replicas` is the number that was decided last; draining workers are in neither."""

    replicas: int
    workers: tuple[Worker, ...]
    door: Door = NOBODY
    batch: int = 64  # sequences that one worker computes together
    blocked: Problem | None = None  # why the cluster does not even make or place the pods that are wanted already
    rolling: bool = False  # some that serve are of a former version, and the Deployment would make them no more


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next. All times in milliseconds of a clock that never goes back."""

    recommendations: tuple[Recommendation, ...] = ()
    changes: tuple[Change, ...] = ()
    waiting_since_ms: int | None = None
    quiet_since_ms: int | None = None  # only ever set after a worker was ready
    ended: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """The number, and why. `able` is false where something keeps the autoscaler from doing what it should.

    The words of a decision that changes nothing hold no figures, so that they stay the same while it does.
    """

    replicas: int
    former: int
    reason: str
    message: str
    able: bool = True

    @property
    def changes(self) -> bool:
        """Whether the number is another than before."""
        return self.replicas != self.former


@dataclass(frozen=True, slots=True)
class _Counts:
    """Sums over the workers."""

    waiting: tuple[int, ...]
    gpus: tuple[int, ...]
    ready: int
    silent: int
    starting: int
    unplaced: int
    running: int
    door: int

    @property
    def queue(self) -> int:
        return sum(self.waiting) + self.door


@dataclass(frozen=True, slots=True)
class _Why:
    """What decided about a number, and what cut it."""

    problem: Problem
    limit: str


STEADY = "WithinTarget"
AT_ZERO = "ScaledToZero"
SILENT = "SignalsMissing"
ROLLING = (
    "Nothing was asked for long enough to go to zero, but no worker of the new version is ready in place of the former "
    "ones, which could not be started again; they stay until it is."
)


def decide(scaling: Scaling, sight: Sight, memory: Memory, now_ms: int) -> tuple[Decision, Memory]:
    """The decision for this moment. The number is never outside [least, most], but for the 0 that least 0 allows."""
    counts = _count(sight)
    memory = _listen(sight, counts, memory, now_ms)
    if not memory.recommendations:
        # As Kubernetes' recordInitialRecommendation: the number found at the start is worth as much as one's own.
        memory = _with(memory, recommendations=(Recommendation(now_ms, sight.replicas),))
    if sight.replicas == 0:
        return _from_zero(scaling, counts, memory, now_ms)
    wanted, why = _recommend(scaling, sight, counts, memory, now_ms)
    steady = stabilized(wanted, sight.replicas, memory.recommendations, now_ms, scaling)
    past = remembered(memory.recommendations, wanted, now_ms, scaling)
    quiet = scaling.least == 0 and _quiet(scaling, memory, now_ms)
    kept, quiet = quiet and sight.rolling, quiet and not sight.rolling
    least = 0 if quiet else max(scaling.least, 1)
    if quiet and sight.replicas <= scaling.most:
        # Longer than any window nothing was asked; a window that still remembers the last request protects nobody.
        steady, why = 0, Problem("NoRequests", _no_requests(scaling))
    allowed, limit = limited(
        steady, sight.replicas, memory.changes, now_ms, scaling, least=least, most=max(scaling.most, least)
    )
    if allowed > sight.replicas and scaling.least <= sight.replicas and (block := _blocked(sight, counts)) is not None:
        held = Decision(sight.replicas, sight.replicas, block.reason, block.message, able=False)
        return held, _with(memory, recommendations=past)
    if kept and allowed == sight.replicas:
        return Decision(allowed, allowed, "RolloutUnfinished", ROLLING, able=False), _with(memory, recommendations=past)
    decision = _worded(scaling, sight.replicas, wanted, allowed, _Why(why, limit))
    return decision, _after(scaling, decision, memory, past, now_ms)


def _count(sight: Sight) -> _Counts:
    ready = [worker for worker in sight.workers if worker.ready]
    loads = [worker.load for worker in ready if worker.load is not None]
    return _Counts(
        waiting=tuple(load.waiting for load in loads),
        gpus=tuple(load.gpu_percent for load in loads if load.gpu_percent is not None),
        ready=len(ready),
        silent=len(ready) - len(loads),
        # Pods that the ReplicaSet has still to make are starting too. Those that a rollout makes beside the wanted ones
        # are not: they take a former one's place and part, and one that never gets ready would hold back for ever.
        starting=max(sight.replicas - len(ready), 0),
        unplaced=sum(not worker.placed for worker in sight.workers),
        running=sum(load.running for load in loads),
        door=sight.door.waiting,
    )


def _listen(sight: Sight, counts: _Counts, memory: Memory, now_ms: int) -> Memory:
    """Since when something waits, and since when nothing was asked at all. What is silent is not idle."""
    waiting = (memory.waiting_since_ms or now_ms) if counts.queue else None
    ended = sum(worker.load.ended for worker in sight.workers if worker.ready and worker.load is not None)
    idle = (
        counts.ready > 0
        and counts.silent == 0
        and sight.door.known
        and counts.queue + counts.running + sight.door.inflight == 0
        and ended == memory.ended
    )
    quiet = (memory.quiet_since_ms or now_ms) if idle else None
    return _with(memory, waiting_since_ms=waiting, quiet_since_ms=quiet, ended=ended)


def _from_zero(scaling: Scaling, counts: _Counts, memory: Memory, now_ms: int) -> tuple[Decision, Memory]:
    """At zero the first waiting request decides, whatever windows say; scaleUp's policies still bound the number."""
    if scaling.least == 0 and not counts.door:
        return Decision(0, 0, AT_ZERO, at_zero(scaling)), memory
    wanted = max(scaling.least, 1, -(-counts.door // scaling.queue_length))
    allowed, _ = limited(wanted, 0, memory.changes, now_ms, scaling, least=0, most=scaling.most)
    allowed = max(allowed, scaling.least, 1)
    if counts.door:
        why = Problem("FirstRequest", f"{_requests(counts.door)} at the gateway, and there was no worker.")
    else:
        why = Problem("BelowMinimum", f"spec.scaling.minReplicas is {scaling.least}.")
    decision = _changed(0, allowed, why, "")
    return decision, _after(scaling, decision, memory, memory.recommendations, now_ms)


def _recommend(scaling: Scaling, sight: Sight, counts: _Counts, memory: Memory, now_ms: int) -> tuple[int, Problem]:
    """The number before windows and policies, and what decided about it."""
    current = sight.replicas
    if counts.ready and counts.silent == counts.ready and not counts.door:
        return current, Problem(
            SILENT,
            "No ready worker has told its load lately, so the number of workers stays; a silent worker is not an idle "
            "one. Check that the operator reaches the workers' port 8000 (network policies).",
        )
    by_queue = asked_for(
        counts.waiting,
        silent=counts.silent,
        starting=counts.starting,
        beside=counts.door,
        current=current,
        target=scaling.queue_length,
        scaling=scaling,
    )
    each = f"{_workers(counts.ready, 'ready ')}, {scaling.queue_length} aimed at for each"
    why = Problem(
        "QueueAboveTarget" if by_queue > current else "QueueBelowTarget", f"{_requests(counts.queue)} for {each}."
    )
    by_gpu = _by_gpu(scaling, counts, memory, current, now_ms)
    if by_gpu > max(by_queue, current):
        busy = f"GPU utilisation is {_mean(counts.gpus)} % ({scaling.gpu_percent} aimed at)"
        return by_gpu, Problem(
            "GpuBusyWhileWaiting", f"{_requests(counts.queue)} for more than {WAITS_MS // 1_000} s, and {busy}."
        )
    if by_queue >= current:
        return by_queue, why
    if counts.gpus and sum(counts.gpus) > scaling.gpu_percent * len(counts.gpus):
        return current, Problem(
            "GpuBusy",
            f"The queue would let a worker go, but GPU utilisation is above {scaling.gpu_percent} % "
            "(spec.scaling.targetGpuUtilization).",
        )
    # A worker that tells nothing may be full.
    taken = counts.running + counts.queue + counts.silent * sight.batch
    needed = min(current, -(-taken * 100 // (sight.batch * ROOM_PERCENT)))
    if needed > by_queue:
        full = Problem(
            "BatchesFull",
            f"The queue would let a worker go, but the others' batches (spec.engine.maxBatchSize {sight.batch}) have "
            "no room for its requests.",
        )
        return needed, full if needed == current else why
    return by_queue, why


def _by_gpu(scaling: Scaling, counts: _Counts, memory: Memory, current: int, now_ms: int) -> int:
    """What GPU utilisation asks for; nothing unless something waits, for one request pins a GPU at 100 %."""
    if memory.waiting_since_ms is None or now_ms - memory.waiting_since_ms < WAITS_MS or not counts.gpus:
        return 0
    return asked_for(
        counts.gpus,
        silent=counts.ready - len(counts.gpus),
        starting=counts.starting,
        beside=0,
        current=current,
        target=scaling.gpu_percent,
        scaling=scaling,
    )


def _quiet(scaling: Scaling, memory: Memory, now_ms: int) -> bool:
    return (
        memory.quiet_since_ms is not None
        and now_ms - memory.quiet_since_ms >= scaling.zero_after_ms
        and scaling.down.select != "Disabled"
    )


def _blocked(sight: Sight, counts: _Counts) -> Problem | None:
    """Why more pods would be of no use: those that are wanted already are not even on a node."""
    if sight.blocked is not None:
        return Problem(sight.blocked.reason, f"More workers are needed and not asked for: {sight.blocked.message}")
    if counts.unplaced:
        return Problem(
            "PodsPending", "More workers are needed and not asked for, as long as some wait for a node to run on."
        )
    return None


def _worded(scaling: Scaling, current: int, wanted: int, allowed: int, because: _Why) -> Decision:
    why, limit = because.problem, because.limit
    if allowed == current:
        if limit == "TooManyReplicas" or wanted > current == scaling.most:
            message = f"More than {_workers(scaling.most)} are asked for; spec.scaling.maxReplicas allows no more."
            return Decision(current, current, "AtMaximum", message)
        if why.reason in (SILENT, "GpuBusy", "BatchesFull"):
            return Decision(current, current, why.reason, why.message, able=why.reason != SILENT)
        return Decision(current, current, STEADY, following(scaling))
    if current > scaling.most:
        why = Problem("AboveMaximum", f"spec.scaling.maxReplicas is {scaling.most}.")
    elif current < scaling.least:
        why = Problem("BelowMinimum", f"spec.scaling.minReplicas is {scaling.least}.")
    elif (allowed > current) != (wanted > current) or why.reason in ("GpuBusy", "BatchesFull", SILENT):
        # A window held the number back until now, and the moment's own recommendation says something else.
        word = "QueueAboveTarget" if allowed > current else "QueueBelowTarget"
        window = "scaleUp" if allowed > current else "scaleDown"
        why = Problem(word, f"So it was for the whole stabilisation window of {window}.")
    return _changed(current, allowed, why, limit)


def _changed(former: int, replicas: int, why: Problem, limit: str) -> Decision:
    limits = {
        "ScaleUpLimit": " The policies of scaleUp allow no more at once.",
        "ScaleDownLimit": " The policies of scaleDown allow no faster way.",
        "TooManyReplicas": " spec.scaling.maxReplicas allows no more.",
    }
    message = f"From {former} to {_workers(replicas)}. {why.message}{limits.get(limit, '')}"
    return Decision(replicas, former, why.reason, message)


def following(scaling: Scaling) -> str:
    """What the autoscaler does, in a sentence without figures of the moment."""
    return (
        f"From {scaling.least} to {_workers(scaling.most)}, aiming at {scaling.queue_length} waiting requests for each "
        "that is ready."
    )


def at_zero(scaling: Scaling) -> str:
    """Why nothing runs, and what will change that."""
    return f"Nothing was asked for {_for(scaling.zero_after_ms)}, so no worker runs; the next request starts one."


def _after(
    scaling: Scaling, decision: Decision, memory: Memory, past: tuple[Recommendation, ...], now_ms: int
) -> Memory:
    changes = recent(memory.changes, now_ms, scaling)
    if decision.changes:
        changes = (*changes, Change(now_ms, decision.replicas - decision.former))
    return _with(memory, recommendations=past, changes=changes)


def _with(
    memory: Memory,
    *,
    recommendations: tuple[Recommendation, ...] | None = None,
    changes: tuple[Change, ...] | None = None,
    waiting_since_ms: int | None = -1,
    quiet_since_ms: int | None = -1,
    ended: int | None = None,
) -> Memory:
    # dataclasses.replace costs ten times as much, and this runs for every service every two seconds.
    return Memory(
        memory.recommendations if recommendations is None else recommendations,
        memory.changes if changes is None else changes,
        memory.waiting_since_ms if waiting_since_ms == -1 else waiting_since_ms,
        memory.quiet_since_ms if quiet_since_ms == -1 else quiet_since_ms,
        memory.ended if ended is None else ended,
    )


def _no_requests(scaling: Scaling) -> str:
    return f"Nothing was asked for {_for(scaling.zero_after_ms)} (spec.scaling.scaleToZeroAfter)."


def _for(duration_ms: int) -> str:
    for unit, length_ms in (("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if duration_ms >= length_ms and duration_ms % length_ms == 0:
            return f"{duration_ms // length_ms}{unit}"
    return f"{duration_ms}ms"


def _mean(values: tuple[int, ...]) -> int:
    return round(sum(values) / len(values))


def _requests(number: int) -> str:
    return f"{number} request waits" if number == 1 else f"{number} requests wait"


def _workers(number: int, kind: str = "") -> str:
    return f"{number} {kind}worker" if number == 1 else f"{number} {kind}workers"
