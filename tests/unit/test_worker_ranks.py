"""The other ranks of a split model, as rank 0 sees them: programs that load nothing die, hang and refuse in moments."""

import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from gpumeter_worker.engine.blocks import Copy
from gpumeter_worker.engine.faults import RankLost, fault_of
from gpumeter_worker.engine.leading import Leading
from gpumeter_worker.engine.messages import Event, Failed, Fatal
from gpumeter_worker.engine.mirror import Copies, Mirror, Row, rows_of
from gpumeter_worker.engine.ranks import Ranks, unrecorded
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling, Sequence
from rigs.engines import is_gone, options
from rigs.worker import until

_FRAME = """
import mmap, pathlib, struct, sys, time
from gpumeter_worker.engine.channel import Channel
from gpumeter_worker.engine.messages import *
from gpumeter_worker.engine.mirror import *

rank, channel, store, progress, parent = map(int, sys.argv[1:])
channel, taken = Channel(channel), mmap.mmap(progress, mmap.PAGESIZE)
options = channel.receive()
pathlib.Path(__file__).with_name(f"up-{rank}").touch()

def take():
    told = channel.receive()
    if isinstance(told, Step):
        struct.pack_into("q", taken, 8 * rank, told.number)
    return told

"""
ROW = Row("s", 0, 3, [4], array("i", [0]), True, False)


@contextmanager
def ranks(
    folder: Path, body: str, count: int = 3, patience_looks: int = 10**6
) -> Iterator[tuple[Ranks, list[Event], threading.Event]]:
    """Ranks that do what `body` says; what was told of a loss, and when it was."""
    file = folder / "rank.py"
    file.write_text(_FRAME + dedent(body))
    lost: list[Event] = []
    told = threading.Event()
    made = Ranks(
        options(ranks=count),
        lambda event: (lost.append(event), told.set()),
        program=(sys.executable, str(file)),
        look_s=0.1,
        patience_looks=patience_looks,
        end_s=60,  # a status is waited for, however slowly an interpreter ends here
    )
    try:
        until(lambda: len(list(folder.glob("up-*"))) == count - 1, "the ranks are there", 120)
        yield made, lost, told
    finally:
        made.leave()
        until(lambda: all(is_gone(pid) for pid in made.pids), "no rank is left")


def test_every_rank_is_told_every_step_in_order(tmp_path: Path) -> None:
    body = """
    first, second = take(), take()
    assert (first.number, second.copies, options.ranks) == (1, [(0, 1, 16)], 3)
    if take().number == 2:
        channel.send(Failed(f"{first.rows[0].tokens} came to all"))
    """
    with ranks(tmp_path, body) as (made, lost, told):
        made.step([ROW])
        made.also(Copies([Copy(0, 1, 16)]))
        made.step([ROW])
        assert told.wait(60)
        assert isinstance(lost[0], Failed)
        assert lost[0].cause.endswith("of 3 ended itself: [4] came to all")


def test_a_rank_that_dies_is_named_once_and_no_step_follows(tmp_path: Path) -> None:
    body = """
    take()
    if rank == 2:
        sys.exit(7)
    while True:
        take()
    """
    with ranks(tmp_path, body) as (made, lost, told):
        made.step([ROW])
        assert told.wait(60)
        assert lost == [Failed("rank 2 of 3 ended with status 7")]
        with pytest.raises(RankLost, match="rank 2 of 3 ended with status 7") as step:
            made.step([ROW])
        assert not fault_of(step.value).memory
        assert fault_of(step.value).sentence == "rank 2 of 3 ended with status 7"
    assert len(lost) == 1, "those that are ended with it are not told as lost"


def test_a_rank_that_does_not_take_its_step_hangs(tmp_path: Path) -> None:
    body = """
    take()
    while rank == 1:
        take()
    time.sleep(600)
    """
    with ranks(tmp_path, body, patience_looks=30) as (made, lost, told):
        for _ in range(2):
            made.step([ROW])
        assert told.wait(60)
        assert lost == [Failed("rank 2 of 3 took no step for 3 s and hangs")]


def test_why_a_rank_cannot_start_is_told_with_its_number_and_its_reason(tmp_path: Path) -> None:
    body = 'channel.send(Fatal("OutOfMemory", "2 GB are too few; lower maxModelLen"))'
    with ranks(tmp_path, body, 2) as (made, lost, told):
        assert told.wait(60)
        assert lost == [Fatal("OutOfMemory", "rank 1 of 2: 2 GB are too few; lower maxModelLen")]
        assert made.loss() == lost[0]


def test_what_is_not_done_with_a_split_model_is_told_where_it_was_asked_for() -> None:
    given, remarks = unrecorded(options(ranks=2, device="cuda", compile=True))
    assert (given.cuda_graphs, given.compile, len(remarks)) == (False, False, 2)
    assert remarks[0].startswith("the model is split over 2 GPUs, so CUDA graphs are not captured:")
    assert unrecorded(options(ranks=2))[1] == [], "a CPU has no graphs"


