"""What happens to a service while nobody manages it: no API server for a minute, operators killed again and again.

Owns the order of events; judges nothing. Played with `make test-faults`, because it takes too long for every run.
"""

import os
import random
import signal
import time
from pathlib import Path

from devcluster import localnode, othernodes, processes
from e2e.chat import Chat
from e2e.ordeal import FIRST_MODEL, SECOND_MODEL, Evidence, Scene, ordeal
from e2e.stage import Stage
from e2e.story import until

TEAM = "team-outages"
NAME = "patient"
AWAY_S = 60
KILLS = 10


def play(scene: Scene, folder: Path) -> Evidence:
    """The API server first: an operator that was killed often waits for minutes until it is started again."""
    stage, evidence = Stage(scene.demo, TEAM, NAME), Evidence(TEAM, NAME, folder)
    with ordeal(scene, stage, evidence) as chat:
        take_api_away(stage, scene, chat)
        kill_operators(stage)
    return evidence


def take_api_away(stage: Stage, scene: Scene, chat: Chat) -> None:
    """No API server for a minute, and an edit just before: what serves goes on serving, and what was asked is done."""
    with stage.act("no api", f"no API server for {AWAY_S} s", 240) as seen:
        node = localnode.node_process(othernodes.first_state(scene.paths))
        server = next(one for one in processes.children(node) if is_program(one, "kube-apiserver"))
        stage.edit(model={"uri": SECOND_MODEL})
        os.kill(server.pid, signal.SIGKILL)
        answered, back_s = chat.finished(), time.monotonic() + AWAY_S
        until(lambda: time.monotonic() > back_s, AWAY_S + 10)
        seen["answered"] = chat.finished() - answered
        os.kill(node.pid, signal.SIGHUP)  # the node's first process starts it again
        until(stage.api.is_ready, 60)


def kill_operators(stage: Stage) -> None:
    """A rollout during which the operator is killed again and again, at moments that a seed chose."""
    dice = random.Random(6)
    with stage.act("kills", f"a rollout, with the operator killed {KILLS} times", 300) as seen:
        stage.edit(model={"uri": FIRST_MODEL})
        killed = 0
        for _ in range(KILLS):
            next_s = time.monotonic() + dice.uniform(0, 8)
            until(lambda moment_s=next_s: time.monotonic() > moment_s, 12)  # type: ignore[misc]
            killed += stage.kill_operators()
        seen["killed"] = killed


def is_program(process: processes.Process, name: str) -> bool:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode())
