"""The two ends of a split engine's service: a shortage of memory in its calibration, and the word to leave.

The engine's process and the other rank's are real; in place of the model they find one that computes nothing, and in
place of torch the few names that it takes to say so, which spares each of them seconds.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpumeter_worker.engine.link import EngineLink
from gpumeter_worker.engine.messages import Cancel, Ended, Event, Failed, Ready, StepReport, Submit
from gpumeter_worker.engine.sequence import Finish, Sampling
from rigs.engines import options

_FINDER = """
import importlib.util, pathlib, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("torch", "gpumeter_worker.engine.model", "gpumeter_worker.engine.sharding"):
            file = "empty_" + name.rpartition(".")[2] + ".py"
            return importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(file))

sys.meta_path.insert(0, Finder)
"""

_TORCH = """
from contextlib import nullcontext as inference_mode

Tensor = object

class OutOfMemoryError(RuntimeError):
    pass
"""

_SHARDING = """
def Seat(rank, size, store):
    return None
"""

_MODEL = """
import torch

from gpumeter_worker.engine.blocks import SlotBlocks
from gpumeter_worker.engine.leading import Leading
from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.messages import Ready
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.failure import LoadFailed
from gpumeter_worker.metering.calibration import Subject

class Device:
    name = uuid = ""
    sequences, mixed_prefill_tokens, cache_tokens = 3, 16, 384

    def __init__(self, short_at):
        self.remarks, self.steps, self.short_at = [], 0, short_at

    def stage(self, plan):
        return list(plan), None

    def logits(self, staged):
        self.steps += 1
        if self.steps == self.short_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def copy(self, copies):
        pass

def on_device(options, seat):
    return None, Device(0)

def warm_up(device, options):
    pass

class ModelRunner:
    max_model_len, cache_tokens, limits = 128, 384, Limits(3, 16)

    def __init__(self, options, ranks):
        self.device = Device(20)
        if ranks is not None:
            self.device = Leading(self.device, ranks)

    def warm_up(self, clock):
        pass

    def blocks(self):
        return SlotBlocks(3, 128, prefix=False)

    def subject(self):
        return Subject("0" * 64, "float32", "none", "", "", "", "")

    def ready(self, at_ns):
        return Ready(at_ns, 128, 3, 100, frozenset(), "none", "", "float32", 384)

    def copy(self, copies):
        self.device.copy(copies)

    def run(self, plan, clock):
        _, staged = self.device.stage(plan)
        clock.begin()
        self.device.logits(staged)
        clock.end()
        return [Sampled(5) for work in plan if work.samples]
"""


_NEVER_FINALIZED = """
import atexit, time

atexit.register(time.sleep, 600)
"""


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """What an engine and its ranks import from here on."""
    (folder / "sitecustomize.py").write_text(_FINDER)
    for name, text in (("torch", _TORCH), ("sharding", _SHARDING), ("model", model)):
        (folder / f"empty_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


async def until(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, why
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_memory_that_is_short_in_calibration_ends_a_split_engine_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    stand_ins(tmp_path, monkeypatch, _MODEL)
    events: list[Event] = []
    how: list[str] = []

    def heard(_: EngineLink, said: Sequence[Event]) -> None:
        events.extend(said)

    given = options(ranks=ranks, max_batch_tokens=16, calibration_ms=10_000)
    link = EngineLink(given, 8, heard, lambda _, said: how.append(said))
    try:
        await until(lambda: how or any(isinstance(event, Ready) for event in events), "it serves or it ends")
    finally:
        link.kill()
        await asyncio.wait_for(link.gone(), 30)
    readies = [event for event in events if isinstance(event, Ready)]
    failed = [event.cause for event in events if isinstance(event, Failed)]
    if ranks == 1:
        assert [ready.calibration and ready.calibration.problem for ready in readies] == [
            "a planned step raised OutOfMemoryError"
        ]
        assert failed == []
    else:
        assert readies == []
        assert failed == [
            "rank 0 had too little memory for a step that the other ranks are in; lower maxModelLen or maxBatchSize"
        ]


async def test_a_split_engine_that_is_told_to_leave_does_not_wait_for_what_its_ranks_were_part_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps that last, so that the answer is under way when it is cancelled.
    model = _MODEL.replace("Device(20)", "Device(0)").replace("self.steps += 1", "self.steps += 1; time.sleep(0.05)")
    stand_ins(tmp_path, monkeypatch, model + _NEVER_FINALIZED)
    events: list[Event] = []
    how: list[str] = []
    link = EngineLink(
        options(ranks=2), 8, lambda _, said: events.extend(said), lambda _, said: how.append(said), end_s=20
    )
    try:
        await until(lambda: how or any(isinstance(event, Ready) for event in events), "it serves")
        link.send(Submit("s-1", [1, 2, 3], Sampling(max_tokens=100, temperature=0)))
        await until(lambda: how or any(isinstance(event, StepReport) for event in events), "it takes steps")
        link.send(Cancel("s-1"))
        await link.stop(60)
    finally:
        link.kill()
        await asyncio.wait_for(link.gone(), 30)
    assert how == ["ended with status 0"]
    assert [event.finish for event in events if isinstance(event, Ended)] == [Finish.CANCELLED], "all was sent"
