"""What retention says that it removed, and whether that can be believed.

Owns the rules. A row of removals takes whole days out of what can be recomputed, so whoever may write the ledger would
hide any change behind one: it counts only where the day is old enough, closed, and held as many records as the signed
digests of its periods say. Pure; does not know how a row is read, or what is done about one that is not believed.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from gpumeter_operator.billing.digest import Entry
from gpumeter_usage.period import SECOND_NS, rfc3339

DAY_NS = 86_400 * SECOND_NS
LEAST_DAYS = 90
SKEW_NS = 3600 * SECOND_NS
"""A row is committed at most this long after the time that it states: it may wait for a lock, and clocks differ."""

Chains = Mapping[str, Iterable[tuple[int, int, str]]]
"""By boot, (first seq, last seq, hash of the last) of what was removed."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One row: what it says went of one chain on one day. Times in nanoseconds since 1970, seqs from 1."""

    worker_uid: str
    boot_id: str
    day_end_ns: int
    first_seq: int
    last_seq: int
    last_hash: str
    records: int
    first_end_ns: int
    last_end_ns: int
    retention_days: int
    removed_ns: int

    @property
    def key(self) -> str:
        """What names the row."""
        return f"{self.worker_uid} {self.boot_id} {self.day_end_ns} {self.first_seq}"


@dataclass(frozen=True, slots=True)
class Removed:
    """What is believed of one service: the ends of the days that went whole, and by worker what went of its chains."""

    day_ends_ns: frozenset[int] = frozenset()
    chains: Mapping[str, Chains] = field(default_factory=dict)

    def holds(self, end_ns: int) -> bool:
        """Whether the records of the period that ended then are removed."""
        return day_end_ns(end_ns) in self.day_ends_ns


NOTHING = Removed()


@dataclass(frozen=True, slots=True)
class Beside:
    """What the rows of one service are compared with: the uids of its workers, the end of its last Final period, the
    digests by end of period (None where there are none to compare with), and by end of day the first record that is
    booked in it and is there, as words."""

    worker_uids: Collection[str]
    final_ns: int
    entries: Mapping[int, Entry] | None
    still_there: Mapping[int, str]
    now_ns: int


def day_end_ns(end_ns: int) -> int:
    """The end of the UTC day that holds the period with this end: periods are (start, end]."""
    return -(-end_ns // DAY_NS) * DAY_NS


def judge(rows: Iterable[Removal], beside: Beside) -> tuple[Removed, list[tuple[int, str]]]:
    """What is believed of these rows of one service, and (end of day, what is wrong) for each that is not.

    A day is believed whole or not at all.
    """
    of_day: dict[int, list[Removal]] = defaultdict(list)
    days: set[int] = set()
    chains: dict[str, dict[str, list[tuple[int, int, str]]]] = defaultdict(lambda: defaultdict(list))
    problems = []
    for row in rows:
        if all(is_a_time(each) for each in _figures(row)):
            of_day[row.day_end_ns].append(row)
        else:
            problems.append((0, f"removals ({row.key}): it holds what is no time, seq or number of records."))
    for end_ns, of_this in sorted(of_day.items()):
        told = [f"removals ({row.key}): {wrong}." for row in of_this if (wrong := _wrong(row, beside))]
        told = told or [f"removals ({row.key}): {wrong}." for row in of_this if (wrong := _miscounted(of_this, beside))]
        problems += [(end_ns, each) for each in told]
        if told:
            continue
        # SQLite removes a little at a time after the rows are written; what lies there for longer was not removed.
        left = beside.still_there.get(end_ns)
        if left and beside.now_ns - max(row.removed_ns for row in of_this) > SKEW_NS:
            problems.append(
                (end_ns, f"removals ({of_this[0].key}): {left} is of what it says was removed, and is there.")
            )
            continue
        days.add(end_ns)
        for row in of_this:
            chains[row.worker_uid][row.boot_id].append((row.first_seq, row.last_seq, row.last_hash))
    return Removed(frozenset(days), chains), problems


def is_a_time(value: object) -> bool:
    """Whether somebody who may write the file left a column a number that can be reckoned with."""
    return type(value) is int and 0 <= value < 2**62


def _figures(row: Removal) -> tuple[int, ...]:
    of_day = (row.day_end_ns, row.first_end_ns, row.last_end_ns, row.retention_days, row.removed_ns)
    return (*of_day, row.first_seq, row.last_seq, row.records)


def _wrong(row: Removal, beside: Beside) -> str:
    """Why a row cannot be retention's, whatever stands beside it in its day; "" where it can."""
    if row.worker_uid not in beside.worker_uids:
        return "its worker is none of the service"
    if row.day_end_ns % DAY_NS:
        return "it names what is no UTC day"
    if not row.day_end_ns - DAY_NS < row.first_end_ns <= row.last_end_ns <= row.day_end_ns:
        return "its periods are not of the day that it names"
    if row.last_end_ns > beside.final_ns:
        return f"it names the period to {rfc3339(row.last_end_ns)}; the last Final one ended {rfc3339(beside.final_ns)}"
    if not 1 <= row.records <= row.last_seq - row.first_seq + 1 or row.first_seq < 1:
        return f"from seq {row.first_seq} to {row.last_seq} there are no {row.records} records"
    days = max(row.retention_days, LEAST_DAYS)
    if row.retention_days < LEAST_DAYS or row.removed_ns < row.day_end_ns + days * DAY_NS:
        return f"it says {rfc3339(row.removed_ns)}, before its day was over for {days} days"
    if row.removed_ns > beside.now_ns + SKEW_NS:
        return f"it says {rfc3339(row.removed_ns)}, and it is {rfc3339(beside.now_ns)}"
    return ""


def _miscounted(rows: list[Removal], beside: Beside) -> str:
    """Whether the rows of one day speak of other records than its digests; "" where they agree."""
    spans: dict[tuple[str, str], int] = {}
    for row in sorted(rows, key=lambda one: one.first_seq):
        if row.first_seq <= spans.get((row.worker_uid, row.boot_id), 0):
            return "two rows of its day say that the same seqs went"
        spans[row.worker_uid, row.boot_id] = row.last_seq
    if beside.entries is None:
        return ""
    removed, end_ns = sum(row.records for row in rows), rows[0].day_end_ns
    of_day = [each for each in beside.entries.values() if end_ns - DAY_NS < each.period_end_ns <= end_ns]
    # Where digests began later than retention, theirs are of a period whose records had gone, and state none.
    late = [each for each in of_day if each.made_ns >= min(row.removed_ns for row in rows)]
    stated = sum(each.records for each in of_day)
    if removed == stated or (late and removed > stated and not any(each.records for each in late)):
        return ""
    return f"{removed} records of its day went, it says, and the day's digests state {stated}"
