"""What users do to a service under load: many ask at once, ten edits in a row, another image.

Owns the order of events; judges nothing. Played with `make test-faults`, because it takes too long for every run.
"""

import subprocess
import time
from pathlib import Path

from devcluster import tools
from devcluster.layout import other_node_paths
from e2e.chat import Chat
from e2e.ordeal import REPLICAS, START_S, Evidence, Scene, ordeal
from e2e.stage import Stage
from e2e.story import until

TEAM = "team-edits"
NAME = "changing"
IMAGE, SAME_IMAGE = "localhost/gpumeter-worker:dev", "localhost/gpumeter-worker:next"
SPIKE = 16
QUICKLY = {"stabilizationWindowSeconds": 10}


def play(scene: Scene, folder: Path) -> Evidence:
    """From two workers through everything to the deletion."""
    stage, evidence = Stage(scene.demo, TEAM, NAME), Evidence(TEAM, NAME, folder)
    # Few requests at a time in each worker: a spike is a queue then, and the usual traffic fits into one.
    with ordeal(scene, stage, evidence, engine={"maxBatchSize": 4}) as chat:
        spike(stage, chat)
        edit(stage)
        roll_out_image(stage, scene)
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
        until(lambda: stage.status("replicas") == 1 and len(stage.pods()) == 1, START_S, stage.told)
        chat.ask_at_once(SPIKE)
        until(lambda: len(stage.ready()) == REPLICAS, START_S, stage.told)
        until(lambda: len(stage.pods()) == 1, START_S, stage.told)
        seen["history"] = [one["reason"] for one in stage.status("scalingHistory")]
    with stage.act("fixed", "back to a fixed number of workers"):
        stage.edit(replicas=REPLICAS, scaling=None)
        until(lambda: len(stage.ready()) == REPLICAS, START_S, stage.told)


def edit(stage: Stage) -> None:
    """Ten edits in a row, the last of which holds; none waits for the one before."""
    with stage.act("edits", "ten edits one after the other", 240) as seen:
        for number in range(10):
            annotations = {"example.org/edit": str(number)}
            stage.edit(drain={"timeout": f"{20 + number}s"}, template={"metadata": {"annotations": annotations}})
        started_s = time.monotonic()
        until(lambda: stage.deployed()["metadata"]["annotations"].get("example.org/edit") == "9", 30)
        seen["applied_s"] = time.monotonic() - started_s
        seen["wanted"] = "9"
    seen["served"] = {pod["metadata"]["annotations"]["example.org/edit"] for pod in stage.ready()}


def roll_out_image(stage: Stage, scene: Scene) -> None:
    """The same image under another name: to Kubernetes it is another one."""
    ctr = str(tools.folder_of(tools.CONTAINERD) / "ctr")
    for own in (scene.paths, other_node_paths(scene.paths, scene.second.number)):
        where = ("-a", str(own.containerd_socket), "-n", "k8s.io")
        command = [ctr, *where, "images", "tag", "--force", IMAGE, SAME_IMAGE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with stage.act("image", "another image is rolled out", 240) as seen:
        stage.edit(engine={"image": SAME_IMAGE})
        until(lambda: stage.deployed()["spec"]["containers"][0]["image"] == SAME_IMAGE, 30)
    seen["images"] = {pod["spec"]["containers"][0]["image"] for pod in stage.ready()}
