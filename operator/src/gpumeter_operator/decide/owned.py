"""What all objects that the operator owns have in common: labels, owner, and the stamp by which a settled one is known.

Owns the metadata. Does not know which objects there are, nor what is in them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from gpumeter_operator.decide.names import (
    API_VERSION,
    APPLIED_ANNOTATION,
    INSTANCE_LABEL,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    MODEL_LABEL,
    NAME_LABEL,
    SERVICE_KIND,
    SERVICE_LABEL,
    WORKER_NAME,
)
from gpumeter_operator.decide.spec import ServiceSpec

Manifest = dict[str, Any]


def owned(
    service: ServiceSpec,
    api_version: str,
    kind: str,
    name: str,
    /,
    *,
    more_labels: Mapping[str, str] | None = None,
    **content: Any,
) -> Manifest:
    """A manifest that the garbage collector removes with its service. `more_labels` never take ours over."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": service.namespace,
            "labels": {**(more_labels or {}), **labels(service)},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": SERVICE_KIND,
                    "name": service.name,
                    "uid": service.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        **content,
    }


def stamped(manifest: Manifest) -> Manifest:
    """The manifest with its own fingerprint."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), APPLIED_ANNOTATION: fingerprint(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def labels(spec: ServiceSpec) -> dict[str, str]:
    """The labels of everything that is owned."""
    return {
        NAME_LABEL: WORKER_NAME,
        INSTANCE_LABEL: spec.name,
        MANAGED_BY_LABEL: MANAGED_BY,
        SERVICE_LABEL: spec.name,
        MODEL_LABEL: label_value(spec.model_name),
    }


def label_value(text: str) -> str:
    """`text` as a label's value: at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.")


def fingerprint(manifest: Any) -> str:
    """Hash of a manifest's canonical JSON."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
