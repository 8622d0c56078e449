"""A spike, edits and another image under load (`make test-faults`): what users see of them."""

import pytest

from e2e.editstory import SAME_IMAGE
from e2e.ordeal import Evidence, unanswered
from traffic.summary import surprises


@pytest.mark.parametrize("act", ["spike", "fixed", "edits", "image"])
def test_no_request_is_lost_or_sent_away(edits: Evidence, act: str):
    unhappy = unanswered(edits, act)
    assert unhappy == [], surprises(unhappy)


def test_a_queue_brings_a_worker_and_its_end_takes_it_away(edits: Evidence):
    history = edits.acts["spike"].seen["history"]
    assert "QueueAboveTarget" in history and "QueueBelowTarget" in history


def test_of_edits_in_a_row_the_last_one_holds_and_at_once(edits: Evidence):
    seen = edits.acts["edits"].seen
    assert seen["applied_s"] < 5
    assert seen["served"] == {seen["wanted"]}


def test_another_image_is_what_runs_in_the_end(edits: Evidence):
    assert edits.acts["image"].seen["images"] == {SAME_IMAGE}
