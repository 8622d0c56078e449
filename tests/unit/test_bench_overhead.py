"""The overhead's bench: what it makes of its times, and that what it times is the product's metering."""

import pytest

from bench.overhead_parts import cost_of
from bench.overhead_report import Quad, difference, tables


def test_a_known_slowdown_is_found_and_lies_in_its_interval() -> None:
    quads = [Quad(4, 10_200_000 + wobble, 10_000_000 + wobble) for wobble in (-40_000, 0, 30_000) * 20]
    found = difference(quads, sequences=32, apart_us=0)
    assert found.percent == pytest.approx(2, abs=0.01)
    assert found.low_percent < 2 < found.high_percent
    assert found.tokens_per_s_without == pytest.approx(4 * 32 / 0.01, rel=0.01)
    assert found.tokens_per_s_with < found.tokens_per_s_without


def test_noise_around_nothing_has_an_interval_that_holds_nothing() -> None:
    quads = [Quad(4, 10_000_000 + wobble, 10_000_000 - wobble) for wobble in (-500_000, 500_000) * 30]
    found = difference(quads, sequences=1, apart_us=0)
    assert found.low_percent < 0 < found.high_percent


def test_a_few_pauses_of_the_machine_do_not_decide() -> None:
    quads = [Quad(4, 10_050_000 + wobble, 10_000_000) for wobble in (-10_000, 10_000) * 30]
    paused = [Quad(4, 25_000_000, 10_000_000), *quads, Quad(4, 10_000_000, 18_000_000)]
    assert difference(paused, 32, apart_us=0).percent == pytest.approx(0.5, abs=0.02)


def test_what_both_ways_do_for_the_meter_is_added() -> None:
    quads = [Quad(4, 10_000_000 + wobble, 10_000_000) for wobble in (-1, 1) * 10]
    assert difference(quads, 32, apart_us=25).percent == pytest.approx(1, abs=0.001)  # 25 us of 2.5 ms


def test_every_part_of_a_step_is_timed_and_stands_in_the_table() -> None:
    cost = cost_of(4, 4)
    assert min(cost.parts, cost.split, cost.book, cost.journal) > 0
    assert cost.changed > cost.journal
    assert cost.total == pytest.approx(cost.parts + cost.wire + cost.split + cost.book + cost.journal)
    where = {"processor": "a processor", "threads": 1, "cores": 2, "python": "3"}
    found = difference([Quad(4, 11, 10), Quad(4, 12, 10)], 4, cost.parts)
    assert f"| 4 sequences | {cost.parts:.1f} | " in tables(where, "tiny", [cost], found)
