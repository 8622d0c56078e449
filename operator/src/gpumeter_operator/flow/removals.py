"""What went of a service by retention, as far as it is believed: reads the rows, and what they are compared with.

Owns what is read; what is believed is billing's.
"""

from collections.abc import Mapping

from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.retention import first_left, removals_of, worker_uids
from gpumeter_operator.billing.digest import Entry
from gpumeter_operator.billing.removals import Beside, Removed, is_a_time, judge


def removed_of(
    reader: Reader, service: tuple[str, str], entries: Mapping[int, Entry] | None, now_ns: int
) -> tuple[Removed, list[tuple[int, str]]]:
    """What is believed of a service's removals, and (end of day, sentence) for each row that is not.

    `entries` are its digests by end of period, None where they are not looked at.
    """
    rows = removals_of(reader, *service)
    if not rows:
        return Removed(), []
    left = first_left(reader, *service, {row.day_end_ns for row in rows if is_a_time(row.day_end_ns)})
    return judge(rows, Beside(worker_uids(reader, *service), reader.last_final_ns(*service), entries, left, now_ns))
