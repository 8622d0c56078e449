"""Whether sessions claim what their pod booked: the one sum in a chain of records that tenants pay by.

Owns the order in which a worker states it, by which it can be judged record by record, wherever a page is cut: first
the slices of sessions, then the `attributed` account of the same stretch of time, which is their sum to the nanosecond
and ends in the same UTC minute. Both sides judge by it: a journal writes nothing else, and a collector takes nothing
else. Knows neither files nor pages.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from gpumeter_usage.period import MINUTE_NS, rfc3339
from gpumeter_usage.record import Account, Kind


class Booked(Protocol):
    """What of a record counts here."""

    @property
    def kind(self) -> Kind:
        """What it is about."""
        ...

    @property
    def account(self) -> str:
        """Where its time belongs."""
        ...

    @property
    def gpu_ns(self) -> int:
        """Its GPU-nanoseconds."""
        ...

    @property
    def ended_at(self) -> int:
        """UTC nanoseconds since 1970."""
        ...


@dataclass(frozen=True, slots=True)
class Open:
    """What slices so far claim and no account has booked yet, in GPU-nanoseconds.

    All of them end in the UTC minute that ends at `minute_ns` (0 where nothing is open). `cut`: there may be slices
    before them that nobody counted, because records are missing; the next account books at least what is open, and from
    there on it is exact.
    """

    gpu_ns: int = 0
    minute_ns: int = 0
    cut: bool = False


BALANCED = Open()
CUT = Open(cut=True)


class SlicesDisagree(ValueError):
    """Sessions claim another time than their pod booked; the message is a sentence without its end. `at` is the index
    of the record at which it shows."""

    def __init__(self, at: int, message: str) -> None:
        super().__init__(message)
        self.at = at


def balance(before: Open, records: Iterable[Booked]) -> Open:
    """What is open after these records, which follow those of `before` in their chain. Raises SlicesDisagree."""
    open_ns, minute_ns, cut = before.gpu_ns, before.minute_ns, before.cut
    for at, record in enumerate(records):
        if record.account != Account.ATTRIBUTED:
            if record.kind is Kind.SEAL and open_ns:
                raise SlicesDisagree(at, f"the sessions' slices sum to {open_ns} ns, and the seal follows them")
            continue
        gpu_ns = record.gpu_ns
        if not (gpu_ns or (open_ns and record.kind is Kind.ACCOUNT)):
            continue  # an end of a session, or a statement of energy: they stand where they may, and claim nothing
        ends_ns = (record.ended_at + MINUTE_NS - 1) // MINUTE_NS * MINUTE_NS  # what ends on an edge ends in its minute
        if open_ns and ends_ns != minute_ns:
            raise SlicesDisagree(
                at,
                f"the sessions' slices claim {open_ns} ns in the minute before {rfc3339(minute_ns)}, and what follows "
                f"them ends {rfc3339(record.ended_at)}",
            )
        if record.kind is Kind.SESSION:
            open_ns, minute_ns = open_ns + gpu_ns, ends_ns
            continue
        if open_ns > gpu_ns or (open_ns < gpu_ns and not cut):
            raise SlicesDisagree(
                at, f"the sessions' slices sum to {open_ns} ns, the account attributed changed by {gpu_ns} ns"
            )
        open_ns, minute_ns, cut = 0, 0, False
    return Open(open_ns, minute_ns, cut)
