"""Model names: which InferenceService a client means.

Owns the catalogue (services by model name and by `namespace/name`) and what is said when a name fits none or several.
Does not know whether a service has a worker that is ready; see endpoints.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gpumeter_operator.gateway.refusal import Refusal

MAX_NAMES_TOLD = 8
_BATCH, _QUEUE = 64, 256  # the CRD's defaults of maxBatchSize and maxQueueLength


@dataclass(frozen=True, slots=True, order=True)
class Service:
    """What the gateway needs of an InferenceService. `model` is the name that its workers answer to."""

    namespace: str
    name: str
    uid: str
    model: str
    created_s: int = 0
    worker_requests: int = _BATCH + _QUEUE  # that one worker takes: those it computes and those in its queue

    @property
    def qualified(self) -> str:
        """The name that is unique in the cluster whatever others do."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All services of the cluster."""

    by_qualified: Mapping[str, Service]
    by_model: Mapping[str, tuple[Service, ...]]


def catalogue_from(objects: Iterable[Mapping[str, Any]]) -> Catalogue:
    """Index InferenceServices. One that is being deleted gets nothing new, so it is left out."""
    by_qualified: dict[str, Service] = {}
    by_model: dict[str, list[Service]] = {}
    for item in objects:
        metadata = item.get("metadata", {})
        if metadata.get("deletionTimestamp"):
            continue
        name = metadata.get("name", "")
        service = Service(
            namespace=metadata.get("namespace", ""),
            name=name,
            uid=metadata.get("uid", ""),
            model=((item.get("spec") or {}).get("model") or {}).get("name") or name,
            created_s=_seconds(metadata.get("creationTimestamp")),
            worker_requests=_worker_requests((item.get("spec") or {}).get("engine") or {}),
        )
        by_qualified[service.qualified] = service
        by_model.setdefault(service.model, []).append(service)
    return Catalogue(by_qualified, {model: tuple(sorted(services)) for model, services in by_model.items()})


def resolve(catalogue: Catalogue, model: str) -> Service:
    """The service that a client means. Raises Refusal: 404 with near names, 400 when the name fits several.

    A qualified name comes first. A model's name cannot hold a slash, so nobody can take over another's qualified name.
    """
    if service := catalogue.by_qualified.get(model):
        return service
    services = catalogue.by_model.get(model, ())
    if len(services) == 1:
        return services[0]
    if services:
        names = _listed([service.qualified for service in services])
        raise Refusal(
            400,
            "model_ambiguous",
            f"Several services serve the model {model!r}. Name one of them in the field model: {names}.",
            param="model",
        )
    raise Refusal(404, "model_not_found", _not_found(catalogue, model), param="model")


def listing(catalogue: Catalogue) -> list[dict[str, Any]]:
    """OpenAI's list of models: every service once, under the shortest name that means only it."""
    return [describe(catalogue, service) for service in sorted(catalogue.by_qualified.values())]


def describe(catalogue: Catalogue, service: Service) -> dict[str, Any]:
    """One service in OpenAI's shape of a model."""
    unique = len(catalogue.by_model[service.model]) == 1
    return {
        "id": service.model if unique else service.qualified,
        "object": "model",
        "created": service.created_s,
        "owned_by": service.namespace,
    }


def _not_found(catalogue: Catalogue, model: str) -> str:
    known = sorted(describe(catalogue, service)["id"] for service in catalogue.by_qualified.values())
    if not known:
        return f"There is no model {model[:128]!r}. No InferenceService exists in this cluster yet."
    near = difflib.get_close_matches(model[:256], known, n=3, cutoff=0.5)
    if near:
        return f"There is no model {model[:128]!r}. Did you mean {' or '.join(near)}?"
    return f"There is no model {model[:128]!r}. There are: {_listed(known)}."


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMES_TOLD
    return ", ".join(names[:MAX_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _worker_requests(engine: Mapping[str, Any]) -> int:
    return max(1, int(engine.get("maxBatchSize", _BATCH)) + int(engine.get("maxQueueLength", _QUEUE)))


def _seconds(rfc3339: str | None) -> int:
    return int(datetime.fromisoformat(rfc3339).timestamp()) if rfc3339 else 0
