"""Objects in a fifth of their memory: what is read often stays as it is, and the whole beside it as JSON.

Owns which parts those are. A thousand Deployments take 26 MiB as dicts and 5.5 MiB as bytes, and of thousands of them
the operator reads the whole only when something has changed. Does not know what any of the objects mean.
"""

from typing import Any

import msgspec

from gpumeter_operator.adapters.kubernetes import Manifest

_WHOLE = "packed"
_METADATA = ("name", "namespace", "uid", "resourceVersion", "labels", "ownerReferences", "deletionTimestamp")
_CONTAINER = ("name", "image", "env")
_decode = msgspec.json.Decoder(dict[str, Any]).decode


def packed(item: Manifest) -> Manifest:
    """The object's identity, `spec.replicas`, its pods' annotations, its status; and the whole, for `unpacked`."""
    metadata, spec = item["metadata"], item.get("spec") or {}
    found: Manifest = {"metadata": {name: metadata[name] for name in _METADATA if name in metadata}}
    short: Manifest = {"replicas": spec["replicas"]} if "replicas" in spec else {}
    if notes := ((spec.get("template") or {}).get("metadata") or {}).get("annotations"):
        short["template"] = {"metadata": {"annotations": notes}}
    if short:
        found["spec"] = short
    if item.get("status"):
        found["status"] = item["status"]
    found |= {name: item[name] for name in ("apiVersion", "kind") if name in item}
    return {**found, _WHOLE: msgspec.json.encode(item)}


def unpacked(item: Manifest) -> Manifest:
    """The whole of what `packed` gave."""
    return _decode(item[_WHOLE])


def without_bulk(pod: Manifest) -> Manifest:
    """A pod without what only a kubelet reads: its volumes, and of each container everything but a few fields."""
    spec = pod.get("spec")
    if not spec:
        return pod
    slim = {name: value for name, value in spec.items() if name not in ("volumes", "tolerations", "initContainers")}
    if "containers" in spec:
        slim["containers"] = [{name: one[name] for name in _CONTAINER if name in one} for one in spec["containers"]]
    return {**pod, "spec": slim}
