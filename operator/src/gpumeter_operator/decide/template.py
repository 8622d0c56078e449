"""The user's pod template, merged over the operator's.

Owns how two pod templates become one, and what a user's may not change because metering stands on it. Takes a template
whose shape decide.shape has found right. Does not know what the operator's template contains beyond those names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gpumeter_operator.decide.names import INSTANCE_LABEL, MAIN_CONTAINER, MANAGED_BY_LABEL, MODEL_LABEL, NAME_LABEL
from gpumeter_operator.decide.shape import walked_names

OWN_PREFIX = "gpumeter.io/"
OWN_ENVIRONMENT = "GPUMETER_"
FREE_ENVIRONMENT = (
    "GPUMETER_ALLOW_PICKLE",
    "GPUMETER_ATTENTION",
    "GPUMETER_CALIBRATION_MS",
    "GPUMETER_LOG_FORMAT",
    "GPUMETER_LOG_LEVEL",
    "GPUMETER_PLAIN_HTTP_REGISTRIES",
    "GPUMETER_PREFIX_CACHE",
    "GPUMETER_START_TIMEOUT_MS",
    "GPUMETER_STEP_TIMEOUT_MS",
)
"""Settings of a worker that the spec has no field for, and that metering does not stand on."""

OWN_VOLUMES = ("tmp", "journal", "cache", "shared-memory", "credentials", "model", "jupyter-token", "jupyter-workspace")
OWN_PATHS = ("/tmp", "/var/lib/gpumeter", "/var/cache/gpumeter", "/dev/shm", "/etc/gpumeter", "/mnt/models")  # noqa: S108
OWN_LABELS = (NAME_LABEL, INSTANCE_LABEL, MANAGED_BY_LABEL, MODEL_LABEL)

# Kubernetes' own merge keys (patchMergeKey) of the lists in a pod; other lists are replaced or, without a key, joined.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
}
_JOINED = ("tolerations", "topologySpreadConstraints", "envFrom")
_WALKED = walked_names()
_OWN_RESOURCES = "kubernetes.io"  # the domain of resources that Kubernetes has itself, beside those without a domain

GPUS_VARIABLE = "NVIDIA_VISIBLE_DEVICES"
"""By which NVIDIA's container runtime gives a container GPUs, whoever else has them; images built on CUDA say `all`."""
NO_GPUS = "void"
_NO_GPUS = (NO_GPUS, "none", "")


