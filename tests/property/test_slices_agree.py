"""What sessions claim is what their pod booked, to the nanosecond, on every page: the real meter's records are taken
wherever their pages are cut, and not a nanosecond more."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpumeter_operator.billing.accept import PageRefused, accept
from gpumeter_operator.billing.facts import NOTHING, Spent
from gpumeter_usage.balance import CUT
from gpumeter_usage.chain import GENESIS, Link, link
from gpumeter_usage.page import Page
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import Account, Kind, Record, Status, canonical
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.meter import Identity, Meter
from gpumeter_worker.metering.parts import Part
from rigs.ledger import START_NS, worker
from rigs.thoroughness import examples

OFTEN = hypothesis_settings(max_examples=examples(60), deadline=None)
DURATIONS = st.integers(0, 5) | st.integers(1, 5 * SECOND_NS) | st.integers(MINUTE_NS - 3, 2 * MINUTE_NS)


@st.composite
def lives(draw: st.DrawFn) -> tuple[int, list[tuple[Record, ...]]]:
    """A worker's devices, and the flushes of its whole life with the seal as the last one."""
    devices, now_ns = draw(st.sampled_from((1, 8))), START_NS + draw(st.integers(0, MINUTE_NS))
    pod = worker(devices=devices)
    names = pod.worker_uid, "boot-1", pod.service_key, pod.model, pod.gpu_class, "cuda"
    meter = Meter(replace(Identity(*names), devices=devices), uncalibrated(Rule.KNEE, "host"), now_ns)
    now_ns += draw(st.integers(1, SECOND_NS))
    meter.enter(Phase.SERVING, now_ns)
    running: list[str] = []
    flushes: list[tuple[Record, ...]] = []
    for number in range(draw(st.integers(1, 25))):
        what = draw(st.sampled_from(("begin", "step", "step", "step", "end", "flush", "wait", "energy")))
        if what == "begin":
            running.append(f"s-{number}")
            meter.begin(running[-1], draw(st.sampled_from(("acme", "beta"))), now_ns)
        elif what == "step" and running:
            members = draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
            recomputed = draw(st.integers(0, 9)) == 0
            parts = [Part(each, 1, 7 + number, False, 1, recompute=recomputed) for each in members]
            started_ns, duration_ns = now_ns + draw(DURATIONS), draw(DURATIONS)
            now_ns = started_ns + duration_ns
            meter.step(started_ns, now_ns, duration_ns + draw(st.integers(-5, 5)) if duration_ns > 5 else 0, parts)
        elif what == "end" and running:
            status = draw(st.sampled_from((Status.FINISHED, Status.CANCELLED)))
            meter.end(running.pop(draw(st.integers(0, len(running) - 1))), status, now_ns)
        elif what == "flush" and (flush := meter.cut(now_ns)):
            flushes.append(flush.records)
        elif what == "energy":
            meter.draw(draw(st.integers(0, 9)), 5)
        now_ns += draw(DURATIONS) if what == "wait" else 0
    for session in running:
        meter.end(session, Status.FINISHED, now_ns)
    meter.enter(Phase.DRAIN, now_ns)
    flush = meter.cut(now_ns) or meter.nothing()
    return devices, [*flushes, (*flush.records, meter.seal(Status.DRAINED))]


def take(devices: int, records: Sequence[Record], cuts: Sequence[int], *, spent: Spent = NOTHING) -> list[Spent]:
    """Judge these records as the first ones of a boot, in pages that are cut before these indices; what was spent after
    each page. The last one is where the journal ends. Raises PageRefused."""
    pod, links, head = worker(devices=devices), list[Link](), GENESIS
    for seq, record in enumerate(records, start=1):
        links.append(link(head, canonical(record, seq)))
        head = links[-1].hash
    found, head, now_ns = [], GENESIS, max(record.ended_at for record in records)
    edges = sorted({0, len(links), *(cut % len(links) for cut in cuts)})
    for after, until in pairwise(edges):
        page = Page(pod.worker_uid, pod.service_key, "boot-1", after, now_ns, tuple(links[after:until]))
        accepted = accept(page, pod, head, now_ns, spent=spent, whole=until == len(links))
        spent, head = accepted.spent, accepted.head_hash
        found.append(spent)
    return found


def changed(records: Sequence[Record], at: int, by_ns: int) -> list[Record]:
    """The same records, of which one claims so much more, as a record may say it."""
    record = records[at]
    session = {"decode_ns": record.decode_ns + by_ns} if record.kind is Kind.SESSION else {}
    other = replace(record, gpu_ns=record.gpu_ns + by_ns, **session)
    return [*records[:at], other, *records[at + 1 :]]


