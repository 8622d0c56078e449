"""Accounts and meter: one owner for every nanosecond, and slices that never cross a minute."""

from dataclasses import replace

import pytest

from gpumeter_usage.period import MINUTE_NS
from gpumeter_usage.record import Account, Kind, Record, Status, canonical, parse
from gpumeter_worker.metering.accounts import Accounts, Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.meter import Flush, Identity, Meter
from gpumeter_worker.metering.parts import Onward, Part

START = 1_000_000 * MINUTE_NS + 5
IDENTITY = Identity("worker", "boot", "team/model", "model", "cpu", "host")


def new_meter() -> Meter:
    meter = Meter(IDENTITY, uncalibrated(Rule.KNEE, "host"), START)
    meter.enter(Phase.SERVING, START)
    return meter


def decode(session: str, context: int = 10) -> Part:
    return Part(session, 1, context, prefill=False, sampled=1)


def prefill(session: str, tokens: int) -> Part:
    return Part(session, tokens, 0, prefill=True, sampled=1, prompt_tokens=tokens)


def of_session(flush: Flush | None, session: str) -> list[Record]:
    assert flush is not None
    return [record for record in flush.records if record.session_id == session]


def account_sums(flush: Flush | None) -> dict[str, int]:
    assert flush is not None
    sums: dict[str, int] = {}
    for record in flush.records:
        if record.kind is Kind.ACCOUNT:
            sums[record.account] = sums.get(record.account, 0) + record.gpu_ns
    return sums


def test_start_up_is_booked_to_init_load_and_warmup_and_never_to_a_session() -> None:
    accounts = Accounts(START)
    accounts.enter(Phase.LOAD, START + 100)
    accounts.enter(Phase.WARMUP, START + 250)
    accounts.enter(Phase.SERVING, START + 300)
    accounts.catch_up(START + 310)
    booked = {account: total for account, total in accounts.totals_ns.items() if total}
    assert booked == {Account.INIT: 100, Account.LOAD: 150, Account.WARMUP: 50, Account.IDLE: 10}


def test_waiting_in_the_queue_costs_nothing() -> None:
    meter = new_meter()
    meter.begin("waits", "acme", START + 10)
    totals = meter.end("waits", Status.CANCELLED, START + 10**9)
    assert totals.gpu_ns == 0
    (record,) = of_session(meter.cut(START + 10**9), "waits")
    assert (record.gpu_ns, record.status, record.steps) == (0, Status.CANCELLED, 0)


def test_time_that_an_unreported_step_may_own_is_not_booked() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START + 10)
    assert meter.cut(START + 500) is not None  # the idle time before the session
    assert meter.cut(START + 900) is None
    meter.step(START + 100, START + 800, 700, [decode("one")])
    assert account_sums(meter.cut(START + 900)) == {Account.HOST_GAP: 90, Account.ATTRIBUTED: 700}


def test_a_step_that_was_lost_with_its_engine_is_in_no_account_and_what_was_measured_is_kept() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.step(START + 10, START + 110, 100, [prefill("one", 5)])
    meter.lose(START + 400)  # nobody knows when its second step began
    totals = meter.end("one", Status.FAILED, START + 400)
    meter.enter(Phase.INIT, START + 400)
    flush = meter.cut(START + 500)
    assert flush is not None
    assert totals.gpu_ns == 100
    assert account_sums(flush) == {Account.HOST_GAP: 10, Account.ATTRIBUTED: 100, Account.INIT: 100}
    assert (flush.frontier_ns, flush.unmeasured_ns) == (START + 500, 290)
    assert meter.accounts.unmeasured_ns == 290
    later = meter.cut(START + 600)
    assert later is not None and later.unmeasured_ns == 0, "it is stated once"


def test_an_engine_that_is_lost_with_nothing_in_flight_loses_no_time() -> None:
    meter = new_meter()
    meter.lose(START + 400)
    assert account_sums(meter.cut(START + 400)) == {Account.IDLE: 400}


