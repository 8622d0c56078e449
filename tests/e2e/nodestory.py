"""What nodes do to a service: one is killed for a moment, cut off, drained, and killed for minutes.

Owns the order of events; judges nothing. Played with `make test-faults`, because it takes too long for every run.
"""

import time
from pathlib import Path
from typing import Any

from devcluster import othernodes
from devcluster.places import FIRST
from devcluster.progress import Progress
from e2e.chat import Chat
from e2e.ordeal import REPLICAS, START_S, Absence, Evidence, Scene, ordeal
from e2e.stage import Manifest, Stage, uids
from e2e.story import until

TEAM = "team-nodes"
NAME = "wandering"
QUIET = Progress(quiet=True)


def play(scene: Scene, folder: Path) -> Evidence:
    """From a worker on each of two nodes through everything to the deletion."""
    stage, evidence = Stage(scene.demo, TEAM, NAME), Evidence(TEAM, NAME, folder)
    with ordeal(scene, stage, evidence) as chat:
        blink(stage, scene, evidence)
        cut_wire(stage, scene, chat)
        bring_worker(stage, scene, "return")
        drain_node(stage, scene)
        bring_worker(stage, scene, "return again")
        lose_for_good(stage, scene, chat, evidence)
    return evidence


def cut_wire(stage: Stage, scene: Scene, chat: Chat) -> None:
    """The second node hears nothing and is not heard for longer than it is tolerated; then it is there again."""
    with stage.act("cut", f"{scene.second.name} is cut off, its worker replaced, and the wire mended", 240) as seen:
        there = on_second(stage, scene)
        seen["cut off"] = there["metadata"]["uid"]
        othernodes.cut_off(scene.paths, scene.second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len(stage.ready()) == REPLICAS, START_S, stage.told)
        answered = chat.finished()
        until(lambda: chat.finished() > answered + 2, 60)
        othernodes.mend(scene.paths, scene.second)
        until(lambda: seen["cut off"] not in uids(stage.pods()), 150)


def bring_worker(stage: Stage, scene: Scene, name: str) -> None:
    """Bring a worker back to the second node: an eviction of one on the first, which takes nobody, does it."""
    kube = scene.demo.kube
    with stage.act(name, f"a worker comes back to {scene.second.name}"):
        kube.run("cordon", FIRST.name)
        stage.evict(next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == FIRST.name))
        until(lambda: any(is_on(pod, scene.second.name) for pod in stage.ready()), START_S, stage.told)
        kube.run("uncordon", FIRST.name)


def drain_node(stage: Stage, scene: Scene) -> None:
    """kubectl drain, as before a kernel's update."""
    kube = scene.demo.kube
    with stage.act("drain", f"{scene.second.name} is drained") as seen:
        arguments = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
        kube.run("drain", scene.second.name, *arguments, timeout_s=150)
        until(lambda: len(stage.ready()) == REPLICAS, START_S, stage.told)
        seen["nodes"] = {pod["spec"]["nodeName"] for pod in stage.ready()}
    kube.run("uncordon", scene.second.name)


def blink(stage: Stage, scene: Scene, evidence: Evidence) -> None:
    """A node is killed and back before Kubernetes noticed: its worker goes on with the journal on the node's disk."""
    with stage.act("blink", f"{scene.second.name} is killed and started again at once", 240) as seen:
        uid = seen["pod"] = on_second(stage, scene)["metadata"]["uid"]
        died_ns = time.time_ns()
        othernodes.lose(scene.paths, scene.second)
        othernodes.bring_back(scene.paths, scene.second, QUIET)
        evidence.absences.append(Absence(uid, died_ns, time.time_ns()))

        def restarted() -> bool:
            [pod] = [pod for pod in stage.pods() if pod["metadata"]["uid"] == uid]
            return any(one["restartCount"] for one in pod["status"].get("containerStatuses", []))

        until(restarted, START_S, stage.told)


def lose_for_good(stage: Stage, scene: Scene, chat: Chat, evidence: Evidence) -> None:
    """A node is lost and nobody does anything about it; after minutes it is there again."""
    answered = chat.finished()
    until(lambda: chat.finished() > answered + 10, 60)  # some of them by the worker that is about to be lost
    with stage.act("loss", f"{scene.second.name} is lost, given up after a time, and comes back", 300) as seen:
        there = on_second(stage, scene)
        uid = there["metadata"]["uid"]
        evidence.lost.append((time.time_ns(), there))
        othernodes.lose(scene.paths, scene.second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len(stage.ready()) == REPLICAS, START_S, stage.told)
        until(lambda: given_up(scene, there), 300)
        othernodes.bring_back(scene.paths, scene.second, QUIET)
        seen["back_ns"] = time.time_ns()
        until(lambda: uid not in uids(stage.pods()), 120)


def on_second(stage: Stage, scene: Scene) -> Manifest:
    """The worker on the second node."""
    [found] = [pod for pod in stage.ready() if is_on(pod, scene.second.name)]
    return found


def is_on(pod: dict[str, Any], node: str) -> bool:
    return bool(pod["spec"].get("nodeName") == node)


def given_up(scene: Scene, pod: Manifest) -> bool:
    """Whether the collector has said that a pod is gone with its node."""
    logs = ("-n", "gpumeter", "logs", "-l", "app.kubernetes.io/component=collector", "--tail=2000")
    name = pod["metadata"]["name"]
    return any("NodeLost" in line and name in line for line in scene.demo.kube.run(*logs).splitlines())
