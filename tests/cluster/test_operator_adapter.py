"""The Kubernetes adapter and the informer against a real API server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumeter_operator.adapters.kubernetes import (
    CONFIG_MAPS,
    INFERENCE_SERVICES,
    PRICE_PLANS,
    Cluster,
    Manifest,
    Refused,
    Unreachable,
)
from gpumeter_operator.adapters.mirror import Mirror
from operatorrun import eventually, service

MANAGER = "tests"


@pytest.fixture
async def cluster(server: object, plane: Path) -> AsyncIterator[Cluster]:
    one = Cluster.connect(plane)
    yield one
    await one.close()


def config_map(namespace: str, name: str, **data: str) -> Manifest:
    metadata = {"name": name, "namespace": namespace, "labels": {"tests": "yes"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


async def test_an_absent_object_is_none_and_its_deletion_is_fine(cluster: Cluster, namespace: str) -> None:
    assert await cluster.get(CONFIG_MAPS, "absent", namespace) is None
    await cluster.delete(CONFIG_MAPS, "absent", namespace)
    assert await cluster.patch_status(INFERENCE_SERVICES, "absent", namespace, {"status": {"replicas": 1}}) is None


async def test_apply_creates_changes_and_leaves_the_fields_of_others_alone(cluster: Cluster, namespace: str) -> None:
    await cluster.apply(config_map(namespace, "one", mine="1"), field_manager=MANAGER)
    other = {**config_map(namespace, "one", theirs="2"), "metadata": {"name": "one", "namespace": namespace}}
    await cluster.apply(other, field_manager="somebody-else")
    changed = await cluster.apply(config_map(namespace, "one", mine="3"), field_manager=MANAGER)
    assert changed["data"] == {"mine": "3", "theirs": "2"}


async def test_an_apply_of_only_new_makes_what_is_not_there_and_touches_nothing_that_is(
    cluster: Cluster, namespace: str
) -> None:
    one = config_map(namespace, "one", mine="1")
    assert (await cluster.apply(one, field_manager=MANAGER, only_new=True))["data"] == {"mine": "1"}
    with pytest.raises(Refused) as refused:
        await cluster.apply(config_map(namespace, "one", mine="2"), field_manager=MANAGER, only_new=True)
    assert refused.value.status == 409
    assert (await cluster.get(CONFIG_MAPS, "one", namespace) or {})["data"] == {"mine": "1"}
    # What it made belongs to applies, so that a later one takes back what it does not say any more.
    again = await cluster.apply(config_map(namespace, "one", other="3"), field_manager=MANAGER)
    assert again["data"] == {"other": "3"}
    await cluster.delete(CONFIG_MAPS, "one", namespace)
    await cluster.create(config_map(namespace, "one", theirs="1"))
    with pytest.raises(Refused) as refused:
        await cluster.apply(one, field_manager=MANAGER, only_new=True)
    assert refused.value.status == 409


async def test_lists_are_by_label_over_one_namespace_or_all(cluster: Cluster, namespace: str) -> None:
    await cluster.apply(config_map(namespace, "one"), field_manager=MANAGER)
    inside = await cluster.list(CONFIG_MAPS, namespace, {"tests": "yes"})
    assert [item["metadata"]["name"] for item in inside] == ["one"]
    assert inside[0]["kind"] == "ConfigMap", "items of a list say what they are"
    everywhere = await cluster.list(CONFIG_MAPS, labels={"tests": None})
    assert (namespace, "one") in {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in everywhere}
    assert await cluster.list(PRICE_PLANS) == []


async def test_a_deletion_by_uid_spares_a_namesake(cluster: Cluster, namespace: str) -> None:
    made = await cluster.apply(config_map(namespace, "one"), field_manager=MANAGER)
    await cluster.delete(CONFIG_MAPS, "one", namespace, uid="00000000-0000-0000-0000-000000000000")
    assert await cluster.get(CONFIG_MAPS, "one", namespace) is not None
    await cluster.delete(CONFIG_MAPS, "one", namespace, uid=made["metadata"]["uid"])
    assert await cluster.get(CONFIG_MAPS, "one", namespace) is None


async def test_a_status_decided_from_an_old_object_is_refused(cluster: Cluster, namespace: str) -> None:
    made = await cluster.apply(service(namespace), field_manager=MANAGER)
    old = made["metadata"]["resourceVersion"]
    patch = {"metadata": {"resourceVersion": old}, "status": {"replicas": 1}}
    assert (await cluster.patch_status(INFERENCE_SERVICES, "smollm2", namespace, patch) or {})["status"] == {
        "replicas": 1
    }
    with pytest.raises(Refused) as refused:
        await cluster.patch_status(INFERENCE_SERVICES, "smollm2", namespace, {**patch, "status": {"replicas": 2}})
    assert refused.value.status == 409


async def test_a_refusal_carries_the_sentence_of_the_api_server(cluster: Cluster, namespace: str) -> None:
    bad = service(namespace, model={"uri": "ftp://somewhere"})
    with pytest.raises(Refused, match=r"spec\.model\.uri must begin with hf://") as refused:
        await cluster.apply(bad, field_manager=MANAGER)
    assert (refused.value.status, refused.value.reason) == (422, "Invalid")


@pytest.fixture
def elsewhere(plane: Path, tmp_path: Path) -> Path:
    """A kubeconfig of an address where nothing listens."""
    config = json.loads(plane.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


async def test_a_server_that_does_not_answer_is_unreachable(elsewhere: Path, tmp_path: Path) -> None:
    cluster = Cluster.connect(elsewhere)
    with pytest.raises(Unreachable):
        await cluster.get(CONFIG_MAPS, "one", "default")
    await cluster.close()
    with pytest.raises(Unreachable, match="No way to a cluster is configured"):
        Cluster.connect(tmp_path / "missing")


async def test_a_mirror_follows_creation_change_and_removal(cluster: Cluster, namespace: str) -> None:
    removed: list[str] = []
    mirror = Mirror(
        cluster, CONFIG_MAPS, namespace=namespace, labels={"tests": "yes"},
        on_remove=lambda item: removed.append(item["metadata"]["name"]),
    )  # fmt: skip
    await cluster.apply(config_map(namespace, "before", value="1"), field_manager=MANAGER)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(20):
        await mirror.synced()
    assert set(mirror.objects) == {(namespace, "before")}

    await cluster.apply(config_map(namespace, "after", value="1"), field_manager=MANAGER)
    await cluster.apply(config_map(namespace, "before", value="2"), field_manager=MANAGER)

    async def followed() -> bool:
        return (namespace, "after") in mirror.objects and mirror.objects[namespace, "before"]["data"] == {"value": "2"}

    await eventually(followed)
    await cluster.delete(CONFIG_MAPS, "before", namespace)

    async def gone() -> bool:
        return removed == ["before"] and (namespace, "before") not in mirror.objects

    await eventually(gone)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_mirror_whose_watch_is_refused_lists_anew(cluster: Cluster, namespace: str) -> None:
    class Confused:
        """A cluster whose first list claims a version from which the API server refuses to watch."""

        lists = 0

        async def list_at(self, *arguments: object) -> tuple[list[Manifest], str]:
            self.lists += 1
            items, version = await cluster.list_at(*arguments)  # type: ignore[arg-type]
            return items, "no version" if self.lists == 1 else version

        def watch(self, *arguments: object) -> AsyncIterator[tuple[str, Manifest]]:
            return cluster.watch(*arguments)  # type: ignore[arg-type]

    source = Confused()
    mirror = Mirror(source, CONFIG_MAPS, namespace=namespace)  # type: ignore[arg-type]
    task = asyncio.create_task(mirror.run())
    await cluster.apply(config_map(namespace, "one"), field_manager=MANAGER)

    async def recovered() -> bool:
        return source.lists > 1 and (namespace, "one") in mirror.objects

    await eventually(recovered)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
