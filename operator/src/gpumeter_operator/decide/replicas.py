"""How many workers a service's Deployment has, and why.

Owns the choice between the three who may say it: the annotation that stops a service, spec.replicas, and the
autoscaler. Does not know how the autoscaler decides, which workers there are, nor how the number is reached.
"""

from dataclasses import dataclass

from gpumeter_operator.decide.autoscale import STEADY, following
from gpumeter_operator.decide.scaling import Scaling
from gpumeter_operator.decide.spec import Problem, ServiceSpec

HINDERED = "DeploymentNotWritten"


@dataclass(frozen=True, slots=True)
class Replicas:
    """A decision: `wanted` workers. `followed` is false where the number is not what the spec asks for."""

    wanted: int
    followed: bool
    reason: str
    message: str


def decide_replicas(spec: ServiceSpec, autoscaled: Replicas | None = None) -> Replicas:
    """The number of workers. `autoscaled` is the autoscaler's, where it has looked at the service."""
    if spec.stopped:
        return Replicas(0, False, "Stopped", "The service is stopped, so nothing is scaled.")
    if spec.scaling is not None:
        return autoscaled or at_first(spec.scaling, None)
    if spec.replicas is None:
        return Replicas(1, True, "FixedReplicas", "Neither spec.replicas nor spec.scaling is set, so one worker runs.")
    return Replicas(
        spec.replicas,
        True,
        "FixedReplicas",
        f"spec.replicas fixes {_workers(spec.replicas)}; kubectl scale, an HPA or KEDA may change it.",
    )


def hindered(replicas: Replicas, problem: Problem) -> Replicas:
    """The same number, which cannot be reached or left while the Deployment cannot be written."""
    message = f"The number of workers stays as it is, because the Deployment cannot be written: {problem.message}"
    return Replicas(replicas.wanted, False, HINDERED, message)


def at_first(scaling: Scaling, deployed: int | None) -> Replicas:
    """Where the autoscaler begins: at what the Deployment has, or at least one, so that it is seen to become ready."""
    begun = max(scaling.least, 1) if deployed is None else deployed
    return Replicas(min(begun, scaling.most), True, STEADY, following(scaling))


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"
