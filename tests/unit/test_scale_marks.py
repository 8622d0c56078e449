"""What stands on a pod that drains, leaves, and serves again."""

from typing import Any

import pytest

from gpumeter_operator.decide.crew import COST_DRAINING, COST_LEAVING
from gpumeter_operator.decide.marks import draining, leaving, serving

COST = "controller.kubernetes.io/pod-deletion-cost"


def patched(pod: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """As the API server merges."""
    found: dict[str, Any] = {"metadata": {}}
    for kind in ("labels", "annotations"):
        merged = {**pod["metadata"].get(kind, {}), **patch["metadata"][kind]}
        found["metadata"][kind] = {key: value for key, value in merged.items() if value is not None}
    return found


@pytest.mark.parametrize("cost", [{}, {COST: "5"}])
def test_a_worker_that_serves_again_has_the_deletion_cost_that_it_had(cost: dict[str, str]) -> None:
    pod = {"metadata": {"labels": {"gpumeter.io/draining": "false"}, "annotations": {"a": "b", **cost}}}
    marked = patched(pod, draining(pod, "2026-11-21T10:00:00Z"))
    assert marked["metadata"]["annotations"][COST] == str(COST_DRAINING)
    assert marked["metadata"]["annotations"]["gpumeter.io/draining-since"] == "2026-11-21T10:00:00Z"
    gone = patched(marked, leaving(marked))
    assert gone["metadata"]["annotations"][COST] == str(COST_LEAVING)
    assert patched(marked, serving(marked)) == patched(gone, serving(gone)) == pod


def test_a_mark_by_hand_takes_no_deletion_cost_along_when_it_goes() -> None:
    pod = {"metadata": {"labels": {"gpumeter.io/draining": "true"}, "annotations": {COST: "5"}}}
    assert patched(pod, serving(pod))["metadata"] == {
        "labels": {"gpumeter.io/draining": "false"},
        "annotations": {COST: "5"},
    }
