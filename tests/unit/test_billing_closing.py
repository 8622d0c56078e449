"""When a period is closed, and what is said meanwhile."""

from itertools import pairwise

from gpumeter_operator.billing.close import SETTLE_NS, Phase, after_earlier, decide, lived_in
from gpumeter_operator.billing.facts import BootFacts, Pod, Span, Worker
from gpumeter_operator.billing.schedule import HOUR_NS, Schedule, effective_from_ns
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, Period
from gpumeter_usage.record import Status

PERIOD = Period(60 * MINUTE_NS, 120 * MINUTE_NS, Granularity.HOUR)
GRACE_NS = 10 * MINUTE_NS
SOON_NS = PERIOD.end_ns + SETTLE_NS
WORKER = Worker("uid", "team-a", "smollm2", "svc", "smollm2", "h100", 1, "smollm2-x")
RUNNING = (Span("c", PERIOD.start_ns),)
OPEN_BOOT = BootFacts("boot-1", PERIOD.start_ns, 7, "h")


def verdict_at(now_ns: int, *pods: Pod, forks: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    return decide(PERIOD, pods, now_ns=now_ns, grace_ns=GRACE_NS, forks=forks)


def test_a_period_is_open_until_it_is_over_and_the_last_container_is_known() -> None:
    settled = Pod(WORKER, RUNNING, (OPEN_BOOT,), settled_ns=PERIOD.end_ns)
    assert verdict_at(PERIOD.end_ns, settled).phase is Phase.OPEN
    assert verdict_at(SOON_NS - 1, settled).phase is Phase.OPEN
    assert verdict_at(SOON_NS, settled).phase is Phase.FINAL


def test_a_period_is_final_once_every_worker_is_settled_past_its_end() -> None:
    verdict = verdict_at(SOON_NS, Pod(WORKER, RUNNING, (OPEN_BOOT,), settled_ns=PERIOD.end_ns))
    assert (verdict.phase, verdict.complete, verdict.reason) == (Phase.FINAL, True, "AllRecordsCommitted")


def test_a_worker_one_nanosecond_behind_holds_the_period() -> None:
    verdict = verdict_at(SOON_NS, Pod(WORKER, RUNNING, (OPEN_BOOT,), settled_ns=PERIOD.end_ns - 1))
    assert (verdict.phase, verdict.missing[0].reason) == (Phase.CLOSING, "WorkerBehind")
    assert "smollm2-x: its records reach to 1970-01-01T01:59:59Z" in verdict.message


def test_after_the_grace_period_the_missing_worker_is_named_and_the_report_incomplete() -> None:
    silent = Pod(WORKER, RUNNING, (OPEN_BOOT,), problem="10.0.0.1 cannot be reached: no route")
    verdict = verdict_at(PERIOD.end_ns + GRACE_NS, silent)
    assert (verdict.phase, verdict.complete) == (Phase.FINAL, False)
    assert "billed to nobody: smollm2-x: 10.0.0.1 cannot be reached: no route" in verdict.message


def test_a_pod_that_went_with_its_boots_sealed_holds_nothing() -> None:
    sealed = BootFacts("boot-1", PERIOD.start_ns, 7, "h", Status.DRAINED, PERIOD.end_ns - 1)
    gone = Pod(WORKER, (Span("c", PERIOD.start_ns, PERIOD.end_ns, True),), (sealed,), gone=True)
    assert verdict_at(SOON_NS, gone).complete


def test_a_pod_that_went_without_a_seal_is_waited_for_and_then_named() -> None:
    gone = Pod(WORKER, (Span("c", PERIOD.start_ns, PERIOD.end_ns),), (OPEN_BOOT,), gone=True)
    assert verdict_at(SOON_NS, gone).phase is Phase.CLOSING
    verdict = verdict_at(PERIOD.end_ns + GRACE_NS, gone)
    assert (verdict.phase, verdict.missing[0].reason, verdict.missing[0].boot_id) == (
        Phase.FINAL,
        "SealMissing",
        "boot-1",
    )


def test_a_boot_whose_only_trace_is_the_seal_of_the_one_before_it_is_missed() -> None:
    """It came up, closed its predecessor's chain, and died with its node before its own records were collected."""
    crashed = BootFacts("boot-1", PERIOD.start_ns, 7, "h", Status.RECOVERED, PERIOD.start_ns + MINUTE_NS)
    gone = Pod(WORKER, (Span("c", PERIOD.start_ns, PERIOD.end_ns),), (crashed,), gone=True)
    verdict = verdict_at(PERIOD.end_ns + GRACE_NS, gone)
    assert (verdict.complete, verdict.missing[0].reason) == (False, "SealMissing")


def test_a_container_that_started_after_the_last_seal_is_missed_in_the_periods_that_it_can_have_touched() -> None:
    drained = BootFacts("boot-1", PERIOD.start_ns + 1, 7, "h", Status.DRAINED, PERIOD.start_ns + MINUTE_NS)
    first = Span("c1", PERIOD.start_ns, PERIOD.start_ns + MINUTE_NS, True)
    again = Span("c2", PERIOD.start_ns + 2 * MINUTE_NS, PERIOD.start_ns + 3 * MINUTE_NS, True)
    verdict = verdict_at(PERIOD.end_ns + GRACE_NS, Pod(WORKER, (first, again), (drained,), gone=True))
    assert (verdict.complete, verdict.missing[0].reason) == (False, "SealMissing")
    assert "it started anew at 1970-01-01T01:02:00Z" in verdict.message
    later = Span("c2", PERIOD.end_ns, PERIOD.end_ns + MINUTE_NS, True)
    assert verdict_at(SOON_NS, Pod(WORKER, (first, later), (drained,), gone=True)).complete


def test_a_boot_that_was_never_sealed_makes_the_period_of_its_end_incomplete() -> None:
    successor = BootFacts("boot-2", PERIOD.start_ns + MINUTE_NS, 3, "h")
    pod = Pod(WORKER, RUNNING, (OPEN_BOOT, successor), settled_ns=PERIOD.end_ns)
    assert verdict_at(SOON_NS, pod).missing[0].reason == "SealMissing"


def test_a_forked_chain_holds_the_period_for_its_whole_grace_however_complete_it_seems() -> None:
    pod = Pod(WORKER, RUNNING, (OPEN_BOOT,), settled_ns=PERIOD.end_ns)
    assert verdict_at(SOON_NS, pod, forks={"uid": "two records at seq 3"}).phase is Phase.CLOSING
    verdict = verdict_at(PERIOD.end_ns + GRACE_NS, pod, forks={"uid": "two records at seq 3"})
    assert (verdict.phase, verdict.reason, verdict.complete) == (Phase.FINAL, "ChainForked", False)


def test_periods_are_closed_in_order() -> None:
    verdict = verdict_at(SOON_NS, Pod(WORKER, RUNNING, (OPEN_BOOT,), settled_ns=PERIOD.end_ns))
    held = after_earlier(verdict, Period(0, PERIOD.start_ns, Granularity.HOUR))
    assert (held.phase, held.reason) == (Phase.CLOSING, "WaitingForEarlierPeriod")


def test_a_pod_lives_in_the_periods_in_which_its_containers_ran() -> None:
    assert lived_in(Pod(WORKER, RUNNING), PERIOD)
    assert not lived_in(Pod(WORKER, (Span("c", 0, PERIOD.start_ns, True),)), PERIOD)
    assert not lived_in(Pod(WORKER, (Span("c", PERIOD.end_ns),)), PERIOD)
    assert not lived_in(Pod(WORKER), PERIOD)


def test_another_length_of_periods_begins_at_a_full_hour_and_no_two_periods_overlap() -> None:
    change_ns = effective_from_ns(HOUR_NS + 1)
    assert change_ns == 2 * HOUR_NS
    schedule = Schedule(((0, Granularity.HOUR), (change_ns, Granularity.FIFTEEN_MINUTES)))
    periods = schedule.between(HOUR_NS, 3 * HOUR_NS)
    assert [period.end_ns - period.start_ns for period in periods] == [HOUR_NS] + 4 * [15 * MINUTE_NS]
    assert all(before.end_ns == after.start_ns for before, after in pairwise(periods))
    assert schedule.period_of(change_ns + 1) == periods[1]
    assert schedule.period_of(change_ns) == periods[0], "what ends on the edge belongs to the period that it ends"
    assert schedule.between(SECOND_NS, SECOND_NS) == []