def test_a_loss_beyond_a_minutes_edge_is_in_neither_minutes_accounts() -> None:
    meter, edge = new_meter(), START - 5 + MINUTE_NS
    meter.begin("one", "acme", START)
    meter.step(START, edge - 100, edge - 100 - START, [decode("one")])
    meter.lose(edge + 200)
    meter.end("one", Status.FAILED, edge + 200)
    flush = meter.cut(edge + 300)
    assert flush is not None
    assert [record.gpu_ns for record in of_session(flush, "one")] == [edge - 100 - START, 0]
    assert account_sums(flush) == {Account.ATTRIBUTED: edge - 100 - START, Account.IDLE: 100}
    assert flush.unmeasured_ns == 300


def test_a_cancelled_session_keeps_the_step_in_flight() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.step(START + 10, START + 110, 100, [prefill("one", 5)])
    meter.step(START + 120, START + 150, 30, [decode("one")])  # launched before the cancel arrived
    totals = meter.end("one", Status.CANCELLED, START + 155)
    assert totals.gpu_ns == 130
    (record,) = of_session(meter.cut(START + 200), "one")
    assert (record.gpu_ns, record.prefill_ns, record.decode_ns) == (130, 100, 30)
    assert (record.prompt_tokens, record.completion_tokens, record.steps) == (5, 2, 2)
    assert record.status is Status.CANCELLED


def test_a_step_belongs_to_the_minute_of_its_end() -> None:
    meter = new_meter()
    edge = START - 5 + MINUTE_NS
    meter.begin("one", "acme", START)
    meter.step(START, edge - 100, edge - 100 - START, [prefill("one", 5)])
    meter.step(edge - 50, edge + 70, 120, [decode("one")])
    before, after = of_session(meter.cut(edge + 80), "one")
    assert (before.gpu_ns, before.ended_at) == (edge - 100 - START, edge - 100)
    assert (after.gpu_ns, after.started_at, after.ended_at) == (120, edge, edge + 70)


def test_what_ends_exactly_on_an_edge_belongs_to_the_minute_that_it_ends() -> None:
    meter = new_meter()
    edge = START - 5 + MINUTE_NS
    meter.begin("one", "acme", START)
    meter.step(START, edge, edge - START, [decode("one")])
    meter.end("one", Status.FINISHED, edge)
    (record,) = of_session(meter.cut(edge), "one")
    assert (record.started_at, record.ended_at) == (START, edge)


def test_a_long_idle_night_is_cut_at_every_minute() -> None:
    meter = new_meter()
    flush = meter.cut(START + 10 * MINUTE_NS)
    assert flush is not None
    assert len(flush.records) == 11
    for record in flush.records:
        assert (record.ended_at - 1) // MINUTE_NS == record.started_at // MINUTE_NS
    assert account_sums(flush) == {Account.IDLE: 10 * MINUTE_NS}


def test_drain_counts_what_no_session_owns_after_sigterm() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.enter(Phase.DRAIN, START + 50)
    meter.step(START + 20, START + 40, 20, [decode("one")])
    meter.step(START + 60, START + 90, 30, [decode("one")])
    meter.end("one", Status.FINISHED, START + 95)
    sums = account_sums(meter.cut(START + 200))
    # From the first step's end to SIGTERM it is a gap; from SIGTERM on it is drain, but for the second step.
    assert sums == {Account.HOST_GAP: 30, Account.ATTRIBUTED: 50, Account.DRAIN: 10 + 110}


def test_no_second_is_sold_twice_when_two_clocks_disagree() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    (share,) = meter.step(START, START + 1000, 1003, [decode("one")])
    assert share == 1000
    assert meter.accounts.frontier_ns == START + 1000


def test_gpu_time_that_no_session_owns_is_the_platforms() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.step(START, START + 100, 100, [decode("one"), decode("stranger")])
    meter.end("one", Status.FINISHED, START + 100)
    assert account_sums(meter.cut(START + 100)) == {Account.ATTRIBUTED: 50, Account.NONBILLABLE: 50}


