"""What the operator's mirrors take for a service that is well: what is kept for nothing shows here."""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

from gpumeter_operator.adapters.kubernetes import Keep, Labels, Manifest, Resource, whole
from gpumeter_operator.decide.access import Peers
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build
from gpumeter_operator.flow.fleet import Fleet

SERVICES = 50
KIB_MAX = 30
INSTALLATION = Installation(
    "registry.example.com/gpumeter-worker:1.0.0", "IfNotPresent", "http://gpumeter-gateway.gpumeter-system.svc",
    peers=Peers(({"podSelector": {}},), ({"podSelector": {}},)),
)  # fmt: skip


class Lists:
    """An API server that lists what it was given, each time decoded anew, and never tells of a change."""

    def __init__(self, objects: list[Manifest]) -> None:
        self._text = json.dumps(objects)

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[list[Manifest], str]:
        return [keep(one) for one in json.loads(self._text) if one["kind"] == resource.kind], "7"

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        await asyncio.Event().wait()
        yield "", {}


def of_a_service(number: int) -> list[Manifest]:
    """Its owned objects and its pod, as an API server has them when it is well."""
    uid = f"00000000-0000-0000-0000-{number:012}"
    metadata = {"namespace": "team-a", "name": f"service-{number}", "uid": uid, "generation": 1}
    spec, _ = read({"metadata": metadata, "spec": {"model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}}})
    workload = build(spec, 1, INSTALLATION, credentials_of(b"k" * 32, uid), monitored=False)
    told = {"status": "True", "lastTransitionTime": "2026-11-21T10:00:00Z", "reason": "Because", "message": "It is so."}
    conditions = [{"type": f"Condition{one}", **told} for one in range(4)]
    main = {
        "name": "main", "image": INSTALLATION.worker_image, "imageID": "registry.example.com/gpumeter-worker@sha256:0",
        "state": {"running": {"startedAt": "2026-11-21T10:00:00Z"}}, "ready": True, "restartCount": 0, "lastState": {},
    }  # fmt: skip
    status: dict[str, Any] = {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}
    template = workload.deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "namespace": "team-a", "name": f"service-{number}-abcde-fghij"},
        "spec": {**template["spec"], "nodeName": "node-1", "schedulerName": "default-scheduler"},
        "status": {**status, "conditions": conditions, "containerStatuses": [main]},
    }
    found = [*workload.others[:-1], {**workload.deployment, "status": {"conditions": conditions[:2]}}, pod]
    for one in found:
        one["metadata"] |= {"uid": uid, "resourceVersion": "12345", "creationTimestamp": "2026-11-21T10:00:00Z"}
    return found


async def test_what_is_mirrored_of_a_service_is_a_few_dozen_kibibytes() -> None:
    source = Lists([one for number in range(SERVICES) for one in of_a_service(number)])
    fleet = Fleet(source)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        await fleet.start()
        gc.collect()
        kib = (tracemalloc.get_traced_memory()[0] - before) / SERVICES / 1_024
    finally:
        tracemalloc.stop()
        await fleet.stop()
    assert len(fleet.pods_of("team-a", "service-1")) == 1 and fleet.deployment("team-a", "service-1") is not None
    assert kib < KIB_MAX
