"""What a service goes through under load: a rollout, a killed operator, mistakes, a quota, an eviction, a lost node.

Owns the order of events; judges nothing. One story and not many, because a worker takes its time to start, and a bill
takes a minute to close.
"""

import time
from pathlib import Path

from demo import manifests
from devcluster import othernodes
from devcluster.places import FIRST
from e2e.chat import Chat
from e2e.ordeal import REPLICAS, SECOND_MODEL, Evidence, Scene, ordeal
from e2e.stage import Stage, uids
from e2e.story import until

TEAM = "team-faults"
NAME = "steady"
MISSING_MODEL = f"pvc://{manifests.MODEL_CLAIM}/typo"
MISSING_IMAGE = "localhost/no-such-image:none"


def play(scene: Scene, folder: Path) -> Evidence:
    """From a service with a worker on each of two nodes to its deletion with one node left."""
    stage, evidence = Stage(scene.demo, TEAM, NAME), Evidence(TEAM, NAME, folder)
    at_once = {"maxSurge": REPLICAS, "maxUnavailable": 0}
    with ordeal(scene, stage, evidence, rolloutStrategy=at_once) as chat:
        roll_out(stage)
        spoil(stage)
        exhaust_quota(stage)
        evict(stage)
        lose_node(stage, scene, chat, evidence)
    return evidence


def roll_out(stage: Stage) -> None:
    """Another model, and in the middle of its rollout kill -9 to the operator."""
    with stage.act("rollout", "a new model is rolled out, and the operator killed meanwhile") as seen:
        stage.edit(model={"uri": SECOND_MODEL})
        until(lambda: len(stage.pods()) > REPLICAS, 30)
        seen["killed"] = stage.kill_operators()


def spoil(stage: Stage) -> None:
    """An image that does not exist, then a model that does not, then back."""
    with stage.act("mistakes", "an image and a model that do not exist are rolled out and taken back") as seen:
        stage.edit(engine={"image": MISSING_IMAGE})
        seen["image"] = stage.await_reason("ImagePullFailed", 30)
        stage.edit(engine={"image": None}, model={"uri": MISSING_MODEL})
        seen["model"] = stage.await_reason("ModelNotFound", 60)
        seen["meanwhile"] = uids(stage.ready())
        stage.edit(model={"uri": SECOND_MODEL})


def exhaust_quota(stage: Stage) -> None:
    """One more worker than the namespace may have."""
    quotas = f"/api/v1/namespaces/{TEAM}/resourcequotas"
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": str(REPLICAS)}}}
    with stage.act("quota", "one more worker than the quota allows is asked for, and taken back") as seen:
        stage.api.request("POST", quotas, quota)
        until(lambda: stage.api.get(f"{quotas}/few")["status"].get("used", {}).get("pods") == str(REPLICAS), 30)
        stage.edit(replicas=REPLICAS + 1)
        seen["quota"] = stage.await_reason("QuotaExceeded", 30)
        stage.edit(replicas=REPLICAS)
        stage.api.delete(f"{quotas}/few")


def evict(stage: Stage) -> None:
    """A worker of the first node has to leave."""
    with stage.act("eviction", "a worker is evicted") as seen:
        victim = next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == FIRST.name)
        seen["victim"] = victim["metadata"]["uid"]
        stage.evict(victim)
        until(lambda: seen["victim"] not in uids(stage.ready()), 30)


def lose_node(stage: Stage, scene: Scene, chat: Chat, evidence: Evidence) -> None:
    """Every process of a node is killed at once; Kubernetes gives its worker up, and so does who runs the cluster."""
    second = scene.second
    with stage.act("loss", f"{second.name} is lost with a worker on it") as seen:
        there = [pod for pod in stage.ready() if pod["spec"]["nodeName"] == second.name]
        assert len(there) == 1, f"{len(there)} workers on {second.name}: nothing would be lost"
        lost = there[0]
        chat.ask_at_once(2 * REPLICAS)
        until(lambda: stage.running_in(lost) > 0, 30)
        evidence.lost.append((time.time_ns(), lost))
        othernodes.lose(scene.paths, second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len(stage.pods()) > REPLICAS, 60)
    stage.remove_by_force(lost)
    until(lambda: lost["metadata"]["uid"] not in uids(stage.pods()), 20)
