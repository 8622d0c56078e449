"""How a chain goes on after records that are gone: they were acknowledged and trimmed, and this ledger has them not.

Owns the transaction: the fact that they are missing is committed together with the first page after them, so that no
cursor ever stands behind a gap that is not written down.
"""

from dataclasses import replace

from sqlalchemy import Connection, select

from gpumeter_operator.adapters.ledger import locks, rows
from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.days import DayMissing
from gpumeter_operator.adapters.ledger.gaps import gaps_of, keep_gap
from gpumeter_operator.adapters.ledger.rows import Taken
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.accept import OfPod, PageRefused, accept, others_ns
from gpumeter_operator.billing.facts import NOTHING, BootFacts, Worker
from gpumeter_operator.billing.gaps import gap_before, refuse_more_gaps
from gpumeter_usage.balance import CUT
from gpumeter_usage.page import Page
from gpumeter_usage.record import Status


def take_after_gap(
    ledger: Ledger, worker: Worker, page: Page, last_hash: str, now_ns: int, *, whole: bool = False
) -> Taken:
    """Commit a page that does not follow what is here, and the fact that what lies between is missing.

    `last_hash` is that of record `page.after`, as the worker states it: what follows must be chained to it. Raises
    PageRefused, with nothing taken; also where the boot has lost too much already. `whole` as for `accept`.
    """
    while True:
        boots = ledger.boots(worker.worker_uid)
        boot = next((each for each in boots if each.boot_id == page.boot_id), None)
        if page.after <= (boot.committed_seq if boot else 0):
            return ledger.take(worker, page, now_ns, whole=whole)  # another collector was faster
        if boot and boot.seal is not Status.NONE:
            raise PageRefused(
                "AfterSeal", f"boot {page.boot_id:.64} goes on at seq {boot.committed_seq + 1} after its seal"
            )
        if not page.links or not page.boot_id.isprintable():
            raise PageRefused("NothingNew", f"boot {page.boot_id!r:.80}: nothing after seq {page.after} was sent")
        of_pod = OfPod(ledger.first_started_ns(worker.worker_uid), others_ns(boots, page.boot_id))
        spent = replace(boot.spent if boot else NOTHING, open=CUT)
        accepted = accept(page, worker, last_hash, now_ns, spent=spent, of_pod=of_pod, whole=whole)
        mine = (locks.of_service(worker.service_key, shared=True), locks.of_worker(worker.worker_uid))
        try:
            with ledger.writing(*mine) as connection:
                known = gaps_of(connection, [worker.worker_uid]).get(worker.worker_uid, ())
                refuse_more_gaps(page.boot_id, known)
                known_ns = _known_until_ns(connection, worker, boot)
                if not rows.advance(connection, boot, accepted):
                    continue  # another collector was faster, and nothing is changed
                gap = gap_before(
                    page, accepted.records, boot, last_hash=last_hash, known_until_ns=known_ns, now_ns=now_ns
                )
                keep_gap(connection, worker.worker_uid, gap)
                rows.insert_records(connection, worker, accepted.records, page.links, now_ns, days=ledger.days)
        except DayMissing as missing:
            ledger.days.make(missing.day_ends_ns)
            continue
        named = frozenset(record.profile_hash for record in accepted.records if record.profile_hash)
        return Taken(len(page.links), page.after + len(page.links), accepted.head_hash, named)


def _known_until_ns(connection: Connection, worker: Worker, boot: BootFacts | None) -> int:
    """Up to when everything of a boot is here: its last record's end, or what the worker was settled up to."""
    r, p = t.records.c, t.progress.c
    settled_ns = connection.scalar(select(p.settled_ns).where(p.worker_uid == worker.worker_uid)) or 0
    if boot is None:
        return int(settled_ns)
    last = select(r.ended_at).where(r.worker_uid == worker.worker_uid, r.boot_id == boot.boot_id)
    return max(int(settled_ns), int(connection.scalar(last.where(r.seq == boot.committed_seq)) or boot.started_ns))