def of(records: Sequence[Record], kind: Kind) -> list[int]:
    return [at for at, each in enumerate(records) if each.kind is kind and each.account == Account.ATTRIBUTED]


CUTS = st.lists(st.integers(0, 10**6), max_size=12)


@given(lives(), CUTS)
@OFTEN
def test_no_page_of_an_honest_worker_is_refused_wherever_it_is_cut(
    life: tuple[int, list[tuple[Record, ...]]], cuts: list[int]
) -> None:
    devices, flushes = life
    records = [record for flush in flushes for record in flush]
    for spent in (*take(devices, records, cuts), *take(devices, records, range(len(records)))):
        assert spent.slices_ns - spent.open.gpu_ns <= spent.accounts_ns
    sizes = [sum(len(flush) for flush in flushes[:number]) for number in range(1, len(flushes))]
    between = take(devices, records, sizes)
    assert all(spent.open.gpu_ns == 0 for spent in between), "between flushes nothing is open"


@given(lives(), CUTS, st.data())
@OFTEN
def test_a_nanosecond_that_only_one_side_claims_is_refused_wherever_pages_are_cut(
    life: tuple[int, list[tuple[Record, ...]]], cuts: list[int], data: st.DataObject
) -> None:
    devices, flushes = life
    records = [record for flush in flushes for record in flush]
    kind = data.draw(st.sampled_from((Kind.SESSION, Kind.ACCOUNT)))
    assume(places := of(records, kind))
    at = data.draw(st.sampled_from(places))
    least_ns = -(records[at].decode_ns if kind is Kind.SESSION else records[at].gpu_ns)
    by_ns = data.draw(st.integers(1, 3) | st.integers(1, MINUTE_NS) | st.integers(least_ns, -1 if least_ns else 1))
    assume(by_ns)
    with pytest.raises(PageRefused) as refused:
        take(devices, changed(records, at, by_ns), cuts)
    assert refused.value.reason in ("SlicesDisagree", "MoreThanTime")


@given(lives(), st.data())
@OFTEN
def test_a_slice_whose_account_lies_in_another_minute_is_refused(
    life: tuple[int, list[tuple[Record, ...]]], data: st.DataObject
) -> None:
    """The sums of the chain agree then, and those of the periods do not."""
    devices, flushes = life
    records = [record for flush in flushes for record in flush]
    assume(places := [at for at in of(records, Kind.SESSION) if records[at].gpu_ns])
    at = data.draw(st.sampled_from(places))
    ended_ns = records[at].ended_at + MINUTE_NS
    records[at] = replace(records[at], started_at=ended_ns - 1, ended_at=ended_ns)
    with pytest.raises(PageRefused) as refused:
        take(devices, records, range(len(records)))
    assert refused.value.reason == "SlicesDisagree"


@given(lives(), CUTS, st.integers(0, 10**6))
@OFTEN
def test_behind_a_gap_no_session_claims_more_than_its_pod_booked(
    life: tuple[int, list[tuple[Record, ...]]], cuts: list[int], gap: int
) -> None:
    devices, flushes = life
    records = [record for flush in flushes for record in flush]
    left = records[gap % len(records) :]
    after_gap = Spent(began_ns=START_NS, open=CUT)
    take(devices, left, cuts, spent=after_gap)
    slices = of(left, Kind.SESSION)
    assume(slices)
    # The first account behind the gap may book slices that are gone; of every later one all are here.
    first = next(at for at in [*of(left, Kind.ACCOUNT), 0] if left[at].gpu_ns or at == 0)
    later = [at for at in slices if at > first]
    assume(later)
    with pytest.raises(PageRefused, match="slices"):
        take(devices, changed(left, later[-1], 1), cuts, spent=after_gap)


def test_a_worker_that_never_books_what_its_sessions_claim_is_refused_where_its_journal_ends() -> None:
    pod = worker()
    slice_ = {"worker_uid": pod.worker_uid, "boot_id": "boot-1", "service": pod.service_key, "model": pod.model}
    slice_ |= {"session_id": "s", "tenant": "acme", "status": Status.OPEN, "gpu_class": "h100", "clock": "cuda"}
    record = Record(
        **slice_,  # type: ignore[arg-type]
        seq=1,
        kind=Kind.SESSION,
        account=Account.ATTRIBUTED,
        started_at=START_NS,
        ended_at=START_NS + SECOND_NS,
        gpu_ns=1,
        decode_ns=1,
    )
    with pytest.raises(PageRefused, match="ends at seq 1 with sessions' slices that sum to 1 ns") as refused:
        take(1, [record], ())
    assert refused.value.reason == "SlicesDisagree"
