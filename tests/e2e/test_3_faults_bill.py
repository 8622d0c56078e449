"""The bill of a service that went through faults: no nanosecond is lost, and what died with a node is nobody's.

Every figure is recomputed by the auditor (audit.py), who imports nothing of the product. Last of the tests that look at
a story, because a bill is Final minutes after it: the others use that time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from decimal import Decimal

import pytest

from e2e import audit
from e2e.ordeal import REPLICAS, Evidence
from traffic.exchange import Outcome

SECOND_NS = 10**9
OWNED = ("init", "load", "warmup", "attributed", "nonbillable", "idle", "drain")

# Kubernetes rounds a start and an end to whole seconds, and the runtime takes its time to start a process.
START_NS = 2 * SECOND_NS
# A node that dies takes what its worker had not handed over: a pull is two seconds apart, a checkpoint five.
UNHEARD_NS = 10 * SECOND_NS
# Nobody can say when its container ended; it is counted until the service's last period that was closed meanwhile.
COUNTED_NS = 150 * SECOND_NS


@pytest.fixture(scope="module")
def records(settled: Evidence) -> list[dict]:
    return audit.rows_of(settled.ledger)


@pytest.fixture(scope="module")
def own_records(settled: Evidence, records: list[dict]) -> list[dict]:
    """Those of the story's service."""
    return [record for record in records if record["service"] == f"{settled.namespace}/{settled.name}"]


@pytest.fixture(scope="module")
def lives(settled: Evidence) -> list[audit.Life]:
    return audit.lives_of(settled.pods_seen)


@pytest.fixture(scope="module")
def stated(settled: Evidence) -> Mapping[str, Mapping[str, int]]:
    """The accounts of every pod's whole life, as the product's own command sums them up."""
    told = json.loads(settled.accounts)
    assert told["addsUp"] and told["checkedFromRawRecords"], told["problems"]
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in told["lines"]:
        for name, value in row["accounts"].items():
            sums[row["workerUid"]][name] += int(value)
    return sums


def test_every_record_is_in_the_ledger_once_and_in_an_unbroken_chain(own_records: list[dict]):
    assert len(own_records) > 100
    assert audit.broken_chains(own_records) == []


def test_every_answer_is_billed_what_it_said(settled: Evidence, own_records: list[dict]):
    sessions = audit.sessions_of(own_records)
    told = [one for one in settled.exchanges if one.outcome is Outcome.FINISHED]
    assert len(told) > 20
    for one in told:
        if any(died_ns - UNHEARD_NS < one.ended_at_ns < died_ns + SECOND_NS for died_ns in settled.deaths_ns):
            # Answered in the last seconds of a lost node: its last records may have died with it, and nobody pays them.
            billed_ns = sessions.get(one.session, {"gpu_ns": 0})["gpu_ns"]
            assert Decimal(billed_ns) / SECOND_NS <= Decimal(one.gpu_seconds), one
            continue
        assert sessions[one.session]["status"] == "finished", one
        assert Decimal(sessions[one.session]["gpu_ns"]) / SECOND_NS == Decimal(one.gpu_seconds), one


def test_every_workers_accounts_equal_its_allocated_time_to_the_nanosecond(
    settled: Evidence, lives: list[audit.Life], own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    books = audit.books_by_pod(own_records)
    ended = {life.pod_uid for life in lives}
    lost = {pod["metadata"]["uid"] for _, pod in settled.lost}
    assert ended | lost >= {pod for pod, accounts in stated.items() if accounts["allocated"]}
    assert len(ended) >= 2 * REPLICAS + 1
    for pod in ended - lost:
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
    lives_of_pod = Counter(life.pod_uid for life in lives)  # a pod whose node died has more than one, and one record
    served = [life for life in lives if life.exit_code == 0 and lives_of_pod[life.pod_uid] == 1]
    assert len(served) >= 2 * REPLICAS
    for life in served:
        unaccounted = audit.accounts_of([life], books[life.pod_uid])["unaccounted"]
        assert -2 * SECOND_NS <= unaccounted <= START_NS, life


def test_the_lost_workers_time_is_settled_and_what_died_with_it_is_nobodys(
    settled: Evidence, own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    # Also where the node was back at last: its runtime does not know when what died with it ended.
    for died_ns, lost in settled.lost:
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


def test_the_time_in_which_a_node_was_away_is_allocated_once_and_nobodys(
    settled: Evidence, lives: list[audit.Life], stated: Mapping[str, Mapping[str, int]]
):
    for uid in {absence.pod_uid for absence in settled.absences}:
        own = [life for life in lives if life.pod_uid == uid]
        away_ns = 0
        for absence in settled.absences:
            if absence.pod_uid == uid:
                interrupted = [life for life in own if life.started_ns < absence.died_ns][-1]
                away_ns += interrupted.ended_ns - absence.died_ns
        print(f"{uid}: away {away_ns} ns, stated {dict(stated[uid])}")
        assert away_ns > 0
        assert stated[uid]["allocated"] == sum(life.ended_ns - life.started_ns for life in own)
        slack_ns = len(own) * (UNHEARD_NS + START_NS)
        assert away_ns - SECOND_NS * len(own) <= stated[uid]["unaccounted"] <= away_ns + slack_ns


def test_the_reports_of_each_period_add_up_to_what_was_allocated(
    settled: Evidence, own_records: list[dict], stated: Mapping[str, Mapping[str, int]]
):
    periods: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for report in settled.reports:
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
