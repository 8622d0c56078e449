"""What the collector tells of a price plan, in the plan's own status."""

from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.adapters.kubernetes import Refused
from gpumeter_operator.billing.plan_status import SeenVersion, status_of
from gpumeter_operator.flow.plans import PlanTeller
from rigs.ledger import inline
from rigs.pricing import PricedHour, at, plan, rate

FLAT = plan(rate("3.60"))


class FakeCluster:
    """Keeps what is applied, or refuses."""

    def __init__(self) -> None:
        self.refuses = False
        self.applied: list[dict[str, Any]] = []

    async def apply(
        self, manifest: dict[str, Any], *, field_manager: str, subresource: str | None = None
    ) -> dict[str, Any]:
        if self.refuses:
            raise Refused(403, "Forbidden", "may not")
        assert (field_manager, subresource) == ("gpumeter-collector", "status")
        self.applied.append(manifest)
        return manifest


def resource(status: dict[str, Any] | None = None) -> dict[str, Any]:
    whole = {"apiVersion": "gpumeter.io/v1alpha1", "kind": "PricePlan", "metadata": {"name": "default", "uid": "u"}}
    return whole | ({"status": status} if status else {})


@pytest.mark.parametrize(
    ("versions", "reason", "told"),
    [
        ([(FLAT, 0)], "InForce", "Version 1 is in force."),
        ([(FLAT, 0), (plan(rate("4")), 20.5)], "InForce", "Version 2 holds from 2026-11-21T10:21:00Z."),
        ([(FLAT, 0), (plan(rate("3.60"), rate("4", 30)), 20)], "InForce", "Version 2 holds from 2026-11-21T10:20:00Z."),
        (
            [(FLAT, 0), (plan(rate("3.60"), rate("4", 10)), 20)],
            "NotRetroactive",
            "It has rates that were to begin at 2026-11-21T10:10:00Z, before it was seen; they begin with it, and what "
            "was used before keeps its price.",
        ),
        ([(FLAT, 0), (plan(rate("-1")), 20)], "PlanInvalid", "a price is not negative."),
    ],
)
def test_an_edit_is_answered_with_from_when_it_holds(
    versions: list[tuple[bytes, float]], reason: str, told: str
) -> None:
    seen = [SeenVersion(number, "h", spec, at(minute)) for number, (spec, minute) in enumerate(versions, start=1)]
    status = status_of("default", seen)
    assert (status.reason, status.ready) == (reason, reason != "PlanInvalid")
    assert told in status.message


async def test_a_status_is_written_when_there_is_something_new_to_say_and_only_then(tmp_path: Path) -> None:
    hour, cluster = PricedHour(tmp_path), FakeCluster()
    teller = PlanTeller(cluster, hour.ledger, inline)
    await teller.tell([resource()], at(0))
    assert cluster.applied == [], "nothing was seen of it yet"
    hour.see(FLAT, 0)
    for _ in range(2):
        await teller.tell([resource()], at(1))
    (first,) = cluster.applied
    assert first["status"]["hash"] == hour.newest
    assert first["status"]["conditions"][0]["lastTransitionTime"] == "2026-11-21T10:01:00Z"
    await PlanTeller(cluster, hour.ledger, inline).tell([resource(first["status"])], at(2))
    assert len(cluster.applied) == 1, "another process finds it written"
    hour.see(plan(rate("4")), 3)
    await teller.tell([resource(first["status"])], at(3))
    second = cluster.applied[1]["status"]
    assert second["observedGeneration"] == second["conditions"][0]["observedGeneration"] == 2
    assert second["conditions"][0]["lastTransitionTime"] == "2026-11-21T10:01:00Z", "it was ready all the time"


async def test_a_status_that_may_not_be_written_stops_nothing_and_is_tried_again(tmp_path: Path) -> None:
    hour, cluster = PricedHour(tmp_path), FakeCluster()
    teller = PlanTeller(cluster, hour.ledger, inline)
    hour.see(FLAT, 0)
    cluster.refuses = True
    await teller.tell([resource()], at(1))
    cluster.refuses = False
    await teller.tell([resource()], at(2))
    assert len(cluster.applied) == 1
