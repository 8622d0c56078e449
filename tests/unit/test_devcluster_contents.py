"""What is done to a cluster's volumes, what kind is told, and what the node's programs are told."""

import json
from pathlib import Path
from typing import Any

from devcluster import components, contents, kindnode, model
from devcluster.layout import REPOSITORY
from devcluster.places import EVERY, FIRST

OFFER = contents.Offer("node-1", 2, "/var/lib/volumes", "/var/lib/models/abcdef0123456789")


def present(manifest: dict[str, Any], phase: str) -> dict[str, Any]:
    return {**manifest, "status": {"phase": phase}}


def test_an_empty_cluster_gets_every_volume() -> None:
    steps = contents.plan(OFFER, [])
    assert len(steps.create) == contents.VOLUME_COUNT + contents.MODEL_VOLUME_COUNT
    assert (steps.delete, steps.give_back) == ((), ())


def test_a_complete_cluster_is_left_alone() -> None:
    existing = [present(manifest, "Available") for manifest in contents.volumes(OFFER)]
    existing[0]["status"]["phase"] = "Bound"
    assert contents.plan(OFFER, existing) == contents.Steps((), (), ())


def test_a_released_volume_is_given_back() -> None:
    existing = [present(manifest, "Available") for manifest in contents.volumes(OFFER)]
    existing[3]["status"]["phase"] = "Released"
    assert contents.plan(OFFER, existing).give_back == ("standard-03",)


def test_volumes_of_an_older_model_go_unless_they_are_in_use() -> None:
    old = contents.Offer("node-1", 2, "/var/lib/volumes", "/var/lib/models/0000000000000000")
    existing = [present(manifest, "Available") for manifest in contents.volumes(old)]
    existing[contents.VOLUME_COUNT]["status"]["phase"] = "Bound"
    existing[contents.VOLUME_COUNT + 1]["status"]["phase"] = "Released"
    steps = contents.plan(OFFER, existing)
    assert len(steps.create) == contents.MODEL_VOLUME_COUNT
    assert len(steps.delete) == contents.MODEL_VOLUME_COUNT - 1
    assert "models-00000000-00" not in steps.delete


def test_only_the_class_standard_is_the_default() -> None:
    key = "storageclass.kubernetes.io/is-default-class"
    found = {one["metadata"]["name"]: one["metadata"]["annotations"][key] for one in contents.storage_classes(OFFER)}
    assert found == {"standard": "true", "models": "false"}


def test_a_cluster_without_a_model_offers_none() -> None:
    bare = contents.Offer("node-1", 0, "/var/lib/volumes")
    assert {one["spec"]["storageClassName"] for one in contents.volumes(bare)} == {"standard"}


def test_a_volumes_folder_is_emptied_and_writable_by_everybody(tmp_path: Path) -> None:
    folder = tmp_path / "standard-00"
    folder.mkdir(mode=0o700)
    (folder / "ledger.db").write_text("old")
    contents.make_folder(folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o777


def test_kind_publishes_on_loopback_and_mounts_the_models_read_only() -> None:
    told = kindnode.configuration(17443, Path("/cache/models"))
    assert told["networking"] == {"apiServerAddress": "127.0.0.1", "apiServerPort": 17443}
    assert told["nodes"][0]["extraMounts"] == [
        {"hostPath": "/cache/models", "containerPath": "/var/lib/gpumeter/models", "readOnly": True}
    ]


def test_a_kubeconfig_of_kind_gets_the_name_that_every_backend_has() -> None:
    view = {"clusters": [{"name": "kind-a", "cluster": {"server": "s"}}], "users": [{"name": "kind-a", "user": {}}]}
    renamed = kindnode.renamed({**view, "contexts": [], "current-context": "kind-a"}, "gpumeter-a")
    assert renamed["current-context"] == "gpumeter-a"
    assert renamed["contexts"] == [{"name": "gpumeter-a", "context": {"cluster": "gpumeter-a", "user": "gpumeter-a"}}]
    assert renamed["clusters"][0]["cluster"] == {"server": "s"}


def plane() -> components.ControlPlane:
    programs = {name: Path("/tools") / name for name in ("etcd", "kube-apiserver", "kube-controller-manager")}
    return components.ControlPlane(programs, Path("/c/pki"), Path("/c"), "127.0.0.1", 21443, 21444, 21445)


def test_a_control_plane_alone_listens_on_loopback_only() -> None:
    for component in (components.etcd(plane()), components.apiserver(plane(), alone=True)):
        for flag in component.argv[1:]:
            if "listen" in flag or "bind-address" in flag:
                assert "127.0.0.1" in flag, flag
    assert "--secure-port=0" in components.controller_manager(plane(), alone=True).argv


def test_admission_plugins_are_added_to_upstreams_own() -> None:
    flags = components.apiserver(plane(), alone=True).argv
    assert "--enable-admission-plugins=NodeRestriction" in flags
    assert not any(flag.startswith("--disable-admission-plugins") for flag in flags)


def test_containerd_writes_only_into_the_nodes_own_folders() -> None:
    node = components.Node({}, FIRST, Path("/run/node"), Path("/run/gpumeter/x"), "/usr/lib/cni", 1)
    told = components.containerd_toml(node, "localhost/pause:3")
    settings = [line.strip().split(" = ") for line in told.splitlines() if " = " in line]
    written = [value.strip('"') for name, value in settings if name in ("root", "state", "temp", "path", "address")]
    assert len(written) == 6
    assert all(path.startswith("/run/") for path in written)
    kubelet = json.loads(components.kubelet_json(node, Path("/run/node/pki")))
    assert kubelet["volumePluginDir"].startswith("/run/node")


def test_the_models_key_follows_its_pins() -> None:
    assert model.recipe_key(REPOSITORY) == model.recipe_key(REPOSITORY)
    assert model.pin_of("transformers", "tokenizers==1 \\\ntransformers==5.23.0 \\\n    --hash=x\n") == (
        "transformers==5.23.0"
    )


def test_models_are_on_every_node_and_volumes_that_are_written_on_one() -> None:
    beside = tuple(place.name for place in FIRST.others)
    offer = contents.Offer(FIRST.name, 0, "/var/lib/volumes", "/var/lib/models/abcdef0123456789", beside)
    nodes: dict[str, set[str]] = {}
    for one in contents.volumes(offer):
        term = one["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]
        nodes.setdefault(one["spec"]["storageClassName"], set()).update(term["values"])
    assert nodes == {"standard": {"gpumeter-node"}, "models": {place.name for place in EVERY}}


def test_no_two_nodes_share_a_name_an_address_or_a_pods_range() -> None:
    for values in (
        {place.name for place in EVERY},
        {place.address for place in EVERY},
        {place.pods for place in EVERY},
    ):
        assert len(values) == len(EVERY)
    for place in EVERY:
        bridge = json.loads(components.cni_conflist(place))["plugins"][0]
        assert bridge["ipam"]["ranges"] == [[{"subnet": place.pods}]]
