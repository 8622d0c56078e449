"""Owned objects: brought to what their manifests say, and not written when they say it already.

Owns the comparison before writing, the check that a name is free or ours, and what a refusal means to the user. Does
not decide what the manifests are.
"""

import logging
from collections.abc import Callable

from gpumeter_operator.adapters.kubernetes import RESOURCES, Manifest, Refused
from gpumeter_operator.decide.drift import covers
from gpumeter_operator.decide.names import APPLIED_ANNOTATION, CREDENTIALS_ANNOTATION
from gpumeter_operator.decide.spec import Problem, ServiceSpec
from gpumeter_operator.decide.workload import Workload
from gpumeter_operator.flow.api import Api
from gpumeter_operator.flow.fleet import Fleet, controller_uid

log = logging.getLogger(__name__)

FIELD_MANAGER = "gpumeter-operator"
BESIDE = ("PodMonitor",)  # nobody is served worse without it, so a refusal is told in the log and stops nothing
SECRET_AGAIN_NS = (
    20_000_000_000  # between two writes of a Secret whose pods are stuck: a user should see it cured in 30 s
)
_TRY_AGAIN = (409, 429, 500, 502, 503, 504)


class Children:
    """Applies workloads; remembers which observed versions were found settled, so that looking again costs nothing."""

    def __init__(self, cluster: Api, fleet: Fleet, on_write: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._on_write = on_write
        self._fleet = fleet
        self._settled: dict[tuple[str, str, str], tuple[str, str]] = {}
        self._secret_written_ns: dict[str, int] = {}
        self._told: dict[tuple[str, str], str] = {}

    async def bring(
        self, spec: ServiceSpec, workload: Workload, *, stuck: bool, now_ns: int
    ) -> tuple[bool, tuple[Problem, ...]]:
        """Write whatever differs: whether anything was written, and why something could not be.

        `stuck` says that pods wait for something that may be a deleted Secret.
        """
        written = False
        try:
            if self._secret_due(spec, workload, stuck=stuck, now_ns=now_ns):
                for secret in workload.secrets:
                    await self._write(secret)
                self._secret_written_ns[spec.uid] = now_ns
                written = True
            for manifest in workload.others:
                observed = self._fleet.owned(manifest)
                if observed is not None and self._is_settled(observed, manifest):
                    continue
                if (problem := await self._name_taken(spec, manifest, observed)) is not None:
                    if manifest["kind"] in BESIDE:
                        self._tell_once(spec, manifest["kind"], problem.message)
                        continue
                    return written, (problem,)
                try:
                    applied = await self._write(manifest)
                except Refused as refusal:
                    if manifest["kind"] not in BESIDE:
                        raise
                    self._tell_once(spec, manifest["kind"], f"The cluster refuses it: {refusal}")
                    continue
                self._remember(applied, manifest)
                self._fleet.learn(applied)
                written = True
            for manifest in workload.absent:
                written |= await self._remove(spec, manifest)
        except Refused as refusal:
            if _may_pass(refusal):
                raise
            return written, (_refusal(refusal),)
        return written, ()

    def forget(self, spec: ServiceSpec) -> None:
        """Drop what is remembered of a service that goes."""
        self._secret_written_ns.pop(spec.uid, None)
        for kind in BESIDE:
            self._told.pop((spec.uid, kind), None)
        names = (spec.name, f"{spec.name}-usage")
        for key in [key for key in self._settled if key[1] == spec.namespace and key[2] in names]:
            del self._settled[key]

    def _tell_once(self, spec: ServiceSpec, kind: str, message: str) -> None:
        if self._told.get((spec.uid, kind)) != message:
            self._told[spec.uid, kind] = message
            log.warning("%s has no %s: %s", spec.reference, kind, message)

    async def _write(self, manifest: Manifest) -> Manifest:
        applied = await self._cluster.apply(manifest, field_manager=FIELD_MANAGER)
        self._on_write(manifest["kind"])
        return applied

    async def stop(self, spec: ServiceSpec) -> bool:
        """End the workers of a service whose spec cannot be applied, so that it cannot be set to none either."""
        deployment = self._fleet.deployment(spec.namespace, spec.name)
        return deployment is not None and await self._remove(spec, deployment)

    async def _remove(self, spec: ServiceSpec, manifest: Manifest) -> bool:
        """Delete what is not wanted any more, if it is there and ours."""
        observed = self._fleet.owned(manifest)
        if observed is None or controller_uid(observed) != spec.uid or "deletionTimestamp" in observed["metadata"]:
            return False
        resource, metadata = RESOURCES[manifest["apiVersion"], manifest["kind"]], observed["metadata"]
        await self._cluster.delete(resource, metadata["name"], spec.namespace, uid=metadata["uid"])
        self._on_write(manifest["kind"])
        return True

    def _secret_due(self, spec: ServiceSpec, workload: Workload, *, stuck: bool, now_ns: int) -> bool:
        # The operator may not read Secrets. A Deployment that names these credentials was written after their Secret,
        # so its presence says that the Secret was there; pods that wait say that it may have gone.
        written_ns = self._secret_written_ns.get(spec.uid)
        if written_ns is not None:
            return stuck and now_ns - written_ns > SECRET_AGAIN_NS
        observed = self._fleet.owned(workload.deployment)
        if observed is None or stuck:
            return True
        annotations = observed["spec"]["template"]["metadata"].get("annotations") or {}
        return bool(annotations.get(CREDENTIALS_ANNOTATION) != workload.credentials_fingerprint)

    def _is_settled(self, observed: Manifest, manifest: Manifest) -> bool:
        wanted = manifest["metadata"]["annotations"][APPLIED_ANNOTATION]
        known = (observed["metadata"]["resourceVersion"], wanted)
        if self._settled.get(_key(manifest)) == known:
            return True
        stamp = (observed["metadata"].get("annotations") or {}).get(APPLIED_ANNOTATION)
        settled = stamp == wanted and covers(observed, manifest)
        if settled:
            self._settled[_key(manifest)] = known
        return settled

    def _remember(self, applied: Manifest, manifest: Manifest) -> None:
        # Should the API server write a value in a form that `covers` does not know, this version is settled all the
        # same: it is what our own apply made.
        stamp = manifest["metadata"]["annotations"][APPLIED_ANNOTATION]
        self._settled[_key(manifest)] = (applied["metadata"]["resourceVersion"], stamp)

    async def _name_taken(self, spec: ServiceSpec, manifest: Manifest, observed: Manifest | None) -> Problem | None:
        """Server-side apply with force would take over anyone's object of the same name; so look first."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if observed is None:
            observed = await self._cluster.get(RESOURCES[manifest["apiVersion"], kind], name, spec.namespace)
            if observed is None:
                return None
            ours = controller_uid(observed) == spec.uid
            if not ours:
                return Problem(
                    "NameTaken",
                    f"The namespace {spec.namespace} has a {kind} called {name} that gpumeter did not make; "
                    "delete or rename it, or give the InferenceService another name.",
                )
        if controller_uid(observed) not in (None, spec.uid):
            return Problem(
                "NameTaken",
                f"The {kind} {name} in {spec.namespace} still belongs to another owner, most likely to a deleted "
                "service of the same name; it is taken over as soon as it is gone.",
            )
        return None


def _may_pass(refusal: Refused) -> bool:
    """Whether the same write may be taken later. A field that no schema has is answered with 500 and never is."""
    if "failed to create typed patch object" in refusal.message:
        return False
    return refusal.status in _TRY_AGAIN or "because it is being terminated" in refusal.message


def _refusal(refusal: Refused) -> Problem:
    return Problem(
        "WorkloadRefused",
        f"The API server refuses what the service needs: {refusal.message.rstrip('.')}. "
        "Check spec.template and spec.resources, and the policies of the namespace.",
    )


def _key(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]
