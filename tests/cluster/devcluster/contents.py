"""What every cluster offers beyond an empty Kubernetes: storage classes, volumes, models and GPUs on the node.

Owns these objects. Does not know how the node was made, only its name and the paths inside it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.apiclient import MERGE, Api, ApiError

VOLUME_COUNT = 16
MODEL_VOLUME_COUNT = 16
GPU = "nvidia.com/gpu"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
VOLUMES = "/api/v1/persistentvolumes"
LABEL = "gpumeter.io/local-cluster"


@dataclass(frozen=True)
class Offer:
    """What the node shall offer: `volumes` and `models` are folders inside it; empty means not offered.

    `beside` are other nodes, there or not, with the same models at the same place; volumes are this node's alone.
    """

    node: str
    gpus: int
    volumes: str = ""
    models: str = ""
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps:
    """What is to be done to the volumes that are there: pure result of `plan`."""

    create: tuple[dict[str, Any], ...]
    delete: tuple[str, ...]
    give_back: tuple[str, ...]


def bring(api: Api, offer: Offer, volumes_outside: Path | None) -> list[str]:
    """Make the cluster offer what it shall; returns what was done, in words. Changes nothing that is right already."""
    done: list[str] = []
    for manifest in storage_classes(offer):
        if not api.exists(f"{CLASSES}/{manifest['metadata']['name']}"):
            api.apply(f"{CLASSES}/{manifest['metadata']['name']}", manifest)
    steps = plan(offer, api.get(f"{VOLUMES}?labelSelector={LABEL}")["items"])
    for name in steps.delete:
        api.delete(f"{VOLUMES}/{name}")
    for manifest in steps.create:
        name = manifest["metadata"]["name"]
        if volumes_outside and is_writable(manifest):
            make_folder(volumes_outside / name)
        api.apply(f"{VOLUMES}/{name}", manifest)
    for name in steps.give_back:
        if volumes_outside and (volumes_outside / name).exists():
            make_folder(volumes_outside / name)
        api.merge(f"{VOLUMES}/{name}", {"spec": {"claimRef": None}})
    if steps.create:
        done.append(f"{len(steps.create)} volumes made")
    if steps.give_back:
        done.append(f"{len(steps.give_back)} released volumes emptied and offered again")
    if offer_gpus(api, offer.node, offer.gpus):
        done.append(f"{offer.gpus} {GPU} offered by {offer.node}")
    return done


def storage_classes(offer: Offer) -> list[dict[str, Any]]:
    wanted = [("standard", "true")] if offer.volumes else []
    wanted += [("models", "false")] if offer.models else []
    return [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": name, "annotations": {"storageclass.kubernetes.io/is-default-class": default}},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        }
        for name, default in wanted
    ]


def plan(offer: Offer, existing: list[dict[str, Any]]) -> Steps:
    """Compare volumes: what is missing is created, what is released is given back, what is outdated and free goes."""
    wanted = {manifest["metadata"]["name"]: manifest for manifest in volumes(offer)}
    present = {volume["metadata"]["name"]: volume for volume in existing}
    released = [name for name in present if present[name].get("status", {}).get("phase") == "Released"]
    bound = [name for name in present if present[name].get("status", {}).get("phase") == "Bound"]
    return Steps(
        create=tuple(manifest for name, manifest in wanted.items() if name not in present),
        delete=tuple(name for name in present if name not in wanted and name not in bound),
        give_back=tuple(name for name in released if name in wanted),
    )


def volumes(offer: Offer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if offer.volumes:
        for number in range(VOLUME_COUNT):
            name = f"standard-{number:02d}"
            found.append(volume(offer, name, "standard", f"{offer.volumes}/{name}", ["ReadWriteOnce"]))
    if offer.models:
        version = Path(offer.models).name
        for number in range(MODEL_VOLUME_COUNT):
            modes = ["ReadOnlyMany", "ReadWriteOnce"]
            found.append(volume(offer, f"models-{version[:8]}-{number:02d}", "models", offer.models, modes))
    return found


def volume(offer: Offer, name: str, storage_class: str, path: str, modes: list[str]) -> dict[str, Any]:
    nodes = [offer.node, *(offer.beside if storage_class == "models" else ())]
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": nodes}]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": {LABEL: "true"}},
        "spec": {
            "capacity": {"storage": "20Gi"},
            "accessModes": modes,
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": storage_class,
            "hostPath": {"path": path, "type": "DirectoryOrCreate" if storage_class == "standard" else "Directory"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
        },
    }


def is_writable(manifest: dict[str, Any]) -> bool:
    return bool(manifest["spec"]["storageClassName"] == "standard")


def make_folder(folder: Path) -> None:
    """Make an empty folder that every user may write: a hostPath volume knows no fsGroup."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def offer_gpus(api: Api, node: str, gpus: int) -> bool:
    """State the GPUs as an extended resource of the node; the kubelet keeps what it did not set itself."""
    path = f"/api/v1/nodes/{node}"
    status = api.get(path)["status"]
    wanted = str(gpus) if gpus else None
    if status["capacity"].get(GPU) == wanted and status["allocatable"].get(GPU) == wanted:
        return False
    patch = {"status": {"capacity": {GPU: wanted}, "allocatable": {GPU: wanted}}}
    try:
        api.request("PATCH", f"{path}/status", patch, MERGE)
    except ApiError as problem:
        raise ApiError(problem.code, f"The node cannot be made to offer {GPU}: {problem.sentence}") from problem
    return True