def test_a_running_session_is_stated_by_open_slices_and_ends_once() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.step(START, START + 100, 100, [prefill("one", 3)])
    first = of_session(meter.cut(START + 110), "one")
    meter.end("one", Status.FINISHED, START + 150)
    last = of_session(meter.cut(START + 160), "one")
    assert [record.status for record in first + last] == [Status.OPEN, Status.FINISHED]
    assert [record.gpu_ns for record in first + last] == [100, 0]
    assert meter.cut(START + 160) is None


def test_an_end_stands_behind_the_accounts_of_the_minutes_before_it() -> None:
    meter = new_meter()
    for name in ("one", "two"):
        meter.begin(name, "acme", START)
    for name in ("one", "two"):  # while the other is in flight the first end lies beyond the frontier
        meter.end(name, Status.CANCELLED, START + 3 * MINUTE_NS)
    flush = meter.cut(START + 3 * MINUTE_NS)
    assert flush is not None
    assert flush.records[0].started_at == START, "a ledger takes the first record's start for the boot's"
    ends = [record.ended_at for record in flush.records]
    assert ends == sorted(ends)


def test_mean_batch_size_can_be_read_from_a_slice() -> None:
    meter = new_meter()
    for name in ("one", "two"):
        meter.begin(name, "acme", START)
    meter.step(START, START + 100, 100, [decode("one"), decode("two")])
    (record,) = of_session(meter.cut(START + 100), "one")
    assert record.batch_ns == 2 * record.gpu_ns


def test_every_record_is_one_that_a_ledger_accepts() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    meter.step(START, START + 90 * 10**9, 90 * 10**9, [prefill("one", 3)])
    meter.end("one", Status.FAILED, START + 91 * 10**9)
    flush = meter.cut(START + 200 * 10**9)
    assert flush is not None
    from dataclasses import replace

    for seq, record in enumerate([*flush.records, meter.seal(Status.DRAINED)], start=1):
        assert parse(canonical(replace(record, seq=seq))).seq == seq


def test_a_session_cannot_begin_twice() -> None:
    meter = new_meter()
    meter.begin("one", "acme", START)
    with pytest.raises(ValueError, match="in flight already"):
        meter.begin("one", "other", START)


def test_what_was_split_before_a_calibration_keeps_the_name_of_its_profile() -> None:
    meter = Meter(IDENTITY, uncalibrated(Rule.KNEE, "host"), START)
    calibrated = replace(uncalibrated(Rule.KNEE, "host"), name="calibrated", lam_ps=7)
    meter.enter(Phase.SERVING, START)
    meter.begin("s-1", "acme", START)
    meter.step(START, START + 1000, 1000, [Part("s-1", 1, 0, True, 1)])
    former = meter.profile.hash
    meter.adopt(calibrated)
    meter.step(START + 1000, START + 3000, 2000, [Part("s-1", 1, 1, False, 1)])
    meter.end("s-1", Status.FINISHED, START + 3000)
    flush = meter.cut(START + 3000)
    assert flush is not None
    attributed = [record for record in flush.records if record.account == Account.ATTRIBUTED]
    named = {(record.kind, record.profile_hash): record.gpu_ns for record in attributed}
    assert named == {
        (Kind.ACCOUNT, former): 1000,
        (Kind.SESSION, former): 1000,
        (Kind.ACCOUNT, calibrated.hash): 2000,
        (Kind.SESSION, calibrated.hash): 2000,
    }


def test_the_cache_that_a_session_held_is_stated_in_byte_seconds_and_no_slice_rounds_any_away() -> None:
    meter = new_meter()
    meter.kv_token_bytes = 3
    meter.begin("one", "acme", START)
    meter.step(START + 5, START + 5 + 10**8, 10**8, [prefill("one", 100)])  # 100 tokens, 0.1 s: 30 byte-seconds
    found = of_session(meter.cut(START + 10**9), "one")
    for number in range(7):  # 0.4 s of 100 tokens between two steps, 0.1 s of 101 in one: 120 + 30.3
        since = START + 5 + 10**8 + number * 5 * 10**8
        meter.step(since + 4 * 10**8, since + 5 * 10**8, 10**8, [decode("one", 100)])
        found += of_session(meter.cut(since + 5 * 10**8), "one")
    meter.end("one", Status.FINISHED, START + 4 * 10**9)
    found += of_session(meter.cut(START + 4 * 10**9), "one")
    assert [one.kv_byte_s for one in found] == [30, 150, 150, 150, 151, 150, 150, 151, 0]
    assert sum(one.kv_byte_s for one in found) == (30 * 10 + 7 * 1503) // 10


