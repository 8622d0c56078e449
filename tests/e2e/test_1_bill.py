"""The bill of a day that went wrong: a worker killed, a collector killed, clients that left, a service deleted.

Every figure is recomputed by an auditor (audit.py) who imports nothing of the product.
"""

import json
from collections import defaultdict
from decimal import Decimal

import pytest

from e2e import audit
from e2e.story import SERVICE, TEAM, Evidence
from traffic.exchange import Exchange, Outcome
from traffic.summary import surprises

SECOND_NS = 10**9

# What one life of a container may leave unaccounted. Kubernetes rounds its start and its end down to whole seconds,
# and no process of ours runs before the runtime has started it.
START_NS = 2 * SECOND_NS
# A kill loses what was not yet on disk: one checkpoint interval (5 s), the group commit, and rounding.
KILL_NS = 5 * SECOND_NS + 2 * SECOND_NS


@pytest.fixture(scope="module")
def records(evidence: Evidence) -> list[dict]:
    """Those of the story's service: the ledger is everybody's."""
    return [record for record in audit.rows_of(evidence.ledger) if record["service"] == f"{TEAM}/{SERVICE}"]


@pytest.fixture(scope="module")
def sessions(records: list[dict]) -> dict[str, dict]:
    return audit.sessions_of(records)


@pytest.fixture(scope="module")
def lives(evidence: Evidence) -> list[audit.Life]:
    return audit.lives_of(evidence.pods_seen)


def by_outcome(evidence: Evidence, *outcomes: Outcome) -> list:
    found = [one for one in evidence.exchanges if one.outcome in outcomes and one.session]
    assert found, f"the traffic held no {outcomes} request; nothing would be tested"
    return found


def died_with_the_worker(evidence: Evidence, one: Exchange) -> bool:
    """Whether it ended in the last seconds of the killed worker, so that its last slice may have died with it."""
    return one.ended_at_ns > evidence.killed_at_ns - 6 * SECOND_NS and one.started_at_ns < evidence.killed_at_ns


def test_every_record_is_in_the_ledger_once_and_in_an_unbroken_chain(records: list[dict]):
    assert len(records) > 100
    assert audit.broken_chains(records) == []


def test_what_a_worker_was_told_is_safe_is_in_the_ledger(evidence: Evidence, records: list[dict]):
    kept = defaultdict(set)
    for record in records:
        kept[record["worker_uid"], record["boot_id"]].add(record["seq"])
    assert sum(evidence.acknowledged.values()) > 100
    for boot, seq in evidence.acknowledged.items():
        assert set(range(1, seq + 1)) <= kept[boot]


def test_the_kill_really_happened(evidence: Evidence, lives: list[audit.Life], records: list[dict]):
    killed = [life for life in lives if life.pod_uid == evidence.killed_pod_uid]
    assert [life.exit_code for life in killed] == [137, 0]
    statuses = [
        record["status"]
        for record in records
        if record["kind"] == "seal" and record["worker_uid"] == evidence.killed_pod_uid
    ]
    assert sorted(statuses) == ["drained", "recovered"]


def test_every_pods_accounts_equal_its_allocated_time_to_the_nanosecond(
    evidence: Evidence, lives: list[audit.Life], records: list[dict]
):
    stated = defaultdict(lambda: defaultdict(int))
    for row in json.loads(evidence.accounts)["lines"]:
        assert row["final"]
        for name, value in row["accounts"].items():
            stated[row["workerUid"]][name] += int(value)
    books = audit.books_by_pod(records)
    pods = {life.pod_uid for life in lives}
    assert len(pods) == 2 and pods == set(books)
    for pod in pods:
        own = audit.accounts_of([life for life in lives if life.pod_uid == pod], books[pod])
        theirs = stated[pod]
        assert theirs["allocated"] == own["allocated"]
        assert theirs["attributed"] == own["attributed"] == books[pod].attributed
        assert theirs["idle"] == own["idle"] + own["host_gap"]
        for name in ("init", "load", "warmup", "nonbillable", "drain", "unaccounted"):
            assert theirs[name] == own[name], name
        owned = ("init", "load", "warmup", "attributed", "nonbillable", "idle", "drain", "unaccounted")
        assert sum(theirs[name] for name in owned) == own["allocated"]


def test_what_stays_unaccounted_is_within_the_stated_bound(
    evidence: Evidence, lives: list[audit.Life], records: list[dict]
):
    books = audit.books_by_pod(records)
    for pod in {life.pod_uid for life in lives}:
        own = [life for life in lives if life.pod_uid == pod]
        bound = START_NS * len(own) + KILL_NS * sum(life.exit_code == 137 for life in own)
        unaccounted = audit.accounts_of(own, books[pod])["unaccounted"]
        assert -2 * SECOND_NS * len(own) <= unaccounted <= bound


