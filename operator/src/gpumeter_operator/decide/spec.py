"""InferenceService, read: a plain dict becomes a frozen ServiceSpec, or all of its problems at once.

Owns the defaults that depend on other fields and the sentences about what this version cannot do. Single fields are
checked by the CRD's schema before they get here. Does not know how a spec becomes a workload.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpumeter_operator.decide.names import STOP_ANNOTATION
from gpumeter_operator.decide.scaling import SCALE_TO_ZERO_AFTER, Scaling, read_scaling
from gpumeter_operator.decide.shape import shape_problems
from gpumeter_operator.decide.template import template_problems

# After the drain a worker cuts off what still runs (10 s at most), again if the engine hangs (10 s), ends the engine
# (5 s), and waits for the acknowledgement of its seal (20 s).
GRACE_AFTER_DRAIN_S = 45
UNNAMED_CLASS = "gpu"  # the price class of a GPU that is asked for without one
DEFAULT_PLAN = "default"  # the PricePlan of a service that names none, as the CRD's default says
_DURATION = re.compile(r"([0-9]+)(ms|s|m|h)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something cannot be: one CamelCase word and a sentence that says what to do."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One InferenceService, every default filled in."""

    namespace: str
    name: str
    uid: str
    generation: int
    stopped: bool
    model_uri: str
    model_name: str
    model_revision: str
    dtype: str
    max_model_len: int
    engine_image: str  # empty: the installation's worker image
    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: int
    max_queue_length: int
    cuda_graphs: bool
    compile: bool
    gpu_count: int
    tensor: int  # GPUs over which a worker splits its model: all of its own
    gpu_resource_name: str
    gpu_class: str
    cpu: str
    memory: str
    shared_memory: str
    replicas: int | None  # as the user fixed it; None when scaling holds or nothing is said
    scaling: Scaling | None  # the autoscaler's; None where it stands aside
    attribution: str
    checkpoint_interval_ms: int
    lease_timeout_ms: int
    cache_claim: str | None
    drain_timeout_ms: int
    max_surge: int | str
    max_unavailable: int | str
    template: Mapping[str, Any] = field(hash=False)  # empty where its shape is not a pod's, which is a Problem
    jupyter: bool = False  # a notebook in place of workers
    price_plan: str = DEFAULT_PLAN

    @property
    def reference(self) -> str:
        """namespace/name, as records and logs call the service."""
        return f"{self.namespace}/{self.name}"

    @property
    def termination_grace_s(self) -> int:
        """Time from SIGTERM to SIGKILL: drain, then seal and wait for the acknowledgement."""
        return -(-self.drain_timeout_ms // 1_000) + GRACE_AFTER_DRAIN_S


def read(service: Mapping[str, Any]) -> tuple[ServiceSpec, tuple[Problem, ...]]:
    """The spec with its defaults, and everything that keeps it from being run (empty when nothing does).

    Never raises on what the CRD admits: not on any JSON in spec.template either.
    """
    metadata, spec = service["metadata"], service.get("spec") or {}
    model, engine = _part(spec, "model"), _part(spec, "engine")
    resources, metering = _part(spec, "resources"), _part(spec, "metering")
    gpu, rollout = _part(resources, "gpu"), _part(spec, "rolloutStrategy")
    gpu_count = int(gpu.get("count", 1))
    scaling = spec.get("scaling")
    template = spec.get("template") or {}
    misshapen = tuple(shape_problems(template))
    read_spec = ServiceSpec(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        stopped=is_stopped(service),
        model_uri=model.get("uri", ""),
        model_name=model.get("name") or metadata["name"],
        model_revision=model.get("revision") or "main",
        dtype=model.get("dtype", "auto"),
        max_model_len=int(model.get("maxModelLen", 4096)),
        engine_image=engine.get("image", ""),
        max_batch_size=int(engine.get("maxBatchSize", 64)),
        max_batch_tokens=int(engine.get("maxBatchTokens", 2048)),
        max_wait_ms=int(engine.get("maxWaitMs", 0)),
        max_queue_length=int(engine.get("maxQueueLength", 256)),
        cuda_graphs=bool(engine.get("cudaGraphs", True)),
        compile=bool(engine.get("compile", False)),
        gpu_count=gpu_count,
        tensor=int(_part(spec, "parallelism").get("tensor", 1)),
        gpu_resource_name=gpu.get("resourceName", "nvidia.com/gpu"),
        gpu_class=_gpu_class(gpu) if gpu_count else "cpu",
        cpu=str(resources.get("cpu", "1")),
        memory=str(resources.get("memory", "4Gi")),
        shared_memory=str(resources.get("sharedMemory", "1Gi")),
        replicas=spec.get("replicas"),
        scaling=read_scaling(scaling, duration_ms(scaling.get("scaleToZeroAfter", SCALE_TO_ZERO_AFTER)))
        if scaling
        else None,
        attribution=metering.get("attribution", "knee"),
        checkpoint_interval_ms=duration_ms(metering.get("checkpointInterval", "5s")),
        lease_timeout_ms=duration_ms(metering.get("leaseTimeout", "60s")),
        cache_claim=_part(spec, "cache").get("pvc") or None,
        drain_timeout_ms=duration_ms(_part(spec, "drain").get("timeout", "120s")),
        max_surge=rollout.get("maxSurge", 1),
        max_unavailable=rollout.get("maxUnavailable", 0),
        template={} if misshapen else template,
        jupyter=bool(_part(spec, "development").get("jupyter", False)),
        price_plan=price_plan(service),
    )
    return read_spec, _problems(read_spec, spec, misshapen)


def _gpu_class(gpu: Mapping[str, Any]) -> str:
    """The class by which the time is priced. A MIG instance's names its profile: it is never priced as a whole GPU."""
    named = str(gpu.get("class") or UNNAMED_CLASS)
    profile = re.fullmatch(r"[^/]+/mig-(.+)", str(gpu.get("resourceName", "")))
    if profile is None or named.endswith(profile[1].lower()):
        return named
    return f"{named}.{profile[1].lower()}"


def price_plan(service: Mapping[str, Any]) -> str:
    """Name of the PricePlan that prices the service's usage, whether there is one of that name or not."""
    return _part(_part(service.get("spec") or {}, "pricing"), "planRef").get("name") or DEFAULT_PLAN


def is_stopped(service: Mapping[str, Any]) -> bool:
    """Whether the user stopped the service by annotation."""
    annotations = (service.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(STOP_ANNOTATION, "")).lower() == "true"


def duration_ms(text: str) -> int:
    """Milliseconds of a duration as the CRD admits it, for example 90s, 500ms or 1h30m."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration like 90s, 500ms or 1h30m")
    return sum(int(number) * _UNIT_MS[unit] for number, unit in parts)


def _problems(spec: ServiceSpec, raw: Mapping[str, Any], misshapen: tuple[str, ...]) -> tuple[Problem, ...]:
    found: list[Problem] = []

    def not_supported(message: str) -> None:
        found.append(Problem("NotSupported", message))

    engine = _part(raw, "engine")
    if engine.get("type", "transformers") != "transformers":
        not_supported(
            f"spec.engine.type is {engine['type']}, but this version has only the engine transformers; "
            "remove spec.engine.type."
        )
    if spec.tensor != max(spec.gpu_count, 1):
        not_supported(
            f"spec.parallelism.tensor is {spec.tensor} and spec.resources.gpu.count is {spec.gpu_count}, but a worker "
            "splits its model over all of its GPUs; make them equal (tensor is 1 on the CPU), and raise spec.replicas "
            "to use more GPUs."
        )
    if spec.gpu_count > 1 and re.match(r"[^/]+/mig-", spec.gpu_resource_name):
        not_supported(
            f"spec.resources.gpu.count is {spec.gpu_count} and spec.resources.gpu.resourceName is "
            f"{spec.gpu_resource_name}, but MIG instances cannot exchange what a split model needs; set the count and "
            "spec.parallelism.tensor to 1, or name whole GPUs, for example nvidia.com/gpu."
        )
    if spec.gpu_count and spec.gpu_resource_name.endswith(".shared"):
        not_supported(
            f"spec.resources.gpu.resourceName is {spec.gpu_resource_name}, a GPU that several pods share in turns, so "
            "the time of its steps cannot be measured; name a whole GPU or a MIG instance, for example nvidia.com/gpu."
        )
    sentences = misshapen or template_problems(spec.template, spec.termination_grace_s)
    found += (Problem("TemplateInvalid", sentence) for sentence in sentences)
    return tuple(found)


def _part(whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return whole.get(name) or {}