def test_a_sequence_holds_its_cache_also_while_steps_leave_it_out() -> None:
    meter = new_meter()
    meter.kv_token_bytes = 1
    meter.begin("two", "acme", START, sequences=2)
    chunk = Part("two", 40, 0, prefill=True, sampled=0, prompt_tokens=40)
    rest = Part("two", 60, 40, prefill=True, sampled=1, prompt_tokens=60)
    steps = [
        [prefill("two", 10), chunk],  # 50 tokens for its second
        [decode("two", 10)],  # 10 for a second, 11 in the step
        [decode("two", 11)],  # 11, 12
        [decode("two", 12), rest],  # 12, 13; of the other one 40 for the five seconds since the first step, then 100
        [decode("two", 13), decode("two", 100)],  # 113, 115
    ]
    for number, parts in enumerate(steps):
        began_ns = START + 2 * number * 10**9
        meter.step(began_ns, began_ns + 10**9, 10**9, parts)
    meter.end("two", Status.FINISHED, START + 20 * 10**9)
    (record,) = of_session(meter.cut(START + 20 * 10**9), "two")
    assert record.kv_byte_s == 50 + 21 + 23 + 25 + (5 * 40 + 100) + 113 + 115


def test_a_stretch_of_steps_leaves_every_sequences_end_where_single_steps_do() -> None:
    held = []
    for onward in (True, False):
        meter = new_meter()
        meter.kv_token_bytes = 1
        meter.begin("two", "acme", START, sequences=2)
        first = (decode("two", 10), decode("two", 11))
        for number in range(5):
            began_ns = START + 2 * number * 10**9
            rows = tuple(part._replace(context_tokens=part.context_tokens + number) for part in first)
            parts = Onward(first, number) if onward and number else rows
            meter.step(began_ns, began_ns + 10**9, 10**9, parts)
        meter.step(START + 20 * 10**9, START + 21 * 10**9, 10**9, [decode("two", 16)])  # alone
        meter.step(START + 30 * 10**9, START + 31 * 10**9, 10**9, [decode("two", 15)])
        meter.end("two", Status.FINISHED, START + 31 * 10**9)
        (record,) = of_session(meter.cut(START + 31 * 10**9), "two")
        held.append(record.kv_byte_s)
    assert held[0] == held[1]
    alike = sum(21 + 2 * number for number in range(1, 5)) + sum(23 + 2 * number for number in range(5))
    assert held[0] == alike + (11 * 16 + 17) + (21 * 15 + 16)


def test_what_one_sequence_lost_by_preemption_it_did_not_hold_meanwhile_beside_another() -> None:
    meter = new_meter()
    meter.kv_token_bytes = 1
    meter.begin("two", "acme", START, sequences=2)
    again = Part("two", 10, 0, prefill=True, sampled=0, recompute=True)
    for at_s, part in ((0, prefill("two", 10)), (5, again), (6, decode("two", 10))):
        meter.step(START + at_s * 10**9, START + (at_s + 1) * 10**9, 10**9, [part])
    (record,) = of_session(meter.cut(START + 8 * 10**9), "two")
    assert record.kv_byte_s == 10 + 11


