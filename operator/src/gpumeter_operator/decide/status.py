"""Pods and Deployment -> status: conditions, modelStatus, url, replicas.

Owns what the user reads in `kubectl get inferenceservices.gpumeter.io`. Takes the clock as an argument. Does not know
how status is written.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gpumeter_operator.decide import workload
from gpumeter_operator.decide.autoscale import AT_ZERO, at_zero
from gpumeter_operator.decide.conditions import Condition, follow, timestamp
from gpumeter_operator.decide.development import NOT_METERED, how_to_open
from gpumeter_operator.decide.names import DRAINING_LABEL, STOP_ANNOTATION
from gpumeter_operator.decide.pods import Failure, PodState
from gpumeter_operator.decide.reasons import STARTING, UNMETERED
from gpumeter_operator.decide.replicas import Replicas
from gpumeter_operator.decide.spec import DEFAULT_PLAN, Problem, ServiceSpec

_MAKE_ROOM = " With spec.rolloutStrategy {maxSurge: 0, maxUnavailable: 1} a former worker goes first and makes room."
PLAN_FOUND = "PricePlanFound"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the autoscaler measured and decided, as the status shows it. None stands for what nobody tells."""

    queue_length: int | None
    gpu_percent: int | None
    history: tuple[Mapping[str, Any], ...]  # newest first


@dataclass(frozen=True, slots=True)
class Seen:
    """What was observed of one service."""

    spec: ServiceSpec
    replicas: Replicas
    problems: tuple[Problem, ...]  # why the spec cannot be run, or why the API server refused it
    template_hash: str  # of the wanted pods; empty when the spec has problems
    deployment: Mapping[str, Any] | None
    pods: tuple[PodState, ...]
    figures: Figures | None = None  # None until the workers were asked
    has_plan: bool | None = None  # whether its PricePlan is there; None where nobody can tell


