"""Faults of a real cluster under load: what its users see of a rollout, of mistakes, of a quota and of a lost node.

What they are billed for it is in test_3_faults_bill.py.
"""

import pytest

from e2e.faultstory import MISSING_IMAGE
from e2e.ordeal import REPLICAS, Evidence, during
from traffic.exchange import Exchange, Outcome
from traffic.summary import surprises

SECOND_NS = 10**9
GRACEFUL = ("rollout", "mistakes", "quota", "eviction")

# How long the gateway may take to notice that a worker which it waits for is no more: TCP's probes, and the rest.
NOTICED_NS = 45 * SECOND_NS
LONGEST_NS = 30 * SECOND_NS  # an answer of 64 tokens at most, on two busy cores


def was_in_flight(one: Exchange, died_ns: int) -> bool:
    """Whether a node's death may have ended it; one that had hung for long before is no such request."""
    return died_ns - LONGEST_NS < one.started_at_ns and one.ended_at_ns >= died_ns


@pytest.mark.parametrize("act", GRACEFUL)
def test_no_request_is_lost_or_sent_away(faults: Evidence, act: str):
    died_ns = faults.lost[0][0]
    unhappy = [
        one for one in during(faults, act) if one.outcome is not Outcome.FINISHED and not was_in_flight(one, died_ns)
    ]
    assert unhappy == [], surprises(unhappy)


def test_a_rollout_replaces_every_worker_though_the_operator_was_killed_in_its_middle(faults: Evidence):
    rollout = faults.acts["rollout"].seen
    assert rollout["killed"] >= 1
    assert len(rollout["before"]) == len(rollout["after"]) == REPLICAS
    assert not rollout["before"] & rollout["after"]


def test_a_rollout_whose_image_is_missing_stops_and_says_why(faults: Evidence):
    ready = faults.acts["mistakes"].seen["image"]
    assert ready["status"] == "True"
    assert MISSING_IMAGE in ready["message"] and "The former workers go on serving." in ready["message"]


def test_a_rollout_whose_model_cannot_be_loaded_stops_and_says_why(faults: Evidence):
    ready = faults.acts["mistakes"].seen["model"]
    assert ready["status"] == "True"
    assert "/mnt/models/typo" in ready["message"] and "The former workers go on serving." in ready["message"]


def test_a_mistake_that_is_taken_back_has_cost_no_worker(faults: Evidence):
    mistakes = faults.acts["mistakes"].seen
    assert mistakes["before"] == mistakes["meanwhile"] == mistakes["after"]


def test_an_exhausted_quota_is_said_and_costs_no_worker(faults: Evidence):
    quota = faults.acts["quota"].seen
    assert quota["quota"]["status"] == "True", "the workers that there are serve"
    assert "exceeded quota: few" in quota["quota"]["message"]
    assert quota["before"] == quota["after"]


def test_an_evicted_worker_is_replaced(faults: Evidence):
    eviction = faults.acts["eviction"].seen
    assert eviction["victim"] not in eviction["after"]
    assert len(eviction["before"] & eviction["after"]) == REPLICAS - 1


def test_a_lost_node_is_said_and_its_worker_moves(faults: Evidence):
    loss = faults.acts["loss"].seen
    assert loss["condition"]["status"] == "True", "the other worker serves"
    assert "gpumeter-node-2" in loss["condition"]["message"]
    assert len(loss["after"]) == REPLICAS and faults.lost[0][1]["metadata"]["uid"] not in loss["after"]


def test_a_lost_node_fails_only_requests_that_its_worker_had_and_soon(faults: Evidence):
    died_ns = faults.lost[0][0]
    unhappy = [one for one in during(faults, "loss") if one.outcome is not Outcome.FINISHED]
    assert all(one.outcome is Outcome.FAILED and one.note for one in unhappy), surprises(unhappy)
    assert unhappy, "no request was in the lost worker; nothing was tested"
    for one in unhappy:  # on a connection from before: four seconds later none is kept
        assert one.started_at_ns < died_ns + 5 * SECOND_NS, surprises([one])
        assert one.ended_at_ns < died_ns + NOTICED_NS, surprises([one])