def test_an_aborted_request_is_billed(evidence: Evidence, sessions: dict[str, dict]):
    lasting = [one for one in by_outcome(evidence, Outcome.ABORTED) if not died_with_the_worker(evidence, one)]
    assert lasting
    billed = [sessions[one.session] for one in lasting]
    assert all(session["gpu_ns"] > 0 and session["ends"] <= 1 for session in billed)
    assert any(session["status"] == "cancelled" for session in billed)


def test_a_finished_request_is_billed_what_its_answer_said(evidence: Evidence, sessions: dict[str, dict]):
    told = [one for one in by_outcome(evidence, Outcome.FINISHED) if one.gpu_seconds]
    assert told
    for one in told:
        if died_with_the_worker(evidence, one):
            continue
        assert Decimal(sessions[one.session]["gpu_ns"]) / SECOND_NS == Decimal(one.gpu_seconds), one.session
        assert sessions[one.session]["status"] == "finished"


def test_every_session_belongs_to_the_tenant_whose_key_was_used(evidence: Evidence, sessions: dict[str, dict]):
    assert any(one.session in sessions for one in evidence.exchanges)
    for one in evidence.exchanges:
        if one.session in sessions:
            assert sessions[one.session]["tenant"] == one.tenant


def test_a_refused_request_costs_nothing(evidence: Evidence, sessions: dict[str, dict]):
    for one in by_outcome(evidence, Outcome.REFUSED):
        assert sessions.get(one.session, {"gpu_ns": 0})["gpu_ns"] == 0


def test_a_request_that_the_killed_worker_was_serving_fails_with_a_sentence(
    evidence: Evidence, sessions: dict[str, dict]
):
    failed = [one for one in evidence.exchanges if one.outcome is Outcome.FAILED]
    assert all(one.note for one in failed)
    for one in failed:  # nothing but the kill may have failed anyone
        assert one.started_at_ns <= evidence.killed_at_ns + 5 * SECOND_NS, surprises([one])
        assert sessions.get(one.session, {"tenant": one.tenant})["tenant"] == one.tenant


def test_deleting_a_service_loses_no_usage(evidence: Evidence, sessions: dict[str, dict], records: list[dict]):
    assert evidence.farewell is not None and evidence.farewell.outcome is Outcome.FINISHED
    session = sessions[evidence.farewell.session]
    assert session["status"] == "finished"
    assert Decimal(session["gpu_ns"]) / SECOND_NS == Decimal(evidence.farewell.gpu_seconds)
    last = {(record["worker_uid"], record["boot_id"]): record for record in records}
    assert {record["kind"] for record in last.values()} == {"seal"}
    assert evidence.deletion_s < 60


def test_the_reports_of_each_period_add_up_to_what_kubernetes_allocated(
    evidence: Evidence, lives: list[audit.Life], records: list[dict]
):
    periods = defaultdict(dict)
    for report in evidence.reports:
        assert report["spec"]["serviceRef"]["name"] == SERVICE
        assert report["status"]["phase"] == "Final"
        edges = tuple(audit.nanoseconds(report["spec"]["period"][edge]) for edge in ("start", "end"))
        assert report["spec"]["tenant"] not in periods[edges], "two reports of one tenant and period"
        periods[edges][report["spec"]["tenant"]] = report["status"]
    assert sum(len(tenants) > 1 for tenants in periods.values()) >= 2
    covered = 0
    for (start_ns, end_ns), tenants in periods.items():
        allocated = sum(max(0, min(end_ns, one.ended_ns) - max(start_ns, one.started_ns)) for one in lives)
        covered += allocated
        assert sum(int(status["gpuNanoseconds"]) for status in tenants.values()) == allocated
        assert int(tenants["_platform"]["accounts"]["allocated"]) == allocated
        billed = {tenant: int(status["gpuNanoseconds"]) for tenant, status in tenants.items() if tenant != "_platform"}
        assert {tenant: ns for tenant, ns in billed.items() if ns} == {
            tenant: ns for tenant, ns in audit.tenant_sums(records, start_ns, end_ns).items() if ns
        }
    assert covered == sum(life.ended_ns - life.started_ns for life in lives), (
        "a period of the pods' lives has no report"
    )


def test_an_amount_is_the_time_at_the_price(evidence: Evidence):
    priced = [one["status"] for one in evidence.reports if one["spec"]["tenant"] != "_platform"]
    assert priced
    for status in priced:
        exact = Decimal(status["gpuNanoseconds"]) * Decimal("0.40") / Decimal(3600 * SECOND_NS)
        assert status["currency"] == "USD"
        assert abs(Decimal(status["amount"]) - exact) <= Decimal("1e-9")
