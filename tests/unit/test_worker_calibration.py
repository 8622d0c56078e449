"""Calibration: which steps are planned and timed, when a fit is refused, and where it is kept."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from gpumeter_worker.engine.blocks import Copy, PagedBlocks, SlotBlocks
from gpumeter_worker.engine.calibrating import Replay, Room, calibrate, measure, planned, room_of
from gpumeter_worker.engine.faults import RankLost
from gpumeter_worker.engine.loop import Engine, Sampled
from gpumeter_worker.engine.messages import StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits, Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.attribution import Costs, Load, Rule, cost_ps, uncalibrated, weights
from gpumeter_worker.metering.calibration import Calibration, Fit, Observation, Quality, Subject, fit, problem
from gpumeter_worker.metering.clock import HostClock, StepClock, StepTime
from gpumeter_worker.metering.profiles import FILE_NAME, Profiles, adopt, stored_fit

COSTS = Costs(3 * 10**8, 3 * 10**9, 27 * 10**6, 5 * 10**4, 600)
GOOD = Quality(steps=40, median_error_ppm=20_000, tail_error_ppm=90_000, explained_ppm=990_000)
SUBJECT = Subject("0" * 64, "bfloat16", "a GPU", "2.9.1", "5.23.0", "0.1.0", "graphs 1")
ROOM = Room(8, 256, 1024, 4096)


class Machine:
    """Runner and clock in one: a step takes what its parameters say, and is slow where `slow` says so."""

    kind = "host"
    drift_ppb = None
    begun = 0

    def __init__(self, costs: Costs = COSTS) -> None:
        self.costs = costs
        self.steps: list[tuple[Load, ...]] = []
        self.copies: list[Copy] = []
        self.broken = False
        self._times: list[StepTime] = []

    def run(self, plan: list[Work], clock: StepClock) -> list[Sampled]:
        if self.broken:
            raise RuntimeError("the kernel refuses")
        loads = tuple(Load(work.count, work.sequence.computed) for work in plan)
        assert all(work.sequence.computed + work.count == len(work.sequence.tokens) for work in plan)
        self.steps.append(loads)
        late = 5 if len(self.steps) % 7 == 0 else 1  # whatever else runs on a machine, now and then
        self._times.append(StepTime(0, 1, late * cost_ps(loads, self.costs) // 1000))
        return [Sampled(1) for work in plan if work.samples]

    def copy(self, copies: list[Copy]) -> None:
        self.copies += copies

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def abort(self) -> bool:
        return True

    def harvest(self) -> list[StepTime]:
        times, self._times = self._times, []
        return times


def timed(machine: Machine, budget_ns: int = 10**10) -> list[Observation]:
    return measure(machine, machine, PagedBlocks(512, 16, prefix=False), ROOM, budget_ns)


def test_planned_steps_hold_decodes_prompts_and_both_and_fit_the_engine() -> None:
    for room in (ROOM, Room(256, 8192, 32_768, 400_000), Room(64, 2048, 4096, 8192), Room(2, 16, 64, 128)):
        plan = planned(room)
        assert len(plan) == len(set(plan))
        for loads in plan:
            assert len(loads) <= room.sequences
            assert sum(load.new_tokens for load in loads) <= room.step_tokens
            assert max(sum(load) for load in loads) <= room.sequence_tokens
        kinds = {frozenset(load.new_tokens > 1 for load in loads) for loads in plan}
        assert kinds == {frozenset({True}), frozenset({False}), frozenset({True, False})}
        assert len(plan) >= 12
        assert len(plan) <= 72, "seconds are not worth more"


def test_the_shortest_run_of_a_step_counts_because_a_busy_machine_only_ever_adds() -> None:
    machine = Machine()
    found = fit(timed(machine))
    assert found is not None
    assert problem(found) == ""
    assert [one / truth for one, truth in zip(found.costs, COSTS, strict=True)] == pytest.approx([1] * 5, abs=0.02)


def test_with_less_time_the_dear_steps_are_left_out() -> None:
    few, many = Machine(), Machine()
    observations = timed(few, 1)
    assert 1 <= len(observations) < len(timed(many))
    assert observations[0].loads == planned(ROOM)[0]


def test_a_planned_step_leaves_the_cache_free_and_its_context_was_written_once() -> None:
    machine, blocks = Machine(), SlotBlocks(4, 64, prefix=True)
    replay = Replay(machine, machine, blocks)
    loads = [Load(1, 40), Load(1, 20), Load(8, 0)]
    for _ in range(2):
        assert replay.timed(loads) == cost_ps(loads, COSTS) // 1000
    assert machine.copies == [Copy(0, 0, 40), Copy(1, 1, 20)]
    assert replay.timed([Load(1, 9)] * 5) is None
    assert blocks.used_tokens == 0
    assert replay.timed([Load(4, 60)] * 4) is not None, "nothing is left of those that were refused"


def test_the_cost_of_a_step_is_the_sum_of_its_weights() -> None:
    profile = uncalibrated(Rule.KNEE, "cuda")
    costs = Costs(profile.t0_ps, profile.phi_ps, profile.lam_ps, profile.kap_ps, profile.alp_ps)
    for loads in planned(ROOM):
        scale = len(loads) * sum(load.new_tokens for load in loads)
        assert sum(weights(loads, profile)) == cost_ps(loads, costs) * scale


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "only 0 steps could be timed"),
        (Fit(COSTS, replace(GOOD, steps=11)), "only 11 steps could be timed"),
        (Fit(COSTS, replace(GOOD, median_error_ppm=150_001)), "half of 40 timed steps are predicted within 15.0 %"),
        (Fit(COSTS, replace(GOOD, tail_error_ppm=800_001)), "95 % of them within 80.0 %"),
        (Fit(COSTS._replace(kap_ps=-1), GOOD), "make no sense"),
        (Fit(COSTS._replace(lam_ps=10**17), GOOD), "make no sense"),
        (Fit(Costs(0, 0, 0, 5, 5), GOOD), "make no sense"),
        (Fit(COSTS, GOOD), ""),
    ],
)
def test_a_fit_that_is_not_good_enough_is_refused_with_its_numbers(found: Fit | None, said: str) -> None:
    assert said in problem(found)
    assert bool(problem(found)) == bool(said)


def test_steps_without_any_order_in_them_are_refused() -> None:
    rng = Random(3)
    found = fit([Observation(loads, rng.randrange(10**6, 10**9)) for loads in planned(ROOM)])
    assert "make no sense" in problem(found) or "are predicted within" in problem(found)


def test_a_step_that_fails_is_the_calibrations_problem_and_not_the_engines() -> None:
    machine = Machine()
    machine.broken = True
    found = calibrated(machine, None)
    assert found.fit is None
    assert found.problem == "a planned step raised RuntimeError"
    adopted = adopt(found, Rule.KNEE, "cuda", "llama")
    assert (adopted.reason, adopted.profile) == ("CalibrationPoor", uncalibrated(Rule.KNEE, "cuda"))
    assert not adopted.as_asked
    assert found.problem in adopted.message


@pytest.mark.parametrize("fails", ["before its end", "when its tokens are read"])
def test_the_step_after_one_that_failed_in_calibration_is_timed_as_any_other(fails: str) -> None:
    class Failing:
        calibrates = True

        def run(self, plan: list[Work], clock: HostClock) -> list[Sampled]:
            clock.begin()
            if self.calibrates and fails == "before its end":
                raise MemoryError
            clock.end()
            if self.calibrates:
                raise MemoryError
            return [Sampled(1) for work in plan if work.samples]

        def copy(self, copies: list[Copy]) -> None: ...

    runner, clock, blocks = Failing(), HostClock(), PagedBlocks(512, 16, prefix=False)
    found = calibrate(runner, clock, blocks, ROOM, subject_of=lambda: SUBJECT, budget_ns=10**9, stored_in=None)
    assert found is not None
    assert found.problem == "a planned step raised MemoryError"
    runner.calibrates = False
    engine = Engine(runner, clock, Limits(4, 64), frozenset(), 512, blocks)
    engine.submit(Submit("one", [1, 2, 3], Sampling(max_tokens=1)))
    reports = [event for event in engine.turn() if isinstance(event, StepReport)]
    assert [[part.session_id for part in report.parts] for report in reports] == [["one"]]


def test_a_device_that_tells_nothing_any_more_ends_the_engine() -> None:
    class Lost(HostClock):
        def abort(self) -> bool:
            return False

    class Runner(Machine):
        def run(self, plan: list[Work], clock: HostClock) -> list[Sampled]:
            clock.begin()
            raise RuntimeError("the device is lost")

    blocks = PagedBlocks(512, 16, prefix=False)
    with pytest.raises(RuntimeError, match="the device is lost"):
        calibrate(Runner(), Lost(), blocks, ROOM, subject_of=lambda: SUBJECT, budget_ns=10**9, stored_in=None)


def test_a_rank_that_is_lost_while_steps_are_timed_ends_the_engine() -> None:
    class Runner(Machine):
        def run(self, plan: list[Work], clock: HostClock) -> list[Sampled]:
            raise RankLost("rank 1 of 2 was killed by signal 9")

    with pytest.raises(RankLost, match="rank 1 of 2 was killed by signal 9"):
        calibrated(Runner(), None)


def calibrated(machine: Machine, folder: Path | None, subject: Subject = SUBJECT) -> Calibration:
    blocks = PagedBlocks(512, 16, prefix=False)
    found = calibrate(machine, machine, blocks, ROOM, subject_of=lambda: subject, budget_ns=10**10, stored_in=folder)
    assert found is not None
    return found


def test_without_time_nothing_is_run_and_the_proportions_are_what_was_asked_for() -> None:
    machine = Machine()
    blocks = SlotBlocks(4, 1024, prefix=False)
    room = room_of(blocks, 4, 64, 1024, 4096)
    assert calibrate(machine, machine, blocks, room, subject_of=lambda: SUBJECT, budget_ns=0, stored_in=None) is None
    assert not machine.steps
    adopted = adopt(None, Rule.KNEE, "host", "llama")
    assert (adopted.reason, adopted.profile, adopted.as_asked) == (
        "CalibrationOff",
        uncalibrated(Rule.KNEE, "host"),
        True,
    )


def test_by_tokens_nothing_is_calibrated_and_nothing_stands_in() -> None:
    adopted = adopt(None, Rule.TOKENS, "host", "llama")
    assert (adopted.reason, adopted.profile.rule, adopted.as_asked) == ("ByTokens", Rule.TOKENS, True)


def test_what_was_fitted_is_found_at_the_next_start_and_nothing_is_timed_again(tmp_path: Path) -> None:
    first = calibrated(Machine(), tmp_path)
    adopted = adopt(first, Rule.KNEE, "cuda", "llama")
    assert adopted.reason == "Calibrated"
    profiles = Profiles(tmp_path)
    profiles.open()
    profiles.use(adopted)
    machine = Machine()
    again = calibrated(machine, tmp_path)
    assert not machine.steps
    assert (again.stored, again.fit) == (True, first.fit)
    same = adopt(again, Rule.KNEE, "cuda", "llama")
    assert same.profile.hash == adopted.profile.hash
    assert first.fit is not None
    assert [getattr(same.profile, name) for name in Costs._fields] == list(first.fit.costs)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "1" * 64},
        {"dtype": "float16"},
        {"device": "another GPU"},
        {"torch": "2.10.0"},
        {"transformers": "6.0.0"},
        {"engine": "0.2.0"},
        {"options": "graphs 0"},
        {"calibration": 2},
    ],
)
def test_when_anything_that_it_depends_on_changes_steps_are_timed_again(
    tmp_path: Path, change: dict[str, object]
) -> None:
    profiles = Profiles(tmp_path)
    profiles.use(adopt(Calibration(SUBJECT, Fit(COSTS, GOOD)), Rule.KNEE, "cuda", "llama"))
    assert stored_fit(tmp_path, SUBJECT) == Fit(COSTS, GOOD)
    machine = Machine()
    found = calibrated(machine, tmp_path, replace(SUBJECT, **change))  # type: ignore[arg-type]
    assert machine.steps
    assert not found.stored


def test_every_profile_that_was_ever_used_can_be_read_back_and_its_hash_recomputed(tmp_path: Path) -> None:
    from hashlib import sha256

    used = [
        adopt(None, Rule.KNEE, "cuda", "llama"),
        adopt(Calibration(SUBJECT, Fit(COSTS, GOOD)), Rule.KNEE, "cuda", "llama"),
        adopt(Calibration(SUBJECT, None, "too slow"), Rule.KNEE, "cuda", "llama"),
        adopt(None, Rule.TOKENS, "cuda", "llama"),
    ]
    for adopted in used:
        profiles = Profiles(tmp_path)
        profiles.open()
        profiles.use(adopted)
    document = json.loads(json.dumps(profiles.document()))
    assert document["current"] == used[-1].profile.hash
    assert {one["hash"] for one in document["profiles"]} == {adopted.profile.hash for adopted in used}
    for one in document["profiles"]:
        canonical = json.dumps(one["profile"], sort_keys=True, separators=(",", ":"))
        assert sha256(canonical.encode()).hexdigest() == one["hash"]
    assert json.loads((tmp_path / FILE_NAME).read_text())["profiles"] == document["profiles"]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME], "nothing half written stays"


@pytest.mark.parametrize("damage", ["{", '{"profiles": [{"hash": "x"}]}', "changed"])
def test_a_damaged_file_is_put_aside_whole_and_steps_are_timed_again(tmp_path: Path, damage: str) -> None:
    good = adopt(Calibration(SUBJECT, Fit(COSTS, GOOD)), Rule.KNEE, "cuda", "llama")
    Profiles(tmp_path).use(good)
    path = tmp_path / FILE_NAME
    text = path.read_text().replace(str(COSTS.lam_ps), "1") if damage == "changed" else damage
    path.write_text(text)
    assert stored_fit(tmp_path, SUBJECT) is None
    profiles = Profiles(tmp_path)
    profiles.open()
    assert (tmp_path / f"{FILE_NAME}.damaged").read_text() == text
    profiles.use(good)
    assert stored_fit(tmp_path, SUBJECT) == Fit(COSTS, GOOD)


def test_a_disk_that_refuses_costs_the_file_and_not_the_profile(tmp_path: Path) -> None:
    missing = tmp_path / "not-there"
    profiles = Profiles(missing)
    adopted = adopt(Calibration(SUBJECT, Fit(COSTS, GOOD)), Rule.KNEE, "cuda", "llama")
    profiles.use(adopted)
    assert profiles.document()["profiles"][0]["hash"] == adopted.profile.hash
    missing.mkdir()
    profiles.use(adopted)
    assert stored_fit(missing, SUBJECT) == Fit(COSTS, GOOD)


def test_a_profile_that_the_disk_refused_is_kept_as_soon_as_it_can_be_and_the_refusal_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "not-there"
    profiles = Profiles(missing)
    profiles.use(adopt(Calibration(SUBJECT, Fit(COSTS, GOOD)), Rule.KNEE, "cuda", "llama"))
    for _ in range(3):
        profiles.keep()
    assert [record.name for record in caplog.records].count("gpumeter_worker.metering.profiles") == 1
    missing.mkdir()
    profiles.keep()
    assert stored_fit(missing, SUBJECT) == Fit(COSTS, GOOD)
    (missing / FILE_NAME).unlink()
    profiles.keep()
    assert not (missing / FILE_NAME).exists(), "what is on disk is not written again"
