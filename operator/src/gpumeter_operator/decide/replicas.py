"""How many workers a service should have, and why.

Owns that number and the words for it. Does not know which workers there are, nor how the number is reached.
"""

from dataclasses import dataclass

from gpumeter_operator.decide.spec import ServiceSpec


@dataclass(frozen=True, slots=True)
class Replicas:
    """A decision: `wanted` workers. `followed` is false where the number is not what the spec asks for."""

    wanted: int
    followed: bool
    reason: str
    message: str


def decide_replicas(spec: ServiceSpec) -> Replicas:
    """The number of workers. Without an autoscaler, spec.scaling starts a fixed number, and at least one."""
    if spec.stopped:
        return Replicas(0, False, "Stopped", "The service is stopped, so nothing is scaled.")
    if spec.min_replicas is not None:
        wanted = max(spec.min_replicas, 1)
        return Replicas(
            wanted,
            False,
            "NotSupported",
            f"This version does not scale by itself yet: it runs {_workers(wanted)} (spec.scaling.minReplicas, and "
            "at least one). Replace spec.scaling by spec.replicas to choose the number.",
        )
    if spec.replicas is None:
        return Replicas(1, True, "FixedReplicas", "Neither spec.replicas nor spec.scaling is set, so one worker runs.")
    return Replicas(
        spec.replicas,
        True,
        "FixedReplicas",
        f"spec.replicas fixes {_workers(spec.replicas)}; kubectl scale, an HPA or KEDA may change it.",
    )


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"
