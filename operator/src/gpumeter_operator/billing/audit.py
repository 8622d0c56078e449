"""The check of a bill from raw bytes: chains, sums and reports, recomputed without anything that was derived before.

Owns the comparison of what the ledger keeps (bodies, columns, frozen accounts, reports, price plans) with itself. Uses
no column, no fold, no sum and no price of the collector's but to compare it, so that a fault there is found here. Each
difference becomes one sentence.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from typing import Any

from gpumeter_operator.billing.accounts import Accounts
from gpumeter_operator.billing.audit_energy import energy_due
from gpumeter_operator.billing.audit_prices import (
    Owed,
    RawMinute,
    allocated_in,
    bills_due,
    corrections_that_differ,
    minute_end_ns,
)
from gpumeter_operator.billing.counts import Counts, impossible
from gpumeter_operator.billing.facts import PLATFORM, Adjustment, BootFacts, Correction, Pod
from gpumeter_operator.billing.removals import NOTHING, Chains, Removed
from gpumeter_operator.billing.schedule import Schedule
from gpumeter_operator.billing.tariff import AMOUNT_STEP, PeriodPlan
from gpumeter_usage.period import Period, rfc3339
from gpumeter_usage.record import ENDED, REQUIRED

RawRow = tuple[str, int, str, bytes, int, Mapping[str, Any]]
"""(boot_id, seq, hash, body, end of the period in which it is booked, what the columns beside the body say), in the
order of the keys."""

_OF_RECORDS = ("init", "load", "warmup", "nonbillable", "host_gap")
_LATER = "kv_byte_s"
"""A column that rows of an earlier schema have not: it is NULL there, and the report is the sum without it."""

_USED = ("prefill_ns", "decode_ns", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(slots=True)
class Hashed:
    """How many records a report is of, and the hash over theirs so far."""

    count: int = 0
    running: Any = field(default_factory=sha256)


HashedRecords = dict[int, dict[str, Hashed]]
"""By end of period and owner, of one service. Its pods are counted in the order of their uids."""


def nothing_hashed() -> HashedRecords:
    """Before the first pod."""
    return defaultdict(lambda: defaultdict(Hashed))


@dataclass(slots=True)
class Recount:
    """What the raw records of one pod say, by end of period; filled by `recount`. Grows with periods and tenants, not
    with records."""

    problems: list[str] = field(default_factory=list)
    accounts: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    tenants: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    used: dict[int, dict[str, dict[str, int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    )
    minutes: dict[int, dict[int, dict[str, list[int]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: [0, 0, 0, 0])))
    )
    energy: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    pod: Pod | None = None
    frozen_ns: dict[int, int] = field(default_factory=dict)  # what was allocated, by end of Final period
    cut: set[int] = field(default_factory=set)  # ends of periods in which a gap may have cut a flush in two

    def raw_minutes(self, end_ns: int) -> Iterable[RawMinute]:
        """What is booked in a period, by the minute in which it ended."""
        if self.pod is None:
            return
        worker = self.pod.worker
        for at_ns, of_minute in self.minutes[end_ns].items():
            used = {name: (one[0], one[1], one[2], one[3]) for name, one in of_minute.items() if name}
            yield RawMinute(at_ns, worker.gpu_class, worker.model, used, of_minute[""][0] if "" in of_minute else 0)


def recount(
    pod: Pod,
    rows: Iterable[RawRow],
    schedule: Schedule,
    adjustments: Iterable[Adjustment],
    hashed: HashedRecords,
    *,
    gone: Chains | None = None,
    heads: Mapping[str, tuple[int, str]] | None = None,
) -> Recount:
    """Verify every chain of a pod and sum its records anew.

    From its first byte, or from what was removed on, to its cursor; or, where `heads` says which seq and hash ("" where
    it is not kept) the rows of each boot follow, as far as the rows reach. Over its gaps a chain goes on from the hash
    that the worker stated.
    """
    found = Recount(pod=pod)
    whole = heads is None
    gone = _with_gaps(gone or {}, pod)
    name = f"{pod.worker.namespace}/{pod.worker.pod}"
    moved = {
        (adjustment.closed_end_ns, adjustment.booked_end_ns)
        for adjustment in adjustments
        if adjustment.worker_uid == pod.worker.worker_uid
    }
    heads = dict(heads or {})
    for boot_id, seq, given_hash, body, booked_end_ns, columns in rows:
        where = f"{name} boot {boot_id} seq {seq}"
        last_seq, last_hash = heads.get(boot_id, (0, "0" * 64))
        hole = seq != last_seq + 1
        if hole and (removed := _covering(gone.get(boot_id, ()), last_seq + 1, seq - 1)):
            # Where it ends within what was removed, the hash before it is not kept: the next one is checked again.
            last_hash, hole = removed[1] if removed[0] == seq - 1 else "", False
        if hole:
            found.problems.append(f"{where}: follows seq {last_seq}; what is between is not in the ledger")
        elif last_hash and (not isinstance(body, bytes) or sha256(last_hash.encode() + body).hexdigest() != given_hash):
            found.problems.append(f"{where}: its bytes or those before it were changed; the chain breaks here")
        if pod.gaps:
            found.problems += [f"{where}: {told}" for told in _beside_gaps(found, pod, boot_id, seq, booked_end_ns)]
        heads[boot_id] = (seq, given_hash)
        record = _record_of(body)
        if record is None:
            found.problems.append(f"{where}: its bytes are no record")
            continue
        if (record["worker_uid"], record["boot_id"], record["seq"]) != (pod.worker.worker_uid, boot_id, seq):
            found.problems.append(f"{where}: its bytes name another record")
        found.problems += [
            f"{where}: the column {name} is {value!r:.80}, its bytes say {record.get(name)!r:.80}"
            for name, value in columns.items()
            if value != record.get(name) and not (name == _LATER and value is None)
        ]
        if told := impossible(Counts(*(record[name] for name in Counts._fields))):
            found.problems.append(f"{where}: claims {told}, and was taken by a version that did not look")
        of_end_ns = schedule.period_of(record["ended_at"]).end_ns
        if of_end_ns != booked_end_ns and (of_end_ns, booked_end_ns) not in moved:
            found.problems.append(f"{where}: is booked in the period until {rfc3339(booked_end_ns)} without a reason")
        _count(found, record, booked_end_ns, held=columns.get(_LATER) is not None)
        of_owner = hashed[booked_end_ns][record["tenant"] or PLATFORM]
        of_owner.count += 1
        of_owner.running.update(given_hash.encode())
    for boot_id, spans in gone.items():  # chains that went whole, or to their last record
        for _, last_seq, last_hash in spans:
            heads[boot_id] = max(heads.get(boot_id, (0, "")), (last_seq, last_hash))
    found.problems += _heads_that_differ(name, pod.boots, heads) if whole else []
    return found


def _with_gaps(gone: Chains, pod: Pod) -> dict[str, list[tuple[int, int, str]]]:
    spans = {boot_id: list(of_boot) for boot_id, of_boot in gone.items()}
    for gap in pod.gaps:
        spans.setdefault(gap.boot_id, []).append((gap.first_seq, gap.last_seq, gap.last_hash))
    return spans


def _beside_gaps(found: Recount, pod: Pod, boot_id: str, seq: int, booked_end_ns: int) -> Iterator[str]:
    """Notes where a record stands right beside a gap: slices and accounts of one flush may lie on both sides, and the
    report of the period says that they disagree: whoever acknowledged in our place did not look for their edges."""
    for gap in pod.gaps:
        if gap.boot_id == boot_id and gap.first_seq - 1 <= seq <= gap.last_seq + 1:
            found.cut.add(booked_end_ns)
            if gap.first_seq <= seq <= gap.last_seq:
                yield "is there, and a row of gaps says that it is not"


def _covering(spans: Iterable[tuple[int, int, str]], first: int, last: int) -> tuple[int, str] | None:
    """(last seq, its hash) of the removed spans that hold all of these seqs together; None where some are in none."""
    reached: tuple[int, str] = (first - 1, "")
    for span in sorted(spans):
        if span[0] <= reached[0] + 1:
            reached = max(reached, (span[1], span[2]))
    return reached if reached[0] >= last else None


def check_accounts(
    pod: Pod,
    frozen: Iterable[tuple[int, Accounts]],
    found: Recount,
    adjustments: Iterable[Adjustment],
    final_ns: int,
    *,
    removed: Removed = NOTHING,
    whole: bool = True,
) -> list[str]:
    """Compare the frozen accounts of a pod's Final periods, the last of which ended at `final_ns`, with its raw records
    and, where `frozen` is the `whole` of them, with its container spans. Of periods that `removed` holds there
    are no records any more: only spans count."""
    problems = []
    name = f"{pod.worker.namespace}/{pod.worker.pod}"
    allocated_ns = 0
    for end_ns, accounts in frozen:
        if removed.holds(end_ns):
            allocated_ns += accounts.allocated
            continue
        where = f"{name} in the period that ended {rfc3339(end_ns)}"
        raw = found.accounts[end_ns]
        for account in _OF_RECORDS:
            if getattr(accounts, account) != raw[account]:
                problems.append(
                    f"{where}: {account} is {getattr(accounts, account)} ns, its records say {raw[account]} ns"
                )
        if accounts.idle != raw["idle"] + raw["host_gap"]:
            problems.append(f"{where}: idle is {accounts.idle} ns, its records say {raw['idle'] + raw['host_gap']} ns")
        if accounts.drain < raw["drain"]:
            problems.append(f"{where}: drain is {accounts.drain} ns, its records alone say {raw['drain']} ns")
        slices_ns = sum(found.tenants[end_ns].values())
        if accounts.attributed != slices_ns:
            problems.append(f"{where}: attributed is {accounts.attributed} ns, its sessions' slices say {slices_ns} ns")
        if slices_ns != raw["attributed"] and end_ns not in found.cut:
            problems.append(f"{where}: sessions' slices sum to {slices_ns} ns, the pod booked {raw['attributed']} ns")
        if accounts.allocated != accounts.owned + accounts.unaccounted:
            problems.append(
                f"{where}: the accounts sum to {accounts.owned + accounts.unaccounted} ns, allocated are "
                f"{accounts.allocated} ns"
            )
        allocated_ns += accounts.allocated
    if not whole:
        return problems
    spans_ns = pod.worker.devices * sum(
        max(0, min(final_ns, final_ns if span.ended_ns is None else span.ended_ns) - span.started_ns)
        for span in pod.spans
    )
    # What became known after a period was closed and is booked in one that is still open is not frozen yet.
    pending_ns = sum(
        adjustment.allocated_ns
        for adjustment in adjustments
        if adjustment.worker_uid == pod.worker.worker_uid and adjustment.booked_end_ns > final_ns
    )
    if allocated_ns != spans_ns - pending_ns:
        problems.append(
            f"{name}: its Final periods hold {allocated_ns} ns of allocation; its containers ran {spans_ns} ns until "
            f"{rfc3339(final_ns)}, of which {pending_ns} ns are booked later"
        )
    return problems


def check_reports(
    period: Period,
    reports: Mapping[str, Mapping[str, Any]],
    found: Iterable[Recount],
    hashed: Mapping[str, Hashed],
    *,
    allocated_ns: Mapping[str, int],
    plan: PeriodPlan | None,
    pods: Iterable[Pod],
    adjustments: Iterable[Adjustment] = (),
    corrections: Sequence[Correction] = (),
) -> list[str]:
    """Compare the Final reports of a service for a period with the raw records of all its pods and their hashes.

    `allocated_ns` is what was allocated to its pods, by class of GPU; the reports, with the platform's, must add up to
    it. `plan` is the price plan of the period, with all of its versions. `pods` are its pods as they were known when it
    was closed: that a container had ended already, which became known later, is booked as an adjustment. `corrections`
    are those that are booked in it.
    """
    found, end_ns = list(found), period.end_ns
    problems = []
    when = f"the period that ended {rfc3339(end_ns)}"
    billed_ns = sum(int(report["status"]["gpuNanoseconds"]) for report in reports.values())
    if billed_ns != sum(allocated_ns.values()):
        problems.append(f"{when}: its reports sum to {billed_ns} ns, allocated were {sum(allocated_ns.values())} ns")
    raw: dict[str, int] = defaultdict(int)  # by tenant
    used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for each in found:
        for tenant, gpu_ns in each.tenants[end_ns].items():
            raw[tenant] += gpu_ns
        for tenant, figures in each.used[end_ns].items():
            for name, figure in figures.items():
                used[tenant][name] += figure
    plan = plan or PeriodPlan("", None)
    frozen_ns = {each.pod.worker.worker_uid: each.frozen_ns.get(end_ns) for each in found if each.pod}
    known = [(pod, of_pod) for pod in pods if (of_pod := frozen_ns.get(pod.worker.worker_uid)) is not None]
    try:
        by_stretch = allocated_in(known, adjustments, plan, period)
    except ValueError as told:
        problems.append(f"{when}: {told}")
        by_stretch = {}
    energy_mj = energy_due((each.energy[end_ns], each.tenants[end_ns]) for each in found)
    minutes = (minute for each in found for minute in each.raw_minutes(end_ns))
    due = bills_due(plan, period, minutes, by_stretch, corrections)
    problems += [f"{when}: {told}" for told in corrections_that_differ(corrections, plan, period)]
    for tenant in sorted(raw.keys() | reports.keys() | hashed.keys() | due.keys()):
        report = reports.get(tenant)
        if report is None:
            problems.append(f"{when}: {tenant} used {raw[tenant]} ns and has no report")
            continue
        status, expected = report["status"], due.get(tenant, Owed())
        if tenant != PLATFORM and int(status["gpuNanoseconds"]) != expected.gpu_ns:
            problems.append(
                f"{when}: {tenant} is billed {status['gpuNanoseconds']} ns, its records say {expected.gpu_ns} ns"
            )
        if int(status.get("idleGpuNanoseconds", 0)) != expected.idle_ns:
            problems.append(f"{when}: {tenant} is billed another part of idle time than {expected.idle_ns} ns")
        if int(status.get("adjustedGpuNanoseconds", 0)) != expected.adjusted_ns:
            problems.append(f"{when}: {tenant} is corrected by another time than {expected.adjusted_ns} ns")
        own = hashed.get(tenant) or Hashed()
        if status["recordCount"] != own.count:
            problems.append(f"{when}: {tenant}'s report counts {status['recordCount']} records of {own.count}")
        if status.get("digest") != own.running.hexdigest():
            problems.append(f"{when}: the digest of {tenant}'s report is not that of its records")
        differ = _figures_that_differ(status, used[tenant], energy_mj.get(tenant))
        problems += [f"{when}: {tenant}'s {problem}" for problem in differ]
        problems += [f"{when}: {tenant}'s {told}" for told in _prices_that_differ(report, plan, expected)]
    return problems


def check_kept(
    reports: Iterable[tuple[int, str, str, bytes, str]], plans: Iterable[tuple[str, str, bytes]]
) -> list[str]:
    """Compare the bytes of kept reports (end of the period, tenant, phase, bytes, digest) and of price plans (name,
    hash, spec) with the hashes that are kept beside them."""
    problems = [
        f"the period that ended {rfc3339(end_ns)}: the bytes of {tenant}'s {phase} report are not those of its digest"
        for end_ns, tenant, phase, body, digest in reports
        if sha256(body).hexdigest() != digest
    ]
    return problems + [
        f"price plan {name}: the spec that is kept under the hash {digest:.16}… has another one"
        for name, digest, spec in plans
        if sha256(spec).hexdigest() != digest
    ]


def _figures_that_differ(status: Mapping[str, Any], used: Mapping[str, int], energy_mj: int | None) -> Iterable[str]:
    tokens = status.get("tokens") or {}
    joules = None if energy_mj is None else Decimal(energy_mj).scaleb(-3).normalize()
    stated = {
        "prefillGpuNanoseconds": (status.get("prefillGpuNanoseconds"), used["prefill_ns"]),
        "decodeGpuNanoseconds": (status.get("decodeGpuNanoseconds"), used["decode_ns"]),
        "sessions": (status.get("sessions"), used["sessions"]),
        "kvByteSeconds": (status.get("kvByteSeconds"), used.get(_LATER)),
        "energyJoules": (status.get("energyJoules"), joules if joules is None else f"{joules:f}"),
        "tokens.prompt": (tokens.get("prompt"), used["prompt_tokens"]),
        "tokens.cached": (tokens.get("cached"), used["cached_tokens"]),
        "tokens.completion": (tokens.get("completion"), used["completion_tokens"]),
        "tokens.total": (tokens.get("total"), used["prompt_tokens"] + used["completion_tokens"]),
    }
    for name, (figure, raw) in stated.items():
        if str(figure) != str(raw):
            yield f"{name} is {figure}, its records say {raw}"


def _prices_that_differ(report: Mapping[str, Any], plan: PeriodPlan, due: Owed) -> Iterable[str]:
    given_hash = report["spec"].get("pricePlanHash")
    if given_hash != (plan.plan.hash if plan.plan else None):
        yield "price plan is not the one with which the period was opened"
    plans = [version.plan for version in plan.versions if version.plan]
    if report["status"].get("currency", "") not in {"", *(each.currency for each in plans)}:
        yield f"currency is {report['status']['currency']}, that of the plan {plans[0].currency if plans else 'none'}"
    for name in ("amount", "amountDue"):
        stated = report["status"].get(name)
        if stated is not None and due.amount is None:
            yield f"{name} is {stated}, where there is no price"
        elif stated is not None and due.amount is not None:
            if abs(Fraction(Decimal(stated)) - due.amount) > Fraction(AMOUNT_STEP) / 2:
                yield f"{name} is {stated}, its records at the plan's rates say {float(due.amount):.12f}"
        elif stated is None and due.amount is not None and plans and len(due.currencies) <= 1:
            yield f"{name} is None, where there is a price"


def _record_of(body: bytes) -> dict[str, Any] | None:
    """Not by the reader that the collector uses: only what is needed to sum it up."""
    try:
        record = json.loads(body)
    except (ValueError, TypeError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.keys() >= REQUIRED else None


def _count(found: Recount, record: Mapping[str, Any], booked_end_ns: int, *, held: bool) -> None:
    if record["kind"] == "account":
        found.accounts[booked_end_ns][record["account"]] += record["gpu_ns"]
        if "energy_mj" in record:
            found.energy[booked_end_ns][record["account"]] += record["energy_mj"]
    elif record["kind"] == "session" and record["account"] == "attributed":
        found.tenants[booked_end_ns][record["tenant"]] += record["gpu_ns"]
        used = found.used[booked_end_ns][record["tenant"]]
        for name in _USED:
            used[name] += record[name]
        used["sessions"] += record["status"] in ENDED
        if held:
            used[_LATER] += record[_LATER]
    minute = found.minutes[booked_end_ns][minute_end_ns(record["ended_at"])]
    if record["kind"] == "account" and record["account"] in ("idle", "host_gap"):
        minute[""][0] += record["gpu_ns"]
    elif record["kind"] == "session" and record["account"] == "attributed":
        for index, name in enumerate(("gpu_ns", "prompt_tokens", "cached_tokens", "completion_tokens")):
            minute[record["tenant"]][index] += record[name]


def _heads_that_differ(name: str, boots: Iterable[BootFacts], heads: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    cursors = {boot.boot_id: (boot.committed_seq, boot.head_hash) for boot in boots}
    for boot_id in sorted(cursors.keys() | heads.keys()):
        if heads.get(boot_id) != cursors.get(boot_id):
            cursor, head = (found.get(boot_id, (0, ""))[0] for found in (cursors, heads))
            yield (
                f"{name} boot {boot_id}: its cursor stands at seq {cursor}, its records end at {head} or with another "
                "hash"
            )
