"""The sums of open periods, kept from round to round: a round reads only the records that came since the last one.

Owns the cursor of each chain and the sums so far. What is shown of a period that may still change is made of them; a
Final period is folded from the ledger in whole, so nothing that is kept rests on this memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumeter_operator.adapters.ledger.fresh import Chain, first_open_seqs, rows_between
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.facts import Line, Pod
from gpumeter_usage.period import Period
from gpumeter_usage.record import ENDED, Account, Kind

_ENDED = frozenset(status.value for status in ENDED)
_ATTRIBUTED = Account.ATTRIBUTED.value
Key = tuple[str, str, str, str, str, str]
"""worker_uid, boot_id, kind, account, tenant, clock: what the records of one line share."""

Figures = list[Any]
"""The figures of a line, in the order of its fields; the last two are None where no record states them."""


@dataclass(slots=True)
class _Sums:
    since_ns: int  # records booked after this are in here
    cursors: dict[Chain, int] = field(default_factory=dict)
    periods: dict[int, dict[Key, Figures]] = field(default_factory=dict)  # by end, the figures of each line


class Folds:
    """Sums of every service's open periods."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._services: dict[tuple[str, str], _Sums] = {}

    def lines(self, service: tuple[str, str], period: Period, pods: Sequence[Pod]) -> tuple[Line, ...]:
        """The sums of the records that are booked in an open period, as far as these pods' cursors reach."""
        sums = self._services.get(service)
        if sums is None:
            sums = self._services[service] = self._begin(service, pods)
        self._catch_up(service, sums, pods)
        found = sums.periods.get(period.end_ns, {})
        return tuple(_line(key, found[key]) for key in sorted(found))

    def closed(self, service: tuple[str, str], period: Period) -> None:
        """A period is Final: its sums are not needed any more."""
        if service in self._services:
            self._services[service].periods.pop(period.end_ns, None)

    def _begin(self, service: tuple[str, str], pods: Sequence[Pod]) -> _Sums:
        final_ns = self._reader.last_final_ns(*service)
        firsts = first_open_seqs(self._reader.engine, "/".join(service), final_ns)
        # The pods were read before: a chain that has nothing open even now had nothing open up to its cursor.
        cursors = {(pod.worker.worker_uid, boot.boot_id): boot.committed_seq for pod in pods for boot in pod.boots}
        return _Sums(final_ns, cursors | {chain: seq - 1 for chain, seq in firsts.items()})

    def _catch_up(self, service: tuple[str, str], sums: _Sums, pods: Iterable[Pod]) -> None:
        spans: dict[Chain, tuple[int, int]] = {}
        for pod in pods:
            for boot in pod.boots:
                chain = (pod.worker.worker_uid, boot.boot_id)
                after = sums.cursors.get(chain, 0)
                if boot.committed_seq > after:
                    spans[chain] = (after, boot.committed_seq)
        for rows in rows_between(self._reader.engine, spans, "/".join(service)):
            for row in rows:
                if row[0] > sums.since_ns:
                    _add(sums.periods, row)
        for chain, (_, until) in spans.items():
            sums.cursors[chain] = until


def _add(periods: dict[int, dict[Key, Figures]], row: Any) -> None:
    booked_end_ns, worker_uid, boot_id, kind, account, tenant, clock, seq, status, *figures = row
    key = (worker_uid, boot_id, kind, account, tenant, clock)
    sessions = int(status in _ENDED and account == _ATTRIBUTED)
    lines = periods.setdefault(booked_end_ns, {})
    known = lines.get(key)
    if known is None:
        lines[key] = [1, seq, seq, sessions, *figures]
        return
    known[0] += 1
    known[1] = min(known[1], seq)
    known[2] = max(known[2], seq)
    known[3] += sessions
    for index, figure in enumerate(figures, start=4):
        if figure is not None:
            known[index] = (known[index] or 0) + figure


def _line(key: Key, figures: Figures) -> Line:
    worker_uid, boot_id, kind, account, tenant, clock = key
    return Line(worker_uid, boot_id, Kind(kind), account, tenant, clock, *figures)
