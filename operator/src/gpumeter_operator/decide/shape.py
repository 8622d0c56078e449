"""Whether the user's pod template has the shape of a pod, as far as anything here walks it.

The CRD keeps `spec.template.spec` as it was written, so a map may stand where Kubernetes has a list. Owns what must be
a map, a list, a text or a whole number, and the sentence about what is not. Does not know what any of it means; all
that nobody here walks is left to the API server, which knows pods better.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class _Map:
    fields: Mapping[str, "_Shape"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _List:
    each: "_Shape"


DEPTH_MAX = 100  # a pod has about 15 levels; what writes and compares JSON here and in libraries ends at some hundreds

_Shape: TypeAlias = _Map | _List | type[str] | type[int]

_RESOURCES = _Map({"requests": _Map(), "limits": _Map(), "claims": _List(_Map())})
_CONTAINER = _Map(
    {
        "name": str,
        "env": _List(_Map({"name": str})),
        "envFrom": _List(_Map()),
        "ports": _List(_Map({"containerPort": int})),
        "resources": _RESOURCES,
        "volumeMounts": _List(_Map({"mountPath": str})),
        "volumeDevices": _List(_Map({"devicePath": str})),
    }
)
_NODES = _Map({"nodeSelectorTerms": _List(_Map({"matchExpressions": _List(_Map())}))})
_POD = _Map(
    {
        "containers": _List(_CONTAINER),
        "initContainers": _List(_CONTAINER),
        "volumes": _List(_Map({"name": str})),
        "imagePullSecrets": _List(_Map({"name": str})),
        "hostAliases": _List(_Map({"ip": str})),
        "tolerations": _List(_Map()),
        "topologySpreadConstraints": _List(_Map()),
        "nodeSelector": _Map(),
        "affinity": _Map({"nodeAffinity": _Map({"requiredDuringSchedulingIgnoredDuringExecution": _NODES})}),
        "resources": _RESOURCES,
        "resourceClaims": _List(_Map()),
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
    }
)
_TEMPLATE = _Map({"metadata": _Map({"labels": _Map(), "annotations": _Map()}), "spec": _POD})


def shape_problems(template: Any) -> Iterator[str]:
    """A sentence about each place where Kubernetes takes something of another shape.

    An empty field (null) says nothing, so it has no wrong shape; an empty entry of a list has.
    """
    if (path := _too_deep(template)) is not None:
        yield f"{path} holds more than {DEPTH_MAX} levels of maps and lists, and no pod does; remove it."
        return
    yield from _problems(template, _TEMPLATE, "spec.template")


def walked_names() -> frozenset[str]:
    """Names of the fields above, which an empty value (null) leaves as they are."""
    return frozenset(_names(_TEMPLATE))


def _too_deep(template: Any) -> str | None:
    """The place under which the template is nested too deeply. No recursion, which is what would fail."""
    waiting = [(template, 1, "spec.template")]
    while waiting:
        value, depth, path = waiting.pop()
        if not isinstance(value, Mapping | list):
            continue
        if depth > DEPTH_MAX:
            return path
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            waiting.append((inner, depth + 1, f"{path}.{name}" if depth <= 2 else path))
    return None


def _problems(value: Any, shape: _Shape, path: str) -> Iterator[str]:
    if not _has(value, shape):
        explained = ".".join(part.partition("[")[0] for part in path.split(".")[2:])
        yield (
            f"{path} is {_called(value)}, but Kubernetes takes {_wanted(shape)} there; write it as "
            f"kubectl explain {'.'.join(('pod', explained)) if explained else 'pod'} shows."
        )
    elif isinstance(shape, _Map):
        for name, inner in shape.fields.items():
            if value.get(name) is not None:
                yield from _problems(value[name], inner, f"{path}.{name}")
    elif isinstance(shape, _List):
        for number, one in enumerate(value):
            yield from _problems(one, shape.each, f"{path}[{number}]")


def _has(value: Any, shape: _Shape) -> bool:
    if isinstance(shape, _Map):
        return isinstance(value, Mapping)
    if isinstance(shape, _List):
        return isinstance(value, list)
    return isinstance(value, shape) and not isinstance(value, bool)


def _wanted(shape: _Shape) -> str:
    if isinstance(shape, _Map):
        return "a map"
    if isinstance(shape, _List):
        return "a list"
    return "a text" if shape is str else "a whole number"


def _called(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a text"
    return "true or false" if isinstance(value, bool) else "a number"


def _names(shape: _Shape) -> Iterator[str]:
    if isinstance(shape, _Map):
        for name, inner in shape.fields.items():
            yield name
            yield from _names(inner)
    elif isinstance(shape, _List):
        yield from _names(shape.each)
