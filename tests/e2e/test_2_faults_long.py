"""The longer faults of a real cluster (`make test-faults`): what users see. The bill is in test_2_faults_bill.py."""

import pytest

from e2e.longstory import KILLS, SAME_IMAGE
from e2e.ordeal import REPLICAS, Evidence
from traffic.exchange import Exchange, Outcome
from traffic.summary import surprises

SECOND_NS = 10**9
GRACEFUL = ("spike", "edits", "image", "kills", "no api", "return", "drain", "return again")
HARD = ("cut", "blink", "loss")
NOTICED_NS = 45 * SECOND_NS


def during(evidence: Evidence, act: str) -> list[Exchange]:
    """The requests that were under way in an act; without any, nothing would be tested."""
    own = [one for one in evidence.exchanges if evidence.acts[act].meets(one.started_at_ns, one.ended_at_ns)]
    assert any(one.outcome is Outcome.FINISHED for one in own), f"no request was answered in {act}"
    return own


@pytest.mark.parametrize("act", GRACEFUL)
def test_no_request_is_lost_or_sent_away(long: Evidence, act: str):
    hard = [long.acts[name] for name in HARD]
    unhappy = [
        one
        for one in during(long, act)
        if one.outcome is not Outcome.FINISHED
        and not any(each.meets(one.started_at_ns, one.ended_at_ns) for each in hard)
    ]
    assert unhappy == [], surprises(unhappy)


@pytest.mark.parametrize("act", HARD)
def test_a_node_that_is_not_heard_fails_only_what_its_worker_had_and_soon(long: Evidence, act: str):
    begun_ns = long.acts[act].begun_ns
    for one in during(long, act):
        if one.outcome is not Outcome.FINISHED:
            assert one.outcome is Outcome.FAILED and one.note, surprises([one])
            assert one.started_at_ns < begun_ns + 5 * SECOND_NS, surprises([one])
            assert one.ended_at_ns < begun_ns + NOTICED_NS, surprises([one])


def test_a_queue_brings_a_worker_and_its_end_takes_it_away(long: Evidence):
    history = long.acts["spike"].seen["history"]
    assert "QueueAboveTarget" in history and "QueueBelowTarget" in history


def test_of_edits_in_a_row_the_last_one_holds_and_at_once(long: Evidence):
    edits = long.acts["edits"].seen
    assert edits["applied_s"] < 5
    assert edits["served"] == {edits["wanted"]}


def test_another_image_is_what_runs_in_the_end(long: Evidence):
    assert long.acts["image"].seen["images"] == {SAME_IMAGE}


def test_a_rollout_ends_however_often_the_operator_is_killed(long: Evidence):
    kills = long.acts["kills"].seen
    assert kills["killed"] >= 3, f"of {KILLS} moments; while its container backs off there is nothing to kill"
    assert not kills["before"] & kills["after"] and len(kills["after"]) == REPLICAS


def test_without_an_api_server_requests_are_answered_and_what_was_asked_is_done_afterwards(long: Evidence):
    away = long.acts["no api"].seen
    assert away["answered"] > 5
    assert not away["before"] & away["after"] and len(away["after"]) == REPLICAS


def test_a_worker_that_is_cut_off_is_replaced_and_ends_when_it_hears_of_it(long: Evidence):
    cut = long.acts["cut"].seen
    assert cut["condition"]["status"] == "True"
    assert cut["cut off"] not in cut["after"] and len(cut["after"]) == REPLICAS


def test_a_drained_node_holds_no_worker_any_more(long: Evidence):
    assert long.acts["drain"].seen["nodes"] == {"gpumeter-node"}


def test_a_worker_goes_on_in_its_pod_when_its_node_was_away_for_a_moment(long: Evidence):
    blink = long.acts["blink"].seen
    assert blink["before"] == blink["after"]


def test_a_lost_node_that_nobody_cleans_up_after_costs_no_worker_for_good(long: Evidence):
    loss = long.acts["loss"].seen
    assert len(loss["after"]) == REPLICAS
    assert long.lost[0][1]["metadata"]["uid"] not in loss["after"]
