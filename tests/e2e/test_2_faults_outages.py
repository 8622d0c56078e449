"""No API server for a minute, operators killed again and again (`make test-faults`): what users see of it."""

import pytest

from e2e.ordeal import REPLICAS, Evidence, unanswered
from e2e.outagestory import KILLS
from traffic.summary import surprises


@pytest.mark.parametrize("act", ["no api", "kills"])
def test_no_request_is_lost_or_sent_away(outages: Evidence, act: str):
    unhappy = unanswered(outages, act)
    assert unhappy == [], surprises(unhappy)


def test_without_an_api_server_requests_are_answered_and_what_was_asked_is_done_afterwards(outages: Evidence):
    away = outages.acts["no api"].seen
    assert away["answered"] > 5
    assert not away["before"] & away["after"] and len(away["after"]) == REPLICAS


def test_a_rollout_ends_however_often_the_operator_is_killed(outages: Evidence):
    kills = outages.acts["kills"].seen
    assert kills["killed"] >= 3, f"of {KILLS} moments; while its container backs off there is nothing to kill"
    assert not kills["before"] & kills["after"] and len(kills["after"]) == REPLICAS
