"""What takes longer: a spike, edits, an image, operators killed at random, no API server, a cut wire, a drained node.

Owns the order of events; judges nothing. Played with `make test-faults`, because it takes too long for every run.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from devcluster import localnode, othernodes, processes, tools
from devcluster.layout import other_node_paths
from devcluster.places import FIRST
from devcluster.progress import Progress
from e2e.chat import Chat
from e2e.ordeal import FIRST_MODEL, REPLICAS, SECOND_MODEL, Evidence, Scene, ordeal
from e2e.stage import Stage, is_ready, uids
from e2e.story import until

TEAM = "team-long"
NAME = "patient"
IMAGE, SAME_IMAGE = "localhost/gpumeter-worker:dev", "localhost/gpumeter-worker:next"
SPIKE = 16
AWAY_S = 60
KILLS = 10
QUICKLY = {"stabilizationWindowSeconds": 10}


def play(scene: Scene, folder: Path) -> Evidence:
    """From two workers through everything to the deletion."""
    stage, evidence = Stage(scene.demo, TEAM, NAME), Evidence(TEAM, NAME, folder)
    # Few requests at a time in each worker: a spike is a queue then, and the usual traffic fits into one.
    engine = {"maxBatchSize": 4}
    with ordeal(scene, stage, evidence, engine=engine) as chat:
        spike(stage, chat)
        edit(stage)
        roll_out_image(stage, scene)
        kill_operators(stage)
        take_api_away(stage, scene, chat)
        cut_wire(stage, scene, chat)
        drain_node(stage, scene)
        blink(stage, scene)
        lose_for_good(stage, scene, evidence)
    return evidence


def spike(stage: Stage, chat: Chat) -> None:
    """The autoscaler takes over with one worker, many ask at once, and then nobody does."""
    scaling = {
        "minReplicas": 1,
        "maxReplicas": REPLICAS,
        "targetQueueLength": 2,
        "targetGpuUtilization": 100,
        "behavior": {"scaleDown": QUICKLY},
    }
    with stage.act("spike", "from one worker up with a queue, and down again without") as seen:
        stage.edit(replicas=None, scaling=scaling)
        until(lambda: stage.status("replicas") == 1 and len(stage.pods()) == 1, 120, stage.told)
        chat.ask_at_once(SPIKE)
        until(lambda: len(stage.ready()) == REPLICAS, 120, stage.told)
        until(lambda: len(stage.pods()) == 1, 180, stage.told)
        seen["history"] = [one["reason"] for one in stage.status("scalingHistory")]
    with stage.act("fixed", "back to a fixed number of workers"):
        stage.edit(replicas=REPLICAS, scaling=None)
        until(lambda: len(stage.ready()) == REPLICAS, 120, stage.told)


def edit(stage: Stage) -> None:
    """Ten edits in a row, the last of which holds; none waits for the one before."""
    with stage.act("edits", "ten edits one after the other") as seen:
        for number in range(10):
            annotations = {"example.org/edit": str(number)}
            stage.edit(drain={"timeout": f"{20 + number}s"}, template={"metadata": {"annotations": annotations}})
        started_s = time.monotonic()
        until(lambda: stage.deployed()["metadata"]["annotations"].get("example.org/edit") == "9", 30)
        seen["applied_s"] = time.monotonic() - started_s
        seen["wanted"] = "9"
    stage.acts["edits"].seen["served"] = {  # type: ignore[index]
        pod["metadata"]["annotations"]["example.org/edit"] for pod in stage.ready()
    }


def roll_out_image(stage: Stage, scene: Scene) -> None:
    """The same image under another name: to Kubernetes it is another one."""
    ctr = [str(tools.folder_of(tools.CONTAINERD) / "ctr"), "-n", "k8s.io"]
    for own in (scene.paths, other_node_paths(scene.paths, scene.second.number)):
        tag = ["-a", str(own.containerd_socket), "images", "tag", "--force", IMAGE, SAME_IMAGE]
        subprocess.run([ctr[0], *tag[:2], *ctr[1:], *tag[2:]], check=True, stdout=subprocess.DEVNULL)
    with stage.act("image", "another image is rolled out") as seen:
        stage.edit(engine={"image": SAME_IMAGE})
        until(lambda: stage.deployed()["spec"]["containers"][0]["image"] == SAME_IMAGE, 30)
    seen["images"] = {pod["spec"]["containers"][0]["image"] for pod in stage.ready()}


def kill_operators(stage: Stage) -> None:
    """A rollout during which the operator is killed again and again, at moments that a seed chose."""
    dice = random.Random(6)
    with stage.act("kills", f"a rollout, with the operator killed {KILLS} times", 300) as seen:
        stage.edit(model={"uri": SECOND_MODEL})
        killed = 0
        for _ in range(KILLS):
            next_s = time.monotonic() + dice.uniform(0, 8)
            until(lambda moment_s=next_s: time.monotonic() > moment_s, 12)  # type: ignore[misc]
            killed += stage.kill_operators()
        seen["killed"] = killed


def take_api_away(stage: Stage, scene: Scene, chat: Chat) -> None:
    """No API server for a minute, and an edit just before: what serves goes on serving, and what was asked is done."""
    with stage.act("no api", f"no API server for {AWAY_S} s", 240) as seen:
        node = localnode.node_process(othernodes.first_state(scene.paths))
        server = next(one for one in processes.children(node) if is_program(one, "kube-apiserver"))
        stage.edit(model={"uri": FIRST_MODEL})
        os.kill(server.pid, signal.SIGKILL)
        answered, back_s = chat.finished(), time.monotonic() + AWAY_S
        until(lambda: time.monotonic() > back_s, AWAY_S + 10)
        seen["answered"] = chat.finished() - answered
        os.kill(node.pid, signal.SIGHUP)  # the node's first process starts it again
        until(stage.api.is_ready, 60)


def cut_wire(stage: Stage, scene: Scene, chat: Chat) -> None:
    """The second node hears nothing and is not heard for longer than it is tolerated; then it is there again."""
    with stage.act("cut", f"{scene.second.name} is cut off, its worker replaced, and the wire mended", 240) as seen:
        there = next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == scene.second.name)
        seen["cut off"] = there["metadata"]["uid"]
        othernodes.cut_off(scene.paths, scene.second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len([pod for pod in stage.pods() if is_ready(pod)]) == REPLICAS, 120, stage.told)
        answered = chat.finished()
        until(lambda: chat.finished() > answered + 2, 60)
        othernodes.mend(scene.paths, scene.second)
        until(lambda: seen["cut off"] not in uids(stage.pods()), 150)


def drain_node(stage: Stage, scene: Scene) -> None:
    """kubectl drain, as before a kernel's update."""
    kube = scene.demo.kube
    # Bring a worker there first: an eviction of one on the first node does it.
    with stage.act("return", f"a worker comes back to {scene.second.name}"):
        kube.run("cordon", FIRST.name)
        stage.evict(next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == FIRST.name))
        until(lambda: any(pod["spec"].get("nodeName") == scene.second.name for pod in stage.ready()), 120, stage.told)
        kube.run("uncordon", FIRST.name)
    with stage.act("drain", f"{scene.second.name} is drained") as seen:
        arguments = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
        kube.run("drain", scene.second.name, *arguments, timeout_s=150)
        until(lambda: len(stage.ready()) == REPLICAS, 120, stage.told)
        seen["nodes"] = {pod["spec"]["nodeName"] for pod in stage.ready()}
    kube.run("uncordon", scene.second.name)


