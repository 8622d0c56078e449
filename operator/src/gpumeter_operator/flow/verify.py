"""The whole audit of a ledger, from its raw rows: what differs, row by row, the most telling first.

Owns the order of the checks and what each kind of difference means for whoever meets it. Digests and facts come before
sums, because they name the row and a sum only tells that something is wrong. Reads, changes nothing; memory grows with
periods and pods of one service, never with records.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gpumeter_operator.adapters.ledger import audit as raw
from gpumeter_operator.adapters.ledger import digests
from gpumeter_operator.adapters.ledger.digests import COVERED, LATE_NS, Compared
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.retention import strangers
from gpumeter_operator.billing.audit import check_kept
from gpumeter_operator.billing.digest import Digest, DigestInvalid, Entry, check_chain, columns_of, fact_line
from gpumeter_operator.billing.merkle import Tree, root_of
from gpumeter_operator.billing.removals import DAY_NS, Removed
from gpumeter_operator.billing.signing import Keyring, key_id_of
from gpumeter_operator.flow.recount import Span, Whole, recount_service
from gpumeter_operator.flow.removals import removed_of
from gpumeter_usage.period import rfc3339

ADVICE = {
    "DigestUnreadable": "Compare the table digests with an exported file of digests.",
    "DigestChanged": "Compare the table digests with an exported file of digests.",
    "DigestMissing": "Compare with an exported file of digests, and restore the ledger from a backup that has them.",
    "DigestChainBroken": "Compare with an exported file of digests: from the first that differs on, nothing is proved.",
    "DigestColumns": "The body is what is signed; whoever wrote the columns beside it changed the file.",
    "DigestDoubled": "Ask who made two digests of one period; one of them is not the collector's.",
    "KeyDiffers": "Somebody put it there: a key is called by its own SHA-256. Believe your own copy with --public-key.",
    "KeyUnknown": "Name the public key with --public-key; keys of former times are in earlier exports.",
    "SignatureInvalid": "Somebody without the signing key wrote this digest. Restore the ledger from a backup.",
    "FactsRoot": "The rows of digest_facts were changed. Restore the ledger from a backup.",
    "FactChanged": "Restore the ledger from a backup made before; the digest states what the row was.",
    "FactMissing": "A row was taken out. Restore the ledger from a backup made before.",
    "FactInserted": "A row was put in behind the collector's back: it claims to be older than a digest that lacks it.",
    "FactAhead": "No clock of a collector said this yet: a row was put in, or this machine's clock is behind.",
    "RemovalUnproved": "Retention did not write this row, so it excuses nothing. Restore the ledger from a backup.",
    "GapUnproved": "Reports name the gaps that were known: this row was put in. Restore the ledger from a backup.",
    "CorrectionUnproved": "Nobody booked it with `gpumeter adjust`. Restore the ledger from a backup.",
    "CorrectionUnbilled": "A collector of an older version closed its period: book it again with an --id of its own. "
    "Where none did, the row was put in: restore the ledger from a backup.",
    "RecordsRoot": "Records of this period were changed, taken out or put in. Restore the ledger from a backup.",
    "PeriodWithoutDigest": "A collector with a signing key makes it within seconds: where one runs, it was taken out.",
    "RecordDiffers": "Compare with the worker's journal or a backup; nothing after this row of its chain is proved.",
    "RecordStray": "Rows were put in that no collector wrote. Compare with a backup.",
    "AccountsDiffer": "Compare pod_accounts, containers and records of this pod with a backup.",
    "ReportDiffers": "The bill is not what its records say. Compare with the published UsageReport and a backup.",
    "ReportBytes": "It is not the report that its facts give. Compare with the published UsageReport and a backup.",
    "ReportChain": "A report of this tenant was changed, taken out or put in. Compare with those that were published.",
    "PlanDiffers": "A price plan is not the one that was seen. Compare with a backup.",
    "ExportDiffers": "Ledger and exported file have parted: one of them was changed or restored from an older copy.",
    "CannotBeRecomputed": "A row holds what no collector writes; the findings before this one may name it.",
}
"""What to do, by reason."""

Progress = Callable[[str, int, int], None]
"""(what is looked at, how many rows so far, of how many or 0 where that is not known)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: a word, and a sentence that names the row and says what is wrong with it."""

    reason: str
    message: str

    @property
    def advice(self) -> str:
        """What to do."""
        return ADVICE[self.reason]


@dataclass(slots=True)
class Tally:
    """How much was looked at: `periods` were recomputed from raw records, those that `only_compared` counts were not,
    because retention removed their records."""

    digests: int = 0
    facts: int = 0
    pending: int = 0
    records: int = 0
    periods: int = 0
    only_compared: int = 0
    refolded: int = 0
    last_digest: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """What is to be verified, and how: the ledger, the keys that are believed, the part of it, the digests of an
    exported file to compare with (None for none), who wants to know how far it is, and the time now."""

    reader: Reader
    keys: Keyring
    now_ns: int
    span: Span = Whole
    exported: Iterable[Digest] | None = None
    progress: Progress = lambda *_: None


def verify(of: Audit, tally: Tally) -> Iterator[Finding]:
    """Everything that differs."""
    entries: dict[int, Entry] = {}
    yield from _apart(lambda: _digests(of, tally, entries), "the digests")
    yield from _apart(lambda: _facts(of, tally, entries), "the facts of digests")
    for worker_uid, boot_id, seq in raw.strays(of.reader.engine):
        message = (
            f"worker {worker_uid} boot {boot_id} from seq {seq}: records of no worker, boot or service that is known."
        )
        yield Finding("RecordStray", message)
    for worker_uid, boot_id in raw.stray_boots(of.reader.engine):
        yield Finding("RecordStray", f"worker {worker_uid} boot {boot_id}: a cursor of no worker that is known.")
    for worker_uid, boot_id, day_end_ns, first_seq, name in strangers(of.reader):
        key = f"{worker_uid} {boot_id} {day_end_ns} {first_seq}"
        yield Finding("RemovalUnproved", f"removals ({key}): it names {name:.80}, of which its worker is none.")
    for service in raw.final_services(of.reader.engine):
        of_service = {
            entry.period_end_ns: entry for entry in entries.values() if (entry.namespace, entry.service) == service
        }
        yield from _service(of, tally, service, of_service if entries else None)
    yield from _apart(lambda: _plans(of.reader), "price plans")


def _plans(reader: Reader) -> Iterator[Finding]:
    """Price plans whose bytes are not those of their hash."""
    for message in check_kept([], reader.kept_plans()):
        yield Finding("PlanDiffers", f"{message}.")


def verify_file(given: Iterable[Digest], keys: Keyring, tally: Tally) -> Iterator[Finding]:
    """The same for a file of exported digests alone: chain, hashes and signatures."""
    for digest, _, faults in check_chain(given, keys):
        tally.digests += 1
        tally.last_digest = digest.digest
        for fault in faults:
            yield Finding(fault.reason, fault.message)


def _digests(of: Audit, tally: Tally, entries: dict[int, Entry]) -> Iterator[Finding]:
    """The chain, its signatures, the facts that each digest covers, and the exported file beside it."""
    columns: dict[bytes, Mapping[str, Any]] = {}
    lines = groupby(digests.kept_lines(of.reader.engine), key=lambda line: line[0])
    of_seq = next(lines, None)
    seen: set[tuple[str, str, int]] = set()
    file = iter(of.exported) if of.exported is not None else None

    def kept() -> Iterator[Digest]:
        for each in digests.kept(of.reader.engine):
            columns[each.digest.body] = each.columns
            yield each.digest

    for digest, entry, faults in check_chain(kept(), of.keys):
        tally.digests += 1
        tally.last_digest = digest.digest
        of.progress("digests", tally.digests, 0)
        for fault in faults:
            yield Finding(fault.reason, fault.message)
        beside = columns.pop(digest.body)
        if file is not None and next(file, digest) != digest:
            yield Finding("ExportDiffers", f"digest {beside['seq']}: the exported file has another line for it.")
            file = None
        if entry is None:
            continue
        if odd := [name for name, value in beside.items() if value != getattr(entry, name)]:
            yield Finding(
                "DigestColumns", f"digest {entry.seq}: the columns {', '.join(odd)} are not those of its body."
            )
        key = (entry.namespace, entry.service, entry.period_end_ns)
        if entry.service and key in seen:
            yield Finding("DigestDoubled", f"digest {entry.seq}: {_period(*key)} has a digest before it.")
        seen.add(key)
        entries[entry.seq] = entry
        while of_seq is not None and of_seq[0] < entry.seq:
            yield Finding("FactsRoot", f"digest_facts of digest {of_seq[0]}: there is no such digest.")
            of_seq = next(lines, None)
        leaves: Iterable[bytes] = ()
        if of_seq is not None and of_seq[0] == entry.seq:
            numbered = [(position, line) for _, position, _, _, line in of_seq[1]]
            leaves = [line for index, (position, line) in enumerate(numbered) if position == index]
            of_seq = next(lines, None)
        if root_of(leaves) != (entry.facts, entry.facts_root):
            yield Finding(
                "FactsRoot", f"digest {entry.seq}: the rows of digest_facts do not give the root of its facts."
            )
    if of_seq is not None:
        yield Finding("FactsRoot", f"digest_facts of digest {of_seq[0]}: there is no such digest.")
    for key_id, der in digests.kept_keys(of.reader.engine).items():
        if key_id_of(der) != key_id:
            yield Finding("KeyDiffers", f"signing_keys ({key_id}): the key that is kept there is {key_id_of(der)}.")
    if file is not None and (more := next(file, None)) is not None:
        yield Finding(
            "ExportDiffers", f"The exported file goes on after digest {tally.digests} with {more.digest:.16}…"
        )


def _facts(of: Audit, tally: Tally, entries: Mapping[int, Entry]) -> Iterator[Finding]:
    """Every row of facts beside the line that a digest has of it."""
    # Where the last digest is of a time that is yet to come, a clock was ahead: what comes now is no older than it.
    made_ns = min(entries[max(entries)].made_ns, of.now_ns) if entries else 0
    inside = {seq for seq, entry in entries.items() if not entry.service or of.span.holds(entry.period_end_ns)}
    closed_ns: dict[tuple[str, str], int] = {}
    for entry in entries.values():
        key = (entry.namespace, entry.service)
        closed_ns[key] = max(closed_ns.get(key, 0), entry.period_end_ns)
    of_worker = {
        pod.worker.worker_uid: service for service in of.reader.services() for pod in of.reader.pods(*service, 0)
    }
    for table in COVERED:
        matched = 0
        for each in digests.compare(of.reader.engine, table):
            tally.facts += 1
            of.progress("facts", tally.facts, 0)
            if each.line is None:
                if (came_ns := each.came_ns) is not None and _is_ahead(each.table, came_ns, of.now_ns):
                    told = f"it came {rfc3339(came_ns)}, it says, and it is {rfc3339(of.now_ns)}"
                    yield Finding("FactAhead", f"{each.table} ({each.key}): {told}.")
                elif _came_before(each, made_ns, closed_ns, of_worker):
                    yield Finding("FactInserted", f"{each.table} ({each.key}): stands in no digest, and should.")
                else:
                    tally.pending += 1
                continue
            matched += 1
            if each.seq in inside and (told := _changed(each)):
                yield Finding("FactChanged", f"{each.table} ({each.key}): {told}")
        if matched != digests.covered_count(of.reader.engine, table):
            for seq, lost in digests.lost(of.reader.engine, table):
                yield Finding("FactMissing", f"{table.name} ({lost}): digest {seq} covers it, and it is not there.")
    for name in sorted(digests.covered_tables(of.reader.engine) - {table.name for table in COVERED}):
        yield Finding("FactsRoot", f"digest_facts: it states rows of {name:.64}, which is no table of facts.")


def _is_ahead(table: str, came_ns: int, now_ns: int) -> bool:
    """Whether a row says that it came later than now. How a service is billed stands there before the period ends."""
    return isinstance(came_ns, int) and came_ns > now_ns + (32 * DAY_NS if table == "period_terms" else LATE_NS)


def _came_before(
    fact: Compared, made_ns: int, closed_ns: Mapping[tuple[str, str], int], of_worker: Mapping[str, tuple[str, str]]
) -> bool:
    """Whether a digest should cover this row: it claims to be older than one, or to be of a period that has one."""
    row = fact.row
    if fact.table in ("reports", "periods", "period_terms", "pod_accounts"):
        service = (
            of_worker.get(row["worker_uid"], ("", "")) if "worker_uid" in row else (row["namespace"], row["service"])
        )
        end_ns = row["end_ns"] if "end_ns" in row else row["period_end_ns"]
        if not isinstance(end_ns, int) or end_ns <= closed_ns.get(service, 0):
            return True
    return not isinstance(fact.came_ns, int) or fact.came_ns < made_ns - LATE_NS


def _changed(fact: Compared) -> str:
    if fact.line == fact_line(fact.table, fact.row):
        return ""
    try:
        stated = columns_of(bytes(fact.line or b""))
        is_now = columns_of(fact_line(fact.table, fact.row))
    except DigestInvalid as problem:
        return f"digest {fact.seq} has {problem}."
    told = [
        f"{name} is {is_now[name]!r:.80}, digest {fact.seq} states {value!r:.80}"
        for name, value in stated.items()
        if name in is_now and is_now[name] != value  # a column that a later schema brought is not covered
    ]
    return "; ".join(told) + "." if told else ""


def _service(
    of: Audit, tally: Tally, service: tuple[str, str], signed: Mapping[int, Entry] | None
) -> Iterator[Finding]:
    entries = signed or {}
    removed, unproved = removed_of(of.reader, service, signed, of.now_ns)
    for day_end_ns, message in unproved:
        if of.span.since_ns < day_end_ns and day_end_ns - DAY_NS < of.span.until_ns:
            yield Finding("RemovalUnproved", message)

    def look() -> Iterator[Finding]:
        def count(records: int, most: int) -> None:
            of.progress(f"records of {'/'.join(service)}", records, most)

        for reason, message in recount_service(of.reader, service, of.span, tally, count, removed=removed):
            yield Finding(reason, message if message.endswith(".") else f"{message}.")

    yield from _apart(look, "/".join(service))
    yield from _roots(of, service, entries, removed)
    for end_ns, kept_ns in raw.final_ends(of.reader.engine, *service):
        just_now = isinstance(kept_ns, int) and abs(of.now_ns - kept_ns) < LATE_NS and end_ns > max(entries, default=0)
        if of.span.holds(end_ns) and end_ns not in entries and not just_now:
            yield Finding("PeriodWithoutDigest", f"{_period(*service, end_ns)} is Final and has no digest.")


def _roots(of: Audit, service: tuple[str, str], entries: Mapping[int, Entry], removed: Removed) -> Iterator[Finding]:
    for end_ns, entry in sorted(entries.items()):
        if not of.span.holds(end_ns) or removed.holds(end_ns):
            continue
        tree = Tree()
        try:
            for each in digests.record_hashes(of.reader.engine, *service, end_ns):
                tree.add(bytes.fromhex(each))
        except (ValueError, TypeError):
            yield Finding("RecordsRoot", f"digest {entry.seq}: a record of {_period(*service, end_ns)} has no hash.")
            continue
        of.progress(f"digests of {'/'.join(service)}", tree.count, 0)
        if (tree.count, tree.root) != (entry.records, entry.records_root):
            counts = "" if tree.count == entry.records else f" ({tree.count} records, not {entry.records})"
            message = f"digest {entry.seq}: the records of {_period(*service, end_ns)} do not give its root{counts}."
            yield Finding("RecordsRoot", message)


def _apart(look: Callable[[], Iterator[Finding]], what: str) -> Iterator[Finding]:
    """What a check finds; that it stumbles over a row that nobody can have written is a finding, too."""
    try:
        yield from look()
    except LedgerUnavailable:
        raise
    except Exception as surprise:
        message = f"{what}: its figures cannot be recomputed ({type(surprise).__name__}: {surprise!s:.200})."
        yield Finding("CannotBeRecomputed", message)


def _period(namespace: str, service: str, end_ns: int) -> str:
    return f"the period of {namespace}/{service} that ended {rfc3339(end_ns)}"