def decide_status(seen: Seen, former: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """The whole status that this version owns; None stands for a field that must be absent."""
    alive = [pod for pod in seen.pods if not pod.terminating]
    answering = 0 if seen.spec.jupyter else sum(pod.ready and not pod.draining for pod in alive)
    workloads = _workloads_ready(seen, alive)
    decided = (
        _ready(seen, alive, workloads),
        workloads,
        _scaling_ready(seen.replicas),
        _metering_ready(alive, seen.spec),
        *_plan_found(seen, former.get("conditions") or ()),
        _stopped(seen.spec),
    )
    return {
        "observedGeneration": seen.spec.generation,
        "replicas": len(alive),
        "readyReplicas": answering,
        "selector": workload.selector(seen.spec.name),
        "url": workload.url(seen.spec),
        "modelStatus": _model_status(seen, alive),
        **_measured(seen.figures),
        **_capacity(seen, alive, former.get("capacity") or {}, now),
        "conditions": follow(former.get("conditions") or [], decided, seen.spec.generation, now),
    }


def _capacity(
    seen: Seen, alive: Sequence[PodState], former: Mapping[str, Any], now: datetime
) -> dict[str, Mapping[str, Any]]:
    """What one worker can do: told once for a profile, and kept while nobody runs. Workers of a kind measure alike."""
    told = [pod.capacity for pod in alive if pod.ready and pod.capacity and pod.template_hash == seen.template_hash]
    if not told or former.get("profileHash") in {one.get("profileHash") for one in told}:
        return {}
    gone = dict.fromkeys(former.keys() - told[0].keys())
    return {"capacity": {**gone, **told[0], "measuredAt": timestamp(now)}}


def _measured(figures: Figures | None) -> dict[str, Any]:
    if figures is None:
        return {}
    return {
        "queueLength": figures.queue_length,
        "gpuUtilization": figures.gpu_percent,
        "scalingHistory": [dict(one) for one in figures.history] or None,
    }


def decide_leaving(
    former: Mapping[str, Any], generation: int, pods_left: int, deadline: str, now: datetime
) -> dict[str, Any]:
    """The status of a service that is being deleted while its workers hand over their last records."""
    if pods_left:
        one = pods_left == 1
        message = (
            f"{_count(pods_left, 'worker')} {'finishes' if one else 'finish'} running requests and "
            f"{'hands' if one else 'hand'} over the last usage records before the service goes, "
            f"at the latest at {deadline}."
        )
    else:
        message = "No worker runs any more; the service goes in a moment."
    ready = Condition("Ready", "False", "Deleting", message)
    others = [
        Condition(one["type"], one["status"], one["reason"], one["message"])
        for one in former.get("conditions") or []
        if one["type"] != "Ready"
    ]
    return {
        "replicas": pods_left,
        "readyReplicas": 0,
        "conditions": follow(former.get("conditions") or [], [ready, *others], generation, now),
    }


def changes(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch from `former` to `wanted`, empty when nothing changed; fields not in `wanted` are left alone."""
    patch: dict[str, Any] = {}
    for key, value in wanted.items():
        old = former.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if inner := changes(old, value):
                patch[key] = inner
        elif isinstance(value, Mapping):
            patch[key] = {name: one for name, one in value.items() if one is not None}
        elif old != value:
            patch[key] = value
    return patch


def is_only_progress(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all that `wanted` says more than `former` is how far a start is, which may be untrue a second later.

    Never an error, never that a service serves or serves no more, and never what has become of an edit.
    """
    if not _is_starting(wanted):
        return False
    edited = former.get("observedGeneration") != wanted.get("observedGeneration")
    return not former.get("conditions") or (_is_starting(former) and not edited)


def _is_starting(status: Mapping[str, Any]) -> bool:
    ready: Mapping[str, Any] = next((one for one in status.get("conditions") or () if one.get("type") == "Ready"), {})
    return ready.get("status") == "False" and ready.get("reason") in STARTING


def _workloads_ready(seen: Seen, alive: Sequence[PodState]) -> Condition:
    wanted = seen.replicas.wanted
    ready = sum(pod.ready for pod in alive)
    current = [pod for pod in alive if pod.template_hash == seen.template_hash]
    current_ready = sum(pod.ready for pod in current)
    former = " The former workers go on serving." if ready > current_ready else ""

    def not_ready(problem: Problem) -> Condition:
        return Condition("WorkloadsReady", "False", problem.reason, problem.message)

    if seen.problems:
        return not_ready(_joined(seen.problems))
    if (refusal := replica_failure(seen.deployment)) is not None:
        return not_ready(Problem(refusal.reason, f"{refusal.message}{_MAKE_ROOM if former else ''}{former}"))
    if (problem := _main_problem(current)) is not None:
        affected = sum(pod.problem is not None and pod.problem.reason == problem.reason for pod in current)
        if ready:
            room = _MAKE_ROOM if former and problem.reason == "InsufficientCapacity" else ""
            return not_ready(
                Problem(problem.reason, f"{affected} of {_count(wanted, 'worker')}: {problem.message}{room}{former}")
            )
        return not_ready(problem)
    if current_ready < wanted:
        loading = [pod for pod in current if pod.started and not pod.ready]
        if (stuck := _out_of_time(seen.deployment)) is not None and not _progress(loading):
            return not_ready(
                Problem(stuck.reason, f"{current_ready} of {_count(wanted, 'worker')}: {stuck.message}{former}")
            )
        if loading:
            told = _progress(loading)
            far = f"{len(loading)} loading the model{f': {told}' if told else ''}"
            return not_ready(
                Problem(
                    "ModelLoading",
                    f"{current_ready} of {_count(wanted, 'worker')} ready; {far}.{former}",
                )
            )
        return not_ready(
            Problem(
                "PodsStarting",
                f"{current_ready} of {_count(wanted, 'worker')} ready; the others are starting.{former}",
            )
        )
    if len(alive) > wanted:
        return not_ready(
            Problem(
                "PodsLeaving", f"{_count(wanted, 'worker')} wanted; {len(alive) - wanted} more are on their way out."
            )
        )
    if wanted == 0:
        return Condition("WorkloadsReady", "True", "NoneWanted", "No worker is wanted, and none runs.")
    return Condition("WorkloadsReady", "True", "AllReady", f"{current_ready} of {_count(wanted, 'worker')} ready.")


def _ready(seen: Seen, alive: Sequence[PodState], workloads: Condition) -> Condition:
    """Ready tells whether requests are answered; its reason tells what is wrong even while some are."""
    ready = sum(pod.ready and (seen.spec.jupyter or not pod.draining) for pod in alive)
    if seen.problems:
        serving = f" {_count(ready, 'former worker')} still serving." if ready else ""
        return Condition("Ready", "True" if ready else "False", workloads.reason, workloads.message + serving)
    if seen.spec.stopped:
        return Condition(
            "Ready", "False", "Stopped", f"Stopped by the annotation {STOP_ANNOTATION}; remove it to start the service."
        )
    if seen.replicas.wanted == 0:
        if seen.spec.scaling is not None:
            return Condition("Ready", "False", AT_ZERO, at_zero(seen.spec.scaling))
        return Condition(
            "Ready", "False", AT_ZERO, "spec.replicas is 0, so nothing answers; raise it to start workers."
        )
    if not ready and workloads.status == "True":
        message = (
            f"Of {_count(len(alive), 'worker')} each finishes what it has and gets no new requests "
            f"({DRAINING_LABEL} on its pod); the next request keeps or starts one."
        )
        return Condition("Ready", "False", "WorkersDraining", message)
    if not ready:
        return Condition("Ready", "False", workloads.reason, workloads.message)
    if seen.spec.jupyter:
        told = how_to_open(seen.spec)
        return Condition("Ready", "False", told.reason, told.message)
    if workloads.status == "True" or workloads.reason == "PodsLeaving":
        return Condition("Ready", "True", "Serving", f"{_count(ready, 'worker')} ready.")
    return Condition("Ready", "True", workloads.reason, workloads.message)


def _scaling_ready(replicas: Replicas) -> Condition:
    return Condition("ScalingReady", "True" if replicas.followed else "False", replicas.reason, replicas.message)


def _metering_ready(alive: Sequence[PodState], spec: ServiceSpec) -> Condition:
    if spec.jupyter:
        return Condition("MeteringReady", "False", NOT_METERED.reason, NOT_METERED.message)
    for pod in alive:
        if pod.problem is not None and pod.problem.reason in UNMETERED:
            return Condition("MeteringReady", "False", pod.problem.reason, pod.problem.message)
    ready = sum(pod.ready for pod in alive)
    standing_in = [pod.stand_in for pod in alive if pod.ready and pod.stand_in is not None]
    if standing_in:
        # Every nanosecond is metered and its total is right: that it is split by a stand-in is told and stops nobody.
        return Condition(
            "MeteringReady",
            "True",
            standing_in[0].reason,
            f"{len(standing_in)} of {_count(ready, 'worker')}: {standing_in[0].message}",
        )
    if ready:
        return Condition(
            "MeteringReady",
            "True",
            "JournalsWritable",
            f"{_count(ready, 'worker')} ready; a worker is ready only while its usage journal can be written.",
        )
    return Condition("MeteringReady", "Unknown", "NoWorkerReady", "No worker is ready, so nothing is metered.")


def _plan_found(seen: Seen, former: Sequence[Mapping[str, Any]]) -> Sequence[Condition]:
    """Whether there is the PricePlan that the service names; serving and metering do not depend on it."""
    plan = seen.spec.price_plan
    if seen.has_plan is None:
        return [Condition(PLAN_FOUND, *_words(one)) for one in former if one["type"] == PLAN_FOUND]
    if seen.has_plan:
        return [Condition(PLAN_FOUND, "True", "PlanFound", f"There is a PricePlan called {plan}.")]
    message = (
        f"There is no PricePlan called {plan}, so usage is metered and reported without amounts. Create it, or name "
        "another one in spec.pricing.planRef (kubectl get priceplans)."
    )
    return [Condition(PLAN_FOUND, "False", "NoPricePlan", message)]


def plan_missing(spec: ServiceSpec, former: Mapping[str, Any], status: Mapping[str, Any]) -> Problem | None:
    """That the plan which the service names is not there, where that is news. The default plan need not be."""
    before, now = (
        [_words(one) for one in told.get("conditions") or () if one["type"] == PLAN_FOUND] for told in (former, status)
    )
    if not now or now == before or now[0][0] != "False" or spec.price_plan == DEFAULT_PLAN:
        return None
    return Problem(*now[0][1:])


def _words(condition: Mapping[str, Any]) -> tuple[str, str, str]:
    return condition["status"], condition["reason"], condition["message"]


def _stopped(spec: ServiceSpec) -> Condition:
    if spec.stopped:
        return Condition("Stopped", "True", "StopAnnotation", f"The annotation {STOP_ANNOTATION} is true.")
    return Condition("Stopped", "False", "NotStopped", f"The annotation {STOP_ANNOTATION} is not set.")


def _model_status(seen: Seen, alive: Sequence[PodState]) -> dict[str, Any]:
    failures = [pod.failure for pod in alive if pod.failure is not None]
    state = _model_state(seen, alive)
    progress = _progress(alive) if state == "Loading" else ""
    return {"state": state, "progress": progress or None, "lastFailureInfo": _failure_info(failures)}


def _progress(pods: Sequence[PodState]) -> str:
    """How far the first worker is that tells; with several that start, the others are not far from it."""
    return next((pod.loading for pod in pods if pod.loading), "")


def _model_state(seen: Seen, alive: Sequence[PodState]) -> str:
    if seen.spec.jupyter and not seen.problems:
        return "Standby"
    if any(pod.ready for pod in alive):
        return "Loaded"
    if any(pod.failure is not None for pod in alive):
        return "FailedToLoad"
    if any(pod.started for pod in alive):
        return "Loading"
    return "Pending" if seen.problems or seen.replicas.wanted else "Standby"


def _failure_info(failures: Sequence[Failure]) -> dict[str, Any] | None:
    if not failures:
        return None
    last = max(failures, key=lambda failure: failure.finished_at)
    info = {"reason": last.problem.reason, "message": last.problem.message}
    return {**info, "modelRevision": last.revision or None, "time": last.finished_at or None}


def replica_failure(deployment: Mapping[str, Any] | None) -> Problem | None:
    """Pods that cannot even be created: quota, admission, a missing service account."""
    for condition in ((deployment or {}).get("status") or {}).get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = condition.get("message", "")
            reason = "QuotaExceeded" if "exceeded quota" in message else "PodsRefused"
            return Problem(
                reason,
                f"The cluster refuses to create worker pods: {message.strip().rstrip('.')}. Lower spec.resources or "
                "spec.replicas, or ask who runs the cluster for more.",
            )
    return None


def _out_of_time(deployment: Mapping[str, Any] | None) -> Problem | None:
    """A rollout that the Deployment has given up, while no pod of it says what is wrong."""
    for condition in ((deployment or {}).get("status") or {}).get("conditions") or []:
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return Problem(
                "ProgressDeadlineExceeded",
                f"no further worker got ready in {workload.START_TIMEOUT_S // 60} minutes; see "
                "kubectl describe pod and kubectl logs of those that are not.",
            )
    return None


def _main_problem(pods: Sequence[PodState]) -> Problem | None:
    """The most frequent problem; a worker's own words before what the cluster says about others."""
    found = [(pod.problem, pod.failure is not None) for pod in pods if pod.problem is not None]
    if not found:
        return None
    counted = Counter(problem.reason for problem, _ in found)
    return max(found, key=lambda one: (one[1], counted[one[0].reason]))[0]


def _joined(problems: Sequence[Problem]) -> Problem:
    reasons = {problem.reason for problem in problems}
    reason = problems[0].reason if len(reasons) == 1 else "SpecInvalid"
    return Problem(reason, " ".join(problem.message for problem in problems))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