def blink(stage: Stage, scene: Scene) -> None:
    """A node is killed and back before Kubernetes noticed: its worker goes on with the journal on the node's disk."""
    kube = scene.demo.kube
    with stage.act("return again", f"a worker comes back to {scene.second.name}"):
        kube.run("cordon", FIRST.name)
        stage.evict(next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == FIRST.name))
        until(lambda: any(pod["spec"].get("nodeName") == scene.second.name for pod in stage.ready()), 120, stage.told)
        kube.run("uncordon", FIRST.name)
    with stage.act("blink", f"{scene.second.name} is killed and started again at once", 240) as seen:
        there = next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == scene.second.name)
        seen["pod"] = there["metadata"]["uid"]
        othernodes.lose(scene.paths, scene.second)
        othernodes.bring_back(scene.paths, scene.second, Progress(quiet=True))

        def restarted() -> bool:
            pods = [pod for pod in stage.pods() if pod["metadata"]["uid"] == seen["pod"]]
            return not pods or any(one["restartCount"] for one in pods[0]["status"].get("containerStatuses", []))

        until(restarted, 120)


def lose_for_good(stage: Stage, scene: Scene, evidence: Evidence) -> None:
    """A node is lost and nobody does anything about it; after minutes it is there again."""
    with stage.act("loss", f"{scene.second.name} is lost, given up after a time, and comes back", 300) as seen:
        there = next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == scene.second.name)
        evidence.lost.append((time.time_ns(), there))
        othernodes.lose(scene.paths, scene.second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len(stage.ready()) == REPLICAS, 120, stage.told)
        until(lambda: given_up(scene, there), 300)
        othernodes.bring_back(scene.paths, scene.second, Progress(quiet=True))
        until(lambda: there["metadata"]["uid"] not in uids(stage.pods()), 120)


def given_up(scene: Scene, pod: dict[str, Any]) -> bool:
    """Whether the collector has said that a pod is gone with its node."""
    logs = ("-n", "gpumeter", "logs", "-l", "app.kubernetes.io/component=collector", "--tail=2000")
    name = pod["metadata"]["name"]
    return any("NodeLost" in line and name in line for line in scene.demo.kube.run(*logs).splitlines())


def is_program(process: processes.Process, name: str) -> bool:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode())
