"""A node that is killed for a moment, cut off, drained, killed for minutes (`make test-faults`): what users see."""

from itertools import pairwise

import pytest

from e2e import audit
from e2e.ordeal import REPLICAS, Evidence, during, unanswered
from traffic.exchange import Outcome
from traffic.summary import surprises

SECOND_NS = 10**9
GRACEFUL = ("return", "drain", "return again")
HARD = ("cut", "blink", "loss")
NOTICED_NS = 45 * SECOND_NS  # how long the gateway may take to notice that a worker is no more: TCP's probes, the rest
# A container of which the runtime finds no trace ends, it says, when the runtime itself was started again.
RECOVERED_NS = 5 * SECOND_NS


@pytest.mark.parametrize("act", GRACEFUL)
def test_no_request_is_lost_or_sent_away(nodes: Evidence, act: str):
    unhappy = unanswered(nodes, act, HARD)
    assert unhappy == [], surprises(unhappy)


@pytest.mark.parametrize("act", HARD)
def test_a_node_that_is_not_heard_fails_only_what_its_worker_had_and_soon(nodes: Evidence, act: str):
    begun_ns = nodes.acts[act].begun_ns
    for one in during(nodes, act):
        if one.outcome is not Outcome.FINISHED:
            assert one.outcome is Outcome.FAILED and one.note, surprises([one])
            assert one.started_at_ns < begun_ns + 5 * SECOND_NS, surprises([one])
            assert one.ended_at_ns < begun_ns + NOTICED_NS, surprises([one])


def test_a_worker_that_is_cut_off_is_replaced_and_ends_when_it_hears_of_it(nodes: Evidence):
    cut = nodes.acts["cut"].seen
    assert cut["condition"]["status"] == "True"
    assert cut["cut off"] not in cut["after"] and len(cut["after"]) == REPLICAS


def test_a_drained_node_holds_no_worker_any_more(nodes: Evidence):
    assert nodes.acts["drain"].seen["nodes"] == {"gpumeter-node"}


def test_a_worker_goes_on_in_its_pod_when_its_node_was_away_for_a_moment(nodes: Evidence):
    blink = nodes.acts["blink"].seen
    assert blink["before"] == blink["after"]


def test_a_lost_node_that_nobody_cleans_up_after_costs_no_worker_for_good(nodes: Evidence):
    loss = nodes.acts["loss"].seen
    assert len(loss["after"]) == REPLICAS
    assert nodes.lost[0][1]["metadata"]["uid"] not in loss["after"]


def test_a_container_whose_node_died_ends_when_the_node_is_back_and_not_beside_the_next(nodes: Evidence):
    [absence] = nodes.absences
    lives = [life for life in audit.lives_of(nodes.pods_seen) if life.pod_uid == absence.pod_uid]
    interrupted = [life for life in lives if life.started_ns < absence.died_ns][-1]
    print(f"died {absence.died_ns}, back {absence.back_ns}: {lives}")
    assert absence.died_ns - SECOND_NS <= interrupted.ended_ns <= absence.back_ns + RECOVERED_NS
    for life, following in pairwise(lives):
        assert life.ended_ns <= following.started_ns, "two containers of one pod at a time"