def test_works_that_travelled_are_laid_out_as_they_were() -> None:
    first = Sequence("a", 0, "acme", list(range(50)), 50, Sampling(1), computed=20, blocks=[3, 5, 8, 9])
    other = Sequence("b", 1, "acme", [7, 8, 9], 2, Sampling(1), computed=2, blocks=[3])
    plan = [Work(first, 16, samples=False, prefill=True), Work(other, 1, samples=True, prefill=False)]
    mirror = Mirror()
    found = mirror.works(rows_of(plan))
    for work, again in zip(plan, found, strict=True):
        one, two = work.sequence, again.sequence
        end = one.computed + work.count
        assert (again.count, again.samples, again.prefill) == (work.count, work.samples, work.prefill)
        assert (two.computed, two.blocks) == (one.computed, one.blocks)
        assert two.tokens[one.computed : end] == one.tokens[one.computed : end]
    with pytest.raises(IndexError, match="only tokens from 20 on"):
        found[0].sequence.tokens[0:1]


def test_sequences_that_share_their_first_block_are_made_again_without_asking_the_kernel_for_a_seed() -> None:
    plan = [
        Work(Sequence(name, 0, "acme", [7, 8, 9], 3, Sampling(1), blocks=[3, own]), 1, samples=True, prefill=False)
        for name, own in (("a", 4), ("b", 5))
    ]
    mirror = Mirror()
    made = [work.sequence for _ in range(2) for work in mirror.works(rows_of(plan))]
    assert len({id(one) for one in made}) == 4, "each takes the place of the other"
    assert len({id(one.random) for one in made}) == 1


def test_a_sequence_that_stays_in_its_slot_stays_the_same_and_who_follows_it_is_another() -> None:
    mirror = Mirror()
    sequence = Sequence("a", 0, "", [1, 2, 3], 3, Sampling(1), blocks=[4])
    (first,) = mirror.works(rows_of([Work(sequence, 2, samples=False, prefill=True)]))
    sequence.computed = 2
    (second,) = mirror.works(rows_of([Work(sequence, 1, samples=True, prefill=True)]))
    assert first.sequence is second.sequence
    follower = Sequence("a", 1, "", [1, 2, 3], 3, Sampling(1), blocks=[4])
    (third,) = mirror.works(rows_of([Work(follower, 2, samples=False, prefill=True)]))
    assert third.sequence is not first.sequence


class OneDevice:
    """Rank 0's own device, whose `fails` is raised wherever it is asked to do something."""

    name = uuid = ""
    sequences, mixed_prefill_tokens, cache_tokens = 3, 16, 384

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.fails: Exception | None = None

    def stage(self, plan: list[Work]) -> tuple[list[Work], None]:
        return plan, None

    def logits(self, _: None) -> None:
        if self.fails:
            raise self.fails

    def copy(self, _: list[Copy]) -> None:
        if self.fails:
            raise self.fails

    def clean(self, _: Sequence) -> None:
        if self.fails:
            raise self.fails


@pytest.mark.parametrize("does", ["step", "copy", "clean", "sampling between a step's two halves"])
def test_what_rank_0_leaves_undone_after_it_told_the_others_is_no_shortage_that_a_smaller_step_would_not_have(
    tmp_path: Path, does: str
) -> None:
    with ranks(tmp_path, "while True: take()", 2) as (made, _, _):
        device = OneDevice()
        leading = Leading(device, made)  # type: ignore[arg-type]
        leading.copy([Copy(0, 1, 16)])
        leading.logits(leading.stage([])[1])
        short = device.fails = MemoryError()
        with pytest.raises(RankLost, match="rank 0 had too little memory for a step") as left, leading.agreeing():
            if does == "copy":
                leading.copy([Copy(0, 1, 16)])
            elif does == "clean":
                leading.clean(Sequence("a", 0, "", [1], 1, Sampling(1), blocks=[4]))
            else:
                staged = leading.stage([])[1]
                if does != "step":
                    raise short
                leading.logits(staged)
        assert left.value.__cause__ is short, "a warm-up tells it as what it is"
        assert not fault_of(left.value).memory
        device.fails = None
        with pytest.raises(RankLost, match="that rank 0 has left"):
            leading.stage([])


def test_a_shortage_after_all_ranks_ran_the_step_stays_one(tmp_path: Path) -> None:
    with ranks(tmp_path, "while True: take()", 2) as (made, _, _):
        leading = Leading(OneDevice(), made)  # type: ignore[arg-type]
        with pytest.raises(MemoryError), leading.agreeing():
            leading.logits(leading.stage([])[1])
            raise MemoryError
        leading.logits(leading.stage([])[1])


def test_what_is_raised_because_a_rank_was_lost_names_that_rank(tmp_path: Path) -> None:
    with ranks(tmp_path, "take(); sys.exit(7)", 2) as (made, _, told):
        leading = Leading(OneDevice(), made)  # type: ignore[arg-type]
        leading.logits(leading.stage([])[1])
        assert told.wait(60)
        with pytest.raises(RankLost, match="rank 1 of 2 ended with status 7"), leading.agreeing():
            raise RuntimeError("a device tells late that its step broke off")
