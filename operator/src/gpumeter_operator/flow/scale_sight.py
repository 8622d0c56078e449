"""What the autoscaler sees of one service: its workers, its Deployment, what waits at the gateways.

Owns the reading of these from the mirrors. Does not know what is decided, nor how workers are asked.
"""

from collections.abc import Callable, Mapping
from datetime import datetime

from gpumeter_operator.adapters.kubernetes import Manifest
from gpumeter_operator.decide.autoscale import Sight, Worker
from gpumeter_operator.decide.crew import Door, Load, Replica, is_former, is_notebook, replica_of
from gpumeter_operator.decide.names import TEMPLATE_ANNOTATION
from gpumeter_operator.decide.pods import belongs, describe
from gpumeter_operator.decide.spec import Problem, ServiceSpec
from gpumeter_operator.decide.status import replica_failure
from gpumeter_operator.flow.fleet import Fleet
from gpumeter_operator.flow.scale_held import Held
from gpumeter_operator.flow.scale_ports import Doors


class Sights:
    """Reads mirrors; remembers what it read of a pod until the pod changes."""

    def __init__(self, fleet: Fleet, doors: Doors, clock: Callable[[], datetime]) -> None:
        self._fleet = fleet
        self._doors = doors
        self._clock = clock
        self._crews: dict[str, tuple[str, Replica | None]] = {}

    def crew(self, service: Manifest) -> list[Replica]:
        """Its workers that are not on their way out."""
        metadata = service["metadata"]
        crew = []
        for pod in self._fleet.pods_of(metadata["namespace"], metadata["name"]):
            if belongs(pod, metadata["uid"]) and not is_notebook(pod) and (one := self._replica(pod)) is not None:
                crew.append(one)
        return crew

    def sight(self, held: Held, crew: list[Replica], loads: Mapping[str, Load]) -> Sight:
        """What is decided by."""
        spec = held.spec
        serving = [one for one in crew if not one.draining]
        template = self.template(spec)
        blocked = replica_failure(self._fleet.deployment(spec.namespace, spec.name))
        if blocked is None and any(not one.placed for one in serving):
            blocked = self._unplaced(spec)
        return Sight(
            replicas=held.wanted or 0,
            workers=tuple(Worker(one.ready, one.placed, loads.get(one.uid)) for one in serving),
            door=self.door(spec),
            batch=spec.max_batch_size,
            blocked=blocked,
            rolling=any(one.ready and is_former(one, template) for one in serving),
        )

    def deployed(self, spec: ServiceSpec) -> int | None:
        """What the Deployment has, whatever it was asked for; None before there is one."""
        deployment = self._fleet.deployment(spec.namespace, spec.name)
        return None if deployment is None else int((deployment.get("spec") or {}).get("replicas", 1))

    def template(self, spec: ServiceSpec) -> str:
        """The hash of the template that the Deployment makes pods from; empty before there is one."""
        deployment = (self._fleet.deployment(spec.namespace, spec.name) or {}).get("spec") or {}
        annotations = ((deployment.get("template") or {}).get("metadata") or {}).get("annotations") or {}
        return str(annotations.get(TEMPLATE_ANNOTATION, ""))

    def door(self, spec: ServiceSpec) -> Door:
        """What waits at the gateways for it."""
        one, known = self._doors.asked().get(spec.reference), not self._doors.silent()
        return Door(known=known) if one is None else Door(one.waiting, one.in_flight, known)

    def _replica(self, pod: Manifest) -> Replica | None:
        uid, version = pod["metadata"]["uid"], pod["metadata"].get("resourceVersion", "")
        known = self._crews.get(uid)
        if known is None or known[0] != version:
            if len(self._crews) > 20_000:  # pods that went; rather read again than looked for
                self._crews.clear()
            known = self._crews[uid] = version, replica_of(pod)
        return known[1]

    def _unplaced(self, spec: ServiceSpec) -> Problem | None:
        """The scheduler's words about a pod that has no node."""
        for pod in self._fleet.pods_of(spec.namespace, spec.name):
            if belongs(pod, spec.uid) and not (pod.get("spec") or {}).get("nodeName"):
                problem = describe(pod, spec.gpu_resource_name, self._clock()).problem
                if problem is not None and problem.reason in ("InsufficientCapacity", "Unschedulable"):
                    return problem
        return None