def merge_template(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs` over `ours`: maps key by key, lists by Kubernetes' merge keys, anything else replaced.

    What is checked and left empty (null) says nothing: it takes neither a GPU nor its nodes away from a worker.
    """
    return _merge_maps(ours, theirs)


def template_problems(template: Mapping[str, Any], termination_grace_s: int) -> Iterator[str]:
    """Sentences about everything in the user's template that would break serving or metering."""
    metadata, pod = template.get("metadata") or {}, template.get("spec") or {}
    for kind in ("labels", "annotations"):
        for key in metadata.get(kind) or {}:
            if key.startswith(OWN_PREFIX) or key in OWN_LABELS:
                yield (
                    f"spec.template.metadata.{kind} sets {key}, by which gpumeter finds its pods; "
                    "remove it from the template."
                )
    if pod.get("restartPolicy", "Always") != "Always":
        yield "spec.template.spec.restartPolicy must be Always, because an ended worker is started again; remove it."
    grace_s = pod.get("terminationGracePeriodSeconds")
    if isinstance(grace_s, int) and grace_s < termination_grace_s:
        yield (
            f"spec.template.spec.terminationGracePeriodSeconds is {grace_s}, but a worker needs {termination_grace_s} "
            "seconds (spec.drain.timeout, and time for its last usage records); remove it and set spec.drain.timeout."
        )
    for volume in pod.get("volumes") or []:
        if volume.get("name") in OWN_VOLUMES:
            yield f"spec.template.spec.volumes has a volume called {volume['name']}, which gpumeter uses; rename it."
    for container in [*(pod.get("containers") or []), *(pod.get("initContainers") or [])]:
        if not container.get("name"):
            yield (
                "spec.template.spec has a container without a name; "
                f"name it, and call it {MAIN_CONTAINER} to change the worker's own."
            )
    for kind in ("containers", "initContainers"):
        for container in pod.get(kind) or []:
            name = container.get("name")
            if name and not container.get("image") and (kind, name) != ("containers", MAIN_CONTAINER):
                yield (
                    f"spec.template.spec.{kind}[{name}] has no image; give it one, or, to change the worker's own "
                    f"container, set that in containers[{MAIN_CONTAINER}]."
                )
    yield from _device_problems(pod)
    for container in pod.get("containers") or []:
        if container.get("name") == MAIN_CONTAINER:
            yield from _main_problems(container)


def _device_problems(pod: Mapping[str, Any]) -> Iterator[str]:
    """Devices that a pod would get beside, or in place of, those that its annotations have metered and billed."""
    remedy = "that nobody would meter; remove it, and ask for GPUs in spec.resources.gpu."
    where = "spec.template.spec"
    if pod.get("resourceClaims"):
        yield f"{where}.resourceClaims asks for devices {remedy}"
    askers = [(where, pod)]
    for kind in ("containers", "initContainers"):
        askers += [(f"{where}.{kind}[{one.get('name') or ''}]", one) for one in pod.get(kind) or []]
    for path, asker in askers:
        # A pod has resources of its own, and no environment: what stands there has no shape.
        for variable in (asker is not pod and asker.get("env")) or []:
            if variable.get("name") == GPUS_VARIABLE and not _is_none(variable):
                yield f"{path}.env sets {GPUS_VARIABLE}, which takes GPUs {remedy}"
        resources = asker.get("resources") or {}
        if resources.get("claims"):
            yield f"{path}.resources.claims asks for devices {remedy}"
        for part in ("requests", "limits"):
            for name in resources.get(part) or {}:
                domain, slash, _ = name.partition("/")
                if slash and domain != _OWN_RESOURCES:
                    yield f"{path}.resources.{part} asks for {name}, {remedy}"


def _is_none(variable: Mapping[str, Any]) -> bool:
    """Whether this value of GPUS_VARIABLE is none at all; what comes from elsewhere is not known here."""
    return not variable.get("valueFrom") and variable.get("value", "") in _NO_GPUS


def _main_problems(main: Mapping[str, Any]) -> Iterator[str]:
    where = f"spec.template.spec.containers[{MAIN_CONTAINER}]"
    if "image" in main:
        yield f"{where}.image is set; the worker's image is spec.engine.image, set it there."
    for variable in main.get("env") or []:
        name = str(variable.get("name", ""))
        if name.startswith(OWN_ENVIRONMENT) and name not in FREE_ENVIRONMENT:
            yield (
                f"{where}.env sets {name}, which is not one of those that may be set here: "
                f"{', '.join(FREE_ENVIRONMENT)}; remove it, because gpumeter sets all others from the spec."
            )
    for mount in main.get("volumeMounts") or []:
        path = str(mount.get("mountPath", "")).rstrip("/")
        if any(path == own or path.startswith(f"{own}/") for own in OWN_PATHS):
            yield f"{where}.volumeMounts mounts {path}, where the worker keeps data of its own; choose another path."


def _merge_maps(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if value is None and key in _WALKED:
            continue
        merged[key] = _merge_values(key, merged[key], value) if key in merged else value
    return merged


def _merge_values(key: str, ours: Any, theirs: Any) -> Any:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return _merge_maps(ours, theirs)
    if isinstance(ours, list) and isinstance(theirs, list):
        if key in _JOINED:
            return ours + theirs
        if key in _MERGE_KEYS:
            return _merge_lists(_MERGE_KEYS[key], ours, theirs)
    return theirs


def _merge_lists(merge_key: str, ours: list[Any], theirs: list[Any]) -> list[Any]:
    by_key = {item.get(merge_key): item for item in theirs}
    known = {item.get(merge_key) for item in ours}
    kept = [_merge_maps(item, by_key.get(item.get(merge_key), {})) for item in ours]
    return kept + [item for item in theirs if item.get(merge_key) not in known]
