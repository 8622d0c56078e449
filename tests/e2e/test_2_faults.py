"""Faults of a real cluster under load: nobody's request is lost but the lost node's own, and no nanosecond at all.

Every figure is recomputed by the auditor (audit.py), who imports nothing of the product.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from decimal import Decimal

import pytest

from e2e import audit
from e2e.faultstory import MISSING_IMAGE, NAME, REPLICAS, Evidence
from traffic.exchange import Exchange, Outcome
from traffic.summary import surprises

SECOND_NS = 10**9
OWNED = ("init", "load", "warmup", "attributed", "nonbillable", "idle", "drain")
GRACEFUL = ("rollout", "mistakes", "quota", "eviction")

# Kubernetes rounds a start and an end to whole seconds, and the runtime takes its time to start a process.
START_NS = 2 * SECOND_NS
# A node that dies takes what its worker had not handed over: a pull is two seconds apart, a checkpoint five.
UNHEARD_NS = 10 * SECOND_NS
# Nobody can say when its container ended; it is counted until the service's last period that was closed meanwhile.
COUNTED_NS = 150 * SECOND_NS
# How long the gateway may take to notice that a worker which it waits for is no more: TCP's probes, and the rest.
NOTICED_NS = 45 * SECOND_NS


@pytest.fixture(scope="module")
def records(settled_faults: Evidence) -> list[dict]:
    return audit.rows_of(settled_faults.ledger)


@pytest.fixture(scope="module")
def own_records(records: list[dict]) -> list[dict]:
    return [record for record in records if record["service"].endswith(f"/{NAME}")]


@pytest.fixture(scope="module")
def lives(settled_faults: Evidence) -> list[audit.Life]:
    return audit.lives_of(settled_faults.pods_seen)


@pytest.fixture(scope="module")
def stated(settled_faults: Evidence) -> Mapping[str, Mapping[str, int]]:
    """The accounts of every pod's whole life, as the product's own command sums them up."""
    told = json.loads(settled_faults.accounts)
    assert told["addsUp"] and told["checkedFromRawRecords"], told["problems"]
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in told["lines"]:
        for name, value in row["accounts"].items():
            sums[row["workerUid"]][name] += int(value)
    return sums


def during(evidence: Evidence, *acts: str) -> list[Exchange]:
    """The requests that were under way in these acts; without any, nothing would be tested."""
    found = []
    for act in acts:
        own = [one for one in evidence.exchanges if evidence.acts[act].meets(one.started_at_ns, one.ended_at_ns)]
        assert any(one.outcome is Outcome.FINISHED for one in own), f"no request was answered in {act}"
        found += own
    return found


@pytest.mark.parametrize("act", GRACEFUL)
def test_no_request_is_lost_or_sent_away(faults: Evidence, act: str):
    unhappy = [one for one in during(faults, act) if one.outcome is not Outcome.FINISHED]
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
    assert len(loss["after"]) == REPLICAS and faults.lost["metadata"]["uid"] not in loss["after"]


def test_a_lost_node_fails_only_requests_that_its_worker_had_and_soon(faults: Evidence):
    loss = faults.acts["loss"]
    unhappy = [one for one in during(faults, "loss") if one.outcome is not Outcome.FINISHED]
    assert all(one.outcome is Outcome.FAILED and one.note for one in unhappy), surprises(unhappy)
    assert unhappy, "no request was in the lost worker; nothing was tested"
    for one in unhappy:  # on a connection from before: four seconds later none is kept
        assert one.started_at_ns < loss.begun_ns + 5 * SECOND_NS, surprises([one])
        assert one.ended_at_ns < loss.begun_ns + NOTICED_NS, surprises([one])


def test_every_record_is_in_the_ledger_once_and_in_an_unbroken_chain(own_records: list[dict]):
    assert len(own_records) > 100
    assert audit.broken_chains(own_records) == []


def test_every_answer_is_billed_what_it_said(settled_faults: Evidence, own_records: list[dict]):
    sessions = audit.sessions_of(own_records)
    died_ns = settled_faults.acts["loss"].begun_ns
    told = [one for one in settled_faults.exchanges if one.outcome is Outcome.FINISHED]
    assert len(told) > 20
    for one in told:
        if died_ns - UNHEARD_NS < one.ended_at_ns < died_ns + SECOND_NS and one.session not in sessions:
            continue  # answered in the last seconds of the lost node: its record may have died with it
        assert sessions[one.session]["status"] == "finished", one
        assert Decimal(sessions[one.session]["gpu_ns"]) / SECOND_NS == Decimal(one.gpu_seconds), one


def test_every_workers_accounts_equal_its_allocated_time_to_the_nanosecond(
    settled_faults: Evidence, lives: list[audit.Life], own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    books = audit.books_by_pod(own_records)
    ended = {life.pod_uid for life in lives}
    lost = settled_faults.lost["metadata"]["uid"]
    assert lost not in ended
    assert ended | {lost} >= {pod for pod, accounts in stated.items() if accounts["allocated"]}
    assert len(ended) >= 2 * REPLICAS + 1
    for pod in ended:
        own = audit.accounts_of([life for life in lives if life.pod_uid == pod], books[pod])
        theirs = stated[pod]
        assert theirs["allocated"] == own["allocated"], pod
        assert theirs["attributed"] == own["attributed"] == books[pod].attributed
        assert theirs["idle"] == own["idle"] + own["host_gap"]
        for name in ("init", "load", "warmup", "nonbillable", "drain", "unaccounted"):
            assert theirs[name] == own[name], name
        assert sum(theirs[name] for name in OWNED) + theirs["unaccounted"] == own["allocated"]


def test_a_worker_that_ended_in_order_leaves_nothing_unaccounted(lives: list[audit.Life], own_records: list[dict]):
    books = audit.books_by_pod(own_records)
    served = [life for life in lives if life.exit_code == 0]
    assert len(served) >= 2 * REPLICAS
    for life in served:
        unaccounted = audit.accounts_of([life], books[life.pod_uid])["unaccounted"]
        assert -2 * SECOND_NS <= unaccounted <= START_NS, life


def test_the_lost_workers_time_is_settled_and_what_died_with_it_is_nobodys(
    settled_faults: Evidence, own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    lost = settled_faults.lost
    died_ns = settled_faults.acts["loss"].begun_ns
    started_ns = audit.nanoseconds(lost["status"]["containerStatuses"][0]["state"]["running"]["startedAt"])
    theirs = stated[lost["metadata"]["uid"]]
    books = audit.books_by_pod(own_records)[lost["metadata"]["uid"]]
    known = books.slices + sum(books.own.values())
    assert theirs["attributed"] == books.slices == books.attributed > 0
    assert theirs["unaccounted"] == theirs["allocated"] - known
    ended_ns = started_ns + theirs["allocated"]
    assert died_ns - UNHEARD_NS <= ended_ns <= died_ns + COUNTED_NS
    # What is not accounted for is what nobody could hear: nothing of it is a tenant's.
    assert theirs["unaccounted"] <= ended_ns - died_ns + UNHEARD_NS + START_NS


def test_the_reports_of_each_period_add_up_to_what_was_allocated(
    settled_faults: Evidence, own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    periods: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for report in settled_faults.reports:
        assert report["status"]["phase"] == "Final"
        period = report["spec"]["period"]
        assert report["spec"]["tenant"] not in periods[period["start"], period["end"]]
        periods[period["start"], period["end"]][report["spec"]["tenant"]] = report["status"]
    assert len(periods) >= 3
    allocated = 0
    for tenants in periods.values():
        whole = int(tenants["_platform"]["accounts"]["allocated"])
        assert sum(int(status["gpuNanoseconds"]) for status in tenants.values()) == whole
        allocated += whole
    assert allocated == sum(pod["allocated"] for pod in stated.values())
    billed: dict[str, int] = defaultdict(int)
    for tenants in periods.values():
        for tenant, status in tenants.items():
            billed[tenant] += int(status["gpuNanoseconds"])
    sums = audit.tenant_sums(own_records, 0, max(record["ended_at"] for record in own_records))
    assert {tenant: ns for tenant, ns in billed.items() if tenant != "_platform"} == sums