def test_a_long_session_on_a_big_cache_stays_within_a_records_integers() -> None:
    meter = new_meter()
    meter.kv_token_bytes = 327_680  # 70 billion parameters in bfloat16: 80 layers, 8 heads of 128
    meter.begin("long", "acme", START)
    meter.step(START + 5, START + 10**9, 10**9 - 5, [prefill("long", 131_072)])
    meter.step(START + 50 * 10**9, START + 51 * 10**9, 10**9, [decode("long", 131_072)])
    meter.end("long", Status.FINISHED, START + 51 * 10**9)
    (record,) = of_session(meter.cut(START + 52 * 10**9), "long")
    assert parse(canonical(replace(record, seq=1))).kv_byte_s == record.kv_byte_s
    assert record.kv_byte_s * 10**9 > 2**63
    assert record.kv_byte_s == pytest.approx(51 * 131_072 * 327_680, rel=1e-4)


def test_what_a_preemption_took_away_was_not_held_meanwhile() -> None:
    meter = new_meter()
    meter.kv_token_bytes = 10**6
    meter.begin("one", "acme", START)
    meter.step(START, START + 10**9, 10**9, [prefill("one", 10)])
    again = Part("one", 10, 0, prefill=True, sampled=0, recompute=True)
    meter.step(START + 5 * 10**9, START + 6 * 10**9, 10**9, [again])
    meter.step(START + 6 * 10**9, START + 7 * 10**9, 10**9, [decode("one", 10)])
    (record,) = of_session(meter.cut(START + 8 * 10**9), "one")
    assert record.kv_byte_s == (10 + 11) * 10**6


def test_energy_is_stated_once_by_account_records_without_time() -> None:
    meter = new_meter()
    meter.begin("s", "acme", START + 10)
    meter.step(START + 10, START + 1010, 1000, [prefill("s", 4)])
    meter.draw(2_000, 500)
    meter.draw(30, 7)
    flush = meter.cut(START + 2000)
    assert flush is not None
    stated = [record for record in flush.records if record.energy_mj is not None]
    assert [(one.kind, one.account, one.energy_mj, one.gpu_ns) for one in stated] == [
        (Kind.ACCOUNT, Account.ATTRIBUTED, 2_030, 0),
        (Kind.ACCOUNT, Account.IDLE, 507, 0),
    ]
    assert {one.ended_at for one in stated} == {flush.frontier_ns}
    assert [parse(canonical(one, 1)).energy_mj for one in stated] == [2_030, 507]
    meter.draw(0, 60)
    assert meter.cut(START + 3000) is None  # a session is in flight: a period may be closed up to the frontier
    meter.step(START + 2000, START + 4000, 1000, [decode("s")])
    later = meter.cut(START + 5000)
    assert later is not None
    assert [one.energy_mj for one in later.records if one.energy_mj is not None] == [60]


def test_where_nobody_measures_energy_the_bytes_of_records_do_not_name_it() -> None:
    meter = new_meter()
    meter.begin("s", "acme", START + 10)
    meter.step(START + 10, START + 1010, 1000, [prefill("s", 4)])
    meter.end("s", Status.FINISHED, START + 1010)
    flush = meter.cut(START + 2000)
    assert flush is not None
    assert not any(b"energy" in canonical(record, 1) for record in flush.records)


def test_on_several_devices_every_nanosecond_counts_on_each_of_them_and_a_step_is_split_whole() -> None:
    meter = Meter(replace(IDENTITY, devices=3), uncalibrated(Rule.KNEE, "host"), START)
    meter.enter(Phase.SERVING, START + 40)
    for name in ("one", "two", "three", "four"):
        meter.begin(name, "acme", START + 50)
    shares = meter.step(START + 60, START + 1061, 1001, [decode(name) for name in ("one", "two", "three", "four")])
    assert sum(shares) == 3 * 1001
    assert max(shares) - min(shares) <= 1
    meter.lose(START + 1161)
    totals = [meter.end(name, Status.FAILED, START + 1161).gpu_ns for name in ("one", "two", "three", "four")]
    assert totals == shares
    flush = meter.cut(START + 1200)
    assert flush is not None
    assert account_sums(flush) == {
        Account.INIT: 3 * 40,
        Account.IDLE: 3 * (10 + 39),
        Account.HOST_GAP: 3 * 10,
        Account.ATTRIBUTED: 3 * 1001,
    }
    assert (flush.frontier_ns, flush.unmeasured_ns) == (START + 1200, 3 * 100)
