"""Objects in a fraction of their memory: what is read often stays as it is, and the whole beside it, compressed.

Owns which parts those are. As dicts the objects of a service are most of what an operator keeps, and of thousands of
them it reads the whole only when something has changed. Does not know what any of the objects mean.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from gpumeter_operator.adapters.kubernetes import Manifest
from gpumeter_operator.decide.names import MODEL_VARIABLE, REVISION_VARIABLE, SERVICE_LABEL, TEMPLATE_ANNOTATION
from gpumeter_operator.decide.workload import Workload

_WHOLE = "packed"
_METADATA = ("name", "namespace", "uid", "resourceVersion", "deletionTimestamp")
_OWNER = ("uid", "controller")
_POD = ("nodeName", "terminationGracePeriodSeconds")
_ENVIRONMENT = (MODEL_VARIABLE, REVISION_VARIABLE)
_FAST = 1  # zlib's level: a third of the JSON in 50 us; higher ones save little more
_decode = msgspec.json.Decoder(dict[str, Any]).decode
_decode_workload = msgspec.json.Decoder(Workload).decode


def packed(item: Manifest) -> Manifest:
    """The object's identity, service and owners, `spec.replicas`, its pods' template hash, its status; and the whole,
    for `unpacked`."""
    metadata, spec = item["metadata"], item.get("spec") or {}
    found: Manifest = {"metadata": _some(metadata, _METADATA)}
    if "labels" in metadata:
        found["metadata"]["labels"] = _some(metadata["labels"], (SERVICE_LABEL,))
    if "ownerReferences" in metadata:
        found["metadata"]["ownerReferences"] = [_some(one, _OWNER) for one in metadata["ownerReferences"]]
    short: Manifest = {"replicas": spec["replicas"]} if "replicas" in spec else {}
    if notes := ((spec.get("template") or {}).get("metadata") or {}).get("annotations"):
        short["template"] = {"metadata": {"annotations": _some(notes, (TEMPLATE_ANNOTATION,))}}
    if short:
        found["spec"] = short
    if item.get("status"):
        found["status"] = item["status"]
    return {**found, **_some(item, ("apiVersion", "kind")), _WHOLE: zlib.compress(msgspec.json.encode(item), _FAST)}


def unpacked(item: Manifest) -> Manifest:
    """The whole of what `packed` gave."""
    return _decode(zlib.decompress(item[_WHOLE]))


def packed_workload(workload: Workload) -> bytes:
    """All manifests of a service that gets them: a tenth of what they take as dicts, for `unpacked_workload`."""
    return zlib.compress(msgspec.json.encode(workload), _FAST)


def unpacked_workload(packed: bytes) -> Workload:
    """What `packed_workload` was given; a third of what it costs to build it anew."""
    return _decode_workload(zlib.decompress(packed))


def without_bulk(pod: Manifest) -> Manifest:
    """A pod with only that of its spec which tells of its life, and of its containers only what they serve."""
    spec = pod.get("spec")
    if not spec:
        return pod
    slim = _some(spec, _POD)
    if "containers" in spec:
        slim["containers"] = [_container(one) for one in spec["containers"]]
    return {**pod, "spec": slim}


def _container(one: Mapping[str, Any]) -> Manifest:
    told = [variable for variable in one.get("env") or () if variable["name"] in _ENVIRONMENT]
    return {"name": one["name"], **({"env": told} if told else {})}


def _some(whole: Mapping[str, Any], names: tuple[str, ...]) -> Manifest:
    return {name: whole[name] for name in names if name in whole}
