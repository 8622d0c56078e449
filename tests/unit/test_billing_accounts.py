"""Accounts of a pod, with exact numbers."""

import pytest

from gpumeter_operator.billing.accounts import Accounts, drain_tail_ns, fold, horizon_ns, overlap_ns
from gpumeter_operator.billing.facts import BootFacts, Line, Pod, Span, Worker, line_of, merge
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, Period
from gpumeter_usage.record import Account, Kind, Record, Status

PERIOD = Period(0, MINUTE_NS, Granularity.MINUTE)
WORKER = Worker("uid", "team-a", "smollm2", "svc", "smollm2", "h100", 2, "smollm2-x")


def line(account: str, gpu_ns: int, kind: Kind = Kind.ACCOUNT, tenant: str = "") -> Line:
    return Line("uid", "boot-1", kind, account, tenant, "cuda", 1, 1, 1, gpu_ns=gpu_ns)


def pod(*spans: Span, boots: tuple[BootFacts, ...] = (), **values: object) -> Pod:
    return Pod(WORKER, spans, boots, **values)  # type: ignore[arg-type]


def test_every_nanosecond_of_a_pod_has_an_owner() -> None:
    lines = [
        line("init", 1),
        line("load", 20),
        line("warmup", 300),
        line("attributed", 4_000),
        line("attributed", 3_999, Kind.SESSION, "acme"),
        line("attributed", 1, Kind.SESSION, "beta"),
        line("nonbillable", 50_000),
        line("idle", 600_000),
        line("host_gap", 7_000_000),
        line("drain", 80_000_000),
    ]
    booked = fold(pod(Span("c", 10 * SECOND_NS, 11 * SECOND_NS, True)), PERIOD, lines, until_ns=MINUTE_NS)
    assert booked.problems == ()
    assert booked.accounts == Accounts(
        allocated=2 * SECOND_NS,
        init=1,
        load=20,
        warmup=300,
        attributed=4_000,
        nonbillable=50_000,
        idle=7_600_000,
        drain=80_000_000,
        unaccounted=2 * SECOND_NS - 87_654_321,
        host_gap=7_000_000,
    )
    assert booked.accounts.platform == 2 * SECOND_NS - 4_000


def test_unaccounted_is_negative_where_more_was_measured_than_allocated() -> None:
    booked = fold(pod(Span("c", 0, SECOND_NS, True)), PERIOD, [line("idle", 2 * SECOND_NS + 5)], until_ns=MINUTE_NS)
    assert booked.accounts.unaccounted == -5


def test_slices_that_do_not_sum_to_what_the_pod_booked_are_told() -> None:
    lines = [line("attributed", 100), line("attributed", 99, Kind.SESSION, "acme")]
    booked = fold(pod(Span("c", 0, SECOND_NS, True)), PERIOD, lines, until_ns=MINUTE_NS)
    assert booked.accounts.attributed == 99, "a tenant pays what its sessions used, and no more"
    assert "sum to 99 ns, the pod booked 100 ns" in booked.problems[0]


def test_only_the_part_of_a_span_within_the_period_is_allocated_to_it() -> None:
    later = Period(MINUTE_NS, 2 * MINUTE_NS, Granularity.MINUTE)
    spans = (Span("a", 30 * SECOND_NS, 70 * SECOND_NS, True), Span("b", 90 * SECOND_NS))
    first = fold(pod(*spans), PERIOD, [], until_ns=MINUTE_NS).accounts
    second = fold(pod(*spans), later, [], until_ns=2 * MINUTE_NS).accounts
    assert (first.allocated, second.allocated) == (60 * SECOND_NS, 80 * SECOND_NS)


def test_nothing_accrues_after_the_pod_is_gone() -> None:
    spans = [Span("a", 10 * SECOND_NS, 20 * SECOND_NS, False)]
    assert overlap_ns(spans, 1, 0, 100 * MINUTE_NS) == 10 * SECOND_NS


def test_a_worker_that_drained_owns_the_tail_of_its_container_as_drain() -> None:
    boot = BootFacts("boot-1", 11 * SECOND_NS, 9, "h", Status.DRAINED, 30 * SECOND_NS + 7)
    tail = drain_tail_ns(pod(Span("c", 10 * SECOND_NS, 40 * SECOND_NS, True), boots=(boot,)), PERIOD, MINUTE_NS)
    assert tail == 2 * (10 * SECOND_NS - 7)


def test_a_process_that_was_forked_before_its_container_started_owns_its_tail_too() -> None:
    former = Span("c1", 2 * SECOND_NS, 9 * SECOND_NS, True)
    own = Span("c2", 20 * SECOND_NS, 40 * SECOND_NS, True)
    boot = BootFacts("b", 20 * SECOND_NS - 120_000_000, 9, "h", Status.DRAINED, 39 * SECOND_NS)
    assert drain_tail_ns(pod(former, own, boots=(boot,)), PERIOD, MINUTE_NS) == 2 * SECOND_NS


def test_the_tail_of_a_drained_boot_never_reaches_into_the_next_one() -> None:
    # Kubernetes rounds starts down: the second container seems to have begun before the first was sealed.
    spans = (Span("a", 0, 10 * SECOND_NS, True), Span("b", 10 * SECOND_NS))
    drained = BootFacts("boot-1", SECOND_NS // 2, 9, "h", Status.DRAINED, 10 * SECOND_NS + 500)
    running = BootFacts("boot-2", 10 * SECOND_NS + 900, 5, "h")
    assert drain_tail_ns(pod(*spans, boots=(drained, running)), PERIOD, MINUTE_NS) == 0


def test_what_lies_between_a_recovered_seal_and_the_end_of_the_container_is_unaccounted() -> None:
    boot = BootFacts("boot-1", 0, 9, "h", Status.RECOVERED, 30 * SECOND_NS)
    crashed = pod(Span("c", 0, 40 * SECOND_NS, True), boots=(boot,))
    booked = fold(crashed, PERIOD, [line("idle", 60 * SECOND_NS)], until_ns=MINUTE_NS).accounts
    assert (booked.drain, booked.unaccounted) == (0, 20 * SECOND_NS)


@pytest.mark.parametrize(
    ("values", "final", "expected_ns"),
    [
        ({"settled_ns": 7 * SECOND_NS}, False, 7 * SECOND_NS),
        ({"settled_ns": 7 * SECOND_NS}, True, MINUTE_NS),
        ({"settled_ns": 7 * SECOND_NS, "gone": True}, False, 50 * SECOND_NS),
        ({}, False, 0),
    ],
)
def test_a_running_workers_lag_is_not_shown_as_a_loss(values: dict[str, object], final: bool, expected_ns: int) -> None:
    assert horizon_ns(pod(Span("c", 0), **values), PERIOD, 50 * SECOND_NS, final=final) == expected_ns


def test_the_order_of_records_changes_no_sum() -> None:
    records = [
        Record(
            worker_uid="uid",
            boot_id="boot-1",
            seq=seq,
            kind=Kind.SESSION,
            account=Account.ATTRIBUTED,
            session_id=f"s-{seq}",
            tenant="acme",
            service="team-a/smollm2",
            model="m",
            started_at=0,
            ended_at=seq,
            gpu_ns=10**seq,
            prefill_ns=10**seq,
            gpu_class="h100",
            clock="cuda",
            status=Status.FINISHED,
        )
        for seq in (1, 2, 3)
    ]
    forward, backward = merge(map(line_of, records)), merge(map(line_of, reversed(records)))
    assert forward == backward
    assert (forward[0].gpu_ns, forward[0].sessions, forward[0].first_seq, forward[0].last_seq) == (1110, 3, 1, 3)
