"""Owned objects: brought to what their manifests say, and not written when they say it already.

Owns the comparison before writing, that nobody else's object of a name is touched, and what a refusal means to the
user. Does not decide what the manifests are.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from gpumeter_operator.adapters.kubernetes import RESOURCES, SECRETS, Manifest, Refused
from gpumeter_operator.decide.drift import covers
from gpumeter_operator.decide.names import (
    APPLIED_ANNOTATION,
    CREDENTIALS_ANNOTATION,
    MANAGED_BY_LABEL,
    SERVICE_LABEL,
)
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
TOLD_AFTER_NS = 30_000_000_000  # a refusal that passes is nobody's concern until it has lasted for so long
_CONFLICT = 409
_TRY_AGAIN = (_CONFLICT, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class _Refusals:
    """Refusals of one service's objects that may pass and have not yet. The words are those of the first of a status:
    some hold a port or a time of their own, and would make a status of each look.
    """

    since_ns: int
    status: int
    message: str


class Children:
    """Applies workloads; remembers which observed versions were found settled, so that looking again costs nothing."""

    def __init__(self, cluster: Api, fleet: Fleet, on_write: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._on_write = on_write
        self._fleet = fleet
        self._settled: dict[tuple[str, str, str], tuple[str, str]] = {}
        self._secrets_written: dict[str, tuple[str, int]] = {}  # by service: of which credentials, and when
        self._refusals: dict[str, _Refusals] = {}
        self._told: dict[tuple[str, str], str] = {}

    async def bring(
        self, spec: ServiceSpec, workload: Workload, *, stuck: bool, now_ns: int
    ) -> tuple[bool, tuple[Problem, ...]]:
        """Write whatever differs: whether anything was written, and why something could not be.

        `stuck` says that pods wait for something that may be a deleted Secret. Raises Refused for what may be taken
        later, until that has lasted so long that the user should know.
        """
        try:
            written, problems = await self._bring_all(spec, workload, stuck=stuck, now_ns=now_ns)
        except Refused as refusal:
            if not _may_pass(refusal):
                return False, (_refusal(refusal),)
            told = self._refusals.get(spec.uid)
            if told is None or told.status != refusal.status:
                since_ns = told.since_ns if told else now_ns
                told = self._refusals[spec.uid] = _Refusals(since_ns, refusal.status, refusal.message)
            if now_ns - told.since_ns < TOLD_AFTER_NS:
                raise
            return False, (_not_taken(told.message),)
        self._refusals.pop(spec.uid, None)
        return written, problems

    async def _bring_all(
        self, spec: ServiceSpec, workload: Workload, *, stuck: bool, now_ns: int
    ) -> tuple[bool, tuple[Problem, ...]]:
        written = False
        if self._secret_due(spec, workload, stuck=stuck, now_ns=now_ns):
            for secret in workload.secrets:
                if (problem := await self._bring_secret(spec, secret)) is not None:
                    return written, (problem,)
                written = True
            self._secrets_written[spec.uid] = (workload.credentials_fingerprint, now_ns)
        for manifest in workload.others:
            observed = self._fleet.owned(manifest)
            if observed is not None and self._is_settled(observed, manifest):
                continue
            try:
                applied = await self._bring_one(spec, manifest, observed)
            except Refused as refusal:
                if manifest["kind"] not in BESIDE:
                    raise
                self._tell_once(spec, manifest["kind"], f"The cluster refuses it: {refusal}")
                continue
            if isinstance(applied, Problem):
                if manifest["kind"] in BESIDE:
                    self._tell_once(spec, manifest["kind"], applied.message)
                    continue
                return written, (applied,)
            self._remember(applied, manifest)
            self._fleet.learn(applied)
            written = True
        for manifest in workload.absent:
            written |= await self._remove(spec, manifest)
        return written, ()

    def forget(self, spec: ServiceSpec) -> None:
        """Drop what is remembered of a service that goes."""
        self._secrets_written.pop(spec.uid, None)
        self._refusals.pop(spec.uid, None)
        for kind in BESIDE:
            self._told.pop((spec.uid, kind), None)
        names = (spec.name, f"{spec.name}-usage")
        for key in [key for key in self._settled if key[1] == spec.namespace and key[2] in names]:
            del self._settled[key]

    def _tell_once(self, spec: ServiceSpec, kind: str, message: str) -> None:
        if self._told.get((spec.uid, kind)) != message:
            self._told[spec.uid, kind] = message
            log.warning("%s has no %s: %s", spec.reference, kind, message)

    async def _bring_one(self, spec: ServiceSpec, manifest: Manifest, observed: Manifest | None) -> Manifest | Problem:
        """Write one object; a problem where its name is somebody else's.

        Server-side apply with force would take over anyone's object of the same name, and the mirrors hold only what
        has our labels. So what no mirror has is written only if there is nothing of that name: the API server decides
        that in the write itself, so nobody can come between, and a free name costs no request of its own. It refuses
        where there is something, and then we look who has it: a mirror may be behind, and it is ours.
        """
        if observed is None:
            try:
                return await self._write(manifest, only_new=True)
            except Refused as refusal:
                if refusal.status != _CONFLICT:
                    raise
            metadata = manifest["metadata"]
            resource = RESOURCES[manifest["apiVersion"], manifest["kind"]]
            found = await self._cluster.get(resource, metadata["name"], metadata["namespace"])
            if found is not None and controller_uid(found) != spec.uid:
                return _taken(spec, manifest)
        elif controller_uid(observed) not in (None, spec.uid):
            return _still_taken(spec, manifest)
        return await self._write(manifest)

    async def _bring_secret(self, spec: ServiceSpec, manifest: Manifest) -> Problem | None:
        """Write one Secret; a problem where its name is somebody else's.

        No mirror has Secrets, and the operator may not read them. A patch with nothing in it changes nothing, needs no
        further right, and answers with the object.
        """
        try:
            await self._write(manifest, only_new=True)
        except Refused as refusal:
            if refusal.status != _CONFLICT:
                raise
        else:
            return None
        metadata = manifest["metadata"]
        found = await self._cluster.patch(SECRETS, metadata["name"], metadata["namespace"], {})
        if found is not None and (owner := controller_uid(found)) != spec.uid:
            if not _is_labelled(found, manifest):
                return _taken(spec, manifest)
            if owner is not None:
                return _still_taken(spec, manifest)
        await self._write(manifest)
        return None

    async def _write(self, manifest: Manifest, *, only_new: bool = False) -> Manifest:
        applied = await self._cluster.apply(manifest, field_manager=FIELD_MANAGER, only_new=only_new)
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
        mark, written_ns = self._secrets_written.get(spec.uid, ("", 0))
        if mark:
            return mark != workload.credentials_fingerprint or (stuck and now_ns - written_ns > SECRET_AGAIN_NS)
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


def _is_labelled(found: Manifest, manifest: Manifest) -> bool:
    """Whether an object that no mirror could have shown has the labels by which mirrors take ours."""
    labels, ours = found["metadata"].get("labels") or {}, manifest["metadata"]["labels"]
    return all(labels.get(name) == ours[name] for name in (MANAGED_BY_LABEL, SERVICE_LABEL))


def _taken(spec: ServiceSpec, manifest: Manifest) -> Problem:
    return Problem(
        "NameTaken",
        f"The namespace {spec.namespace} has a {manifest['kind']} called {manifest['metadata']['name']} that gpumeter "
        "did not make; delete or rename it, or give the InferenceService another name.",
    )


def _still_taken(spec: ServiceSpec, manifest: Manifest) -> Problem:
    return Problem(
        "NameTaken",
        f"The {manifest['kind']} {manifest['metadata']['name']} in {spec.namespace} still belongs to another owner, "
        "most likely to a deleted service of the same name; it is taken over as soon as it is gone.",
    )


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


def _not_taken(message: str) -> Problem:
    return Problem(
        "WorkloadNotTaken",
        f"The API server does not take what the service needs, and says that it may later: {message.rstrip('.')}. "
        "It is tried again; if this lasts, an admission webhook may be down: ask who runs the cluster.",
    )


def _key(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]
