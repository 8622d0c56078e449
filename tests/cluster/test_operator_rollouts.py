"""Rollouts by the real operator, API server and Deployment controller: a new version replaces the former one only when
it serves, and says why while it does not. The test plays scheduler and kubelet, as in test_operator_reconcile.
"""

import json

from apiserver import Run
from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, EVENTS, PODS, Cluster, Manifest
from operatorrun import condition, eventually
from test_operator_reconcile import (  # noqa: F401 - the fixtures are found by their names
    NAME,
    READY,
    Show,
    becomes,
    bind,
    cluster,
    container,
    end_pod,
    operator,
    pods,
    say,
    serving,
    show,
    truth,
)

IMAGE = "registry.example/worker"
FORMER = {"engine": {"image": f"{IMAGE}:1"}}


async def of_image(cluster: Cluster, namespace: str, tag: str) -> Manifest:  # noqa: F811
    """The pod with this image, as soon as there is one."""

    async def there() -> Manifest | None:
        found = await cluster.list(PODS, namespace)
        return next((one for one in found if one["spec"]["containers"][0]["image"] == f"{IMAGE}:{tag}"), None)

    there.__name__ = f"a pod of {tag}"
    return await eventually(there, 15)


async def leaves(cluster: Cluster, pod: Manifest) -> bool:  # noqa: F811
    found = await cluster.get(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"])
    return found is None or "deletionTimestamp" in found["metadata"]


async def test_a_broken_image_stops_its_rollout_and_the_former_worker_goes_on_serving(
    cluster: Cluster,  # noqa: F811
    namespace: str,
    show: Show,  # noqa: F811
) -> None:
    former = await serving(cluster, namespace, **FORMER)
    await show(engine={"image": f"{IMAGE}:broken"})
    broken = await of_image(cluster, namespace, "broken")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{IMAGE}:broken"'}}
    scheduled = [truth("PodScheduled", True), truth("Ready", False)]
    await say(cluster, broken, phase="Pending", conditions=scheduled, containerStatuses=container(waiting))
    status = await becomes(cluster, namespace, "ImagePullFailed")
    ready, workloads = condition(status), condition(status, "WorkloadsReady")
    assert (ready["status"], workloads["status"]) == ("True", "False"), "requests are answered; the rollout is stuck"
    assert f"{IMAGE}:broken" in ready["message"]
    assert ready["message"].endswith("The former workers go on serving.")
    assert status["readyReplicas"] == 1
    assert not await leaves(cluster, former)

    async def warnings() -> list[Manifest] | None:  # the status is written first
        return [one for one in await cluster.list(EVENTS, namespace) if one["reason"] == "ImagePullFailed"] or None

    [warning] = await eventually(warnings)
    assert (warning["type"], warning["message"]) == ("Warning", ready["message"])

    await show(engine={"image": f"{IMAGE}:2"})
    repaired = await of_image(cluster, namespace, "2")
    assert not await leaves(cluster, former), "not before the new one is ready"
    await bind(cluster, repaired)
    await say(cluster, repaired, **READY)
    await becomes(cluster, namespace, "Serving")

    async def replaced() -> bool:
        return await leaves(cluster, former) and await leaves(cluster, broken)

    await eventually(replaced, 15)
    assert await warnings() == [warning], "and once"


async def test_an_edit_under_load_is_applied_in_seconds(
    cluster: Cluster,  # noqa: F811
    namespace: str,
    show: Show,  # noqa: F811
) -> None:
    former = await serving(cluster, namespace, **FORMER, replicas=1)
    # Three edits in a row, each while the rollout of the one before is under way: only the last counts in the end.
    for tag in ("2", "3", "4"):
        await show(engine={"image": f"{IMAGE}:{tag}", "maxBatchSize": 8}, replicas=1)
        await of_image(cluster, namespace, tag)

    async def only_the_last_is_under_way() -> bool:
        found = [one for one in await cluster.list(PODS, namespace) if "deletionTimestamp" not in one["metadata"]]
        images = {one["spec"]["containers"][0]["image"].rpartition(":")[2] for one in found}
        return images == {"1", "4"}

    await eventually(only_the_last_is_under_way, 15)
    assert not await leaves(cluster, former), "it has requests, and nobody is ready in its place"
    new = await of_image(cluster, namespace, "4")
    await bind(cluster, new)
    await say(cluster, new, **READY)

    async def replaced() -> bool:
        return await leaves(cluster, former)

    await eventually(replaced, 15)
    deployment = await cluster.get(DEPLOYMENTS, NAME, namespace) or {}
    assert {"name": "GPUMETER_MAX_BATCH_SIZE", "value": "8"} in (
        deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    )


async def test_a_rollout_that_a_quota_leaves_no_room_says_how_to_make_some_and_goes_on_when_it_is_made(
    cluster: Cluster,  # noqa: F811
    namespace: str,
    show: Show,  # noqa: F811
    kubectl: Run,
) -> None:
    former = await serving(cluster, namespace, **FORMER)
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one", "namespace": namespace}}
    kubectl("apply", "-f", "-", stdin=json.dumps({**quota, "spec": {"hard": {"pods": "1"}}}))

    async def counted() -> bool:
        told = kubectl("get", "resourcequota", "one", "-n", namespace, "-o", "jsonpath={.status.used.pods}").stdout
        return told == "1"

    await eventually(counted, 30)
    await show(engine={"image": f"{IMAGE}:2"})
    status = await becomes(cluster, namespace, "QuotaExceeded")
    ready = condition(status)
    assert (ready["status"], condition(status, "WorkloadsReady")["status"]) == ("True", "False")
    assert "exceeded quota: one" in ready["message"]
    assert "{maxSurge: 0, maxUnavailable: 1}" in ready["message"]
    assert not await leaves(cluster, former)

    await show(engine={"image": f"{IMAGE}:2"}, rolloutStrategy={"maxSurge": 0, "maxUnavailable": 1})

    async def made_room() -> bool:
        return await leaves(cluster, former)

    await eventually(made_room, 15)
    await end_pod(cluster, former)
    new = await of_image(cluster, namespace, "2")
    await bind(cluster, new)
    await say(cluster, new, **READY)
    await becomes(cluster, namespace, "Serving")
