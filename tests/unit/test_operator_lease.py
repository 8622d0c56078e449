"""The rule of the Lease: when it may be taken, and that no two machines' clocks are ever compared."""

from dataclasses import replace

import pytest

from gpumeter_operator.decide.lease import (
    SECOND_NS,
    Lease,
    Terms,
    claim,
    free_at_ns,
    given_back,
    may_act_until_ns,
    next_look_ns,
    renew_at_ns,
    sight,
)

TERMS = Terms()
HELD = Lease("a", 7, "2026-11-21T10:00:00.000000Z", "2026-11-21T10:00:01.000000Z", 3, "17")


def test_a_lease_is_free_when_it_was_unchanged_for_its_whole_duration_by_the_watchers_clock() -> None:
    sighting = sight(None, HELD, 1_000)
    assert free_at_ns(sighting) == 1_000 + 7 * SECOND_NS
    again = sight(sighting, HELD, 5 * SECOND_NS)
    assert free_at_ns(again) == 1_000 + 7 * SECOND_NS, "seen again, unchanged"


@pytest.mark.parametrize("renewed", ["1970-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z", "no time at all"])
def test_whatever_time_another_machine_has_only_the_change_counts(renewed: str) -> None:
    sighting = sight(sight(None, HELD, 0), replace(HELD, renewed=renewed), 4 * SECOND_NS)
    assert free_at_ns(sighting) == 11 * SECOND_NS


def test_a_note_of_somebody_else_on_the_lease_is_no_renewal() -> None:
    sighting = sight(sight(None, HELD, 0), replace(HELD, version="18"), 4 * SECOND_NS)
    assert free_at_ns(sighting) == 7 * SECOND_NS
    assert sighting.lease.version == "18", "what is written must be over the newest version"


def test_a_lease_that_was_given_back_is_free_at_once() -> None:
    sighting = sight(None, given_back(HELD, "later"), 1_000)
    assert free_at_ns(sighting) == 1_000


def test_the_holders_own_duration_counts_and_not_the_watchers() -> None:
    assert free_at_ns(sight(None, replace(HELD, duration_s=60), 0)) == 60 * SECOND_NS


def test_whoever_stands_by_looks_twice_a_second_and_at_the_very_moment_at_which_the_lease_is_free() -> None:
    sighting = sight(None, HELD, 0)
    assert next_look_ns(sighting, TERMS, SECOND_NS) == 3 * SECOND_NS // 2
    assert next_look_ns(sighting, TERMS, 7 * SECOND_NS - 1_000) == 7 * SECOND_NS
    assert next_look_ns(sighting, TERMS, 7 * SECOND_NS) > 7 * SECOND_NS, "somebody was faster; no hot loop"
    assert next_look_ns(None, TERMS, 0) == TERMS.look_every_ns


def test_a_new_holder_is_a_transition_and_a_renewal_is_none() -> None:
    taken = claim(HELD, "b", TERMS, "now")
    assert taken == Lease("b", 7, "now", "now", 4, "17")
    assert claim(taken, "b", TERMS, "later") == Lease("b", 7, "now", "later", 4, "17")
    assert claim(replace(taken, acquired=""), "b", TERMS, "later").acquired == "later", (
        "no time is none to the API server"
    )
    assert claim(None, "b", TERMS, "now") == Lease("b", 7, "now", "now", 0, "")


def test_a_holder_stops_two_seconds_before_another_may_begin() -> None:
    sent_ns = 100 * SECOND_NS
    seen_at_the_same_moment = free_at_ns(sight(None, HELD, sent_ns))
    assert seen_at_the_same_moment - may_act_until_ns(sent_ns, TERMS) == 2 * SECOND_NS


def test_a_renewal_that_failed_is_tried_again_sooner() -> None:
    assert renew_at_ns(0, None, TERMS) == 3 * SECOND_NS // 2
    assert renew_at_ns(0, 2 * SECOND_NS, TERMS) == 5 * SECOND_NS // 2


@pytest.mark.parametrize("wrong", [{"duration_s": 5}, {"deadline_ns": 3 * SECOND_NS}])
def test_terms_under_which_two_could_act_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must last longer"):
        Terms(**wrong)
