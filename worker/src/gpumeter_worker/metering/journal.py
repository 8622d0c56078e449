"""The worker's journal: what was measured, on disk, in a hash chain per boot.

Owns the SQLite file: one transaction a flush, sequence numbers and hashes, the seal of former boots, acknowledgement
and trim. It refuses a flush that does not add up. Does not know how anything was measured, nor who collects it and how
(journalpages). Every call blocks on the disk: metering.writer keeps it off the event loop. One Journal belongs to one
thread.

On disk it takes no more than GPUMETER_JOURNAL_MAX_BYTES, at which admission stops; what is still written then, the
slices of the sessions that run and, as long as nobody acknowledges, a few account records a checkpoint; LOG_BYTES and
the largest transaction once more for the write-ahead log; and two reserves. No record is ever dropped for want of room:
what does not fit waits in memory.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gpumeter_usage.balance import BALANCED, SlicesDisagree, balance
from gpumeter_usage.chain import GENESIS, link
from gpumeter_usage.page import Acknowledgement
from gpumeter_usage.record import Account, Kind, Record, Status, canonical
from gpumeter_worker.metering.journalfile import (
    SETTINGS,
    Damaged,
    DiskFull,
    JournalUnusable,
    continues,
    opened,
    translated,
)
from gpumeter_worker.metering.meter import Flush, Identity, seal
from gpumeter_worker.metering.reserve import SEAL_FILE_NAME, TRIM_FILE_NAME, Reserve

T = TypeVar("T")

_STEP_RECORDS = 200
"""What is trimmed at a time on a full disk: some forty pages."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS boots (
    boot_id TEXT PRIMARY KEY, ordinal INTEGER NOT NULL, identity TEXT NOT NULL,
    frontier_ns INTEGER NOT NULL, head_seq INTEGER NOT NULL, head_hash TEXT NOT NULL,
    acknowledged_seq INTEGER NOT NULL, sealed INTEGER NOT NULL, acknowledged_hash TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS records (
    boot_id TEXT NOT NULL, seq INTEGER NOT NULL, hash TEXT NOT NULL, body BLOB NOT NULL,
    flush_end_seq INTEGER NOT NULL, PRIMARY KEY (boot_id, seq)
) STRICT, WITHOUT ROWID;
"""


HAS_ACKNOWLEDGED_HASH = "SELECT 1 FROM pragma_table_info('boots') WHERE name = 'acknowledged_hash'"
"""Files of earlier builds have no such column; in those of their boots that are trimmed, it stays empty."""


class FlushRefused(Exception):
    """A flush that does not add up: a defect of the meter, never of the disk. Nothing of it is stored."""


class AcknowledgementRefused(Exception):
    """An acknowledgement of something that this journal does not hold; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the current boot's chain, as the disk has it."""

    boot_id: str
    seq: int
    hash: str
    acknowledged_seq: int
    frontier_ns: int
    sealed: bool


class Journal:
    """The open journal of one worker. `identity` names the boot that writes."""

    def __init__(self, directory: Path, identity: Identity, started_ns: int) -> None:
        """Open or create the file, seal what former boots left open, begin a chain.

        Raises JournalUnusable: DiskFull where trying again may help.
        """
        self._identity = identity
        self._directory = directory
        self._reserve = Reserve(directory, SEAL_FILE_NAME)
        self._for_trimming = Reserve(directory, TRIM_FILE_NAME)
        try:
            self._database = self._opened()
            try:
                self._in_room_of((self._reserve, self._for_trimming), lambda: self._begin(started_ns))
            except BaseException:
                self._database.close()
                raise
        except DiskFull:
            self._for_trimming.take_again()
            raise
        self._for_trimming.take_again()
        self._reserve.take()

    def append(self, flush: Flush, closing: Record | None = None, *, leaving: bool = False) -> Head:
        """Add a flush, and the seal if `closing` is one, in one transaction that is on disk when this returns.

        Raises FlushRefused when it does not add up, JournalUnusable when the disk refuses; both leave the journal as
        it was, so that the same flush can be tried again. On a full disk only a seal may use the reserve, and what is
        written when the process leaves (`leaving`): a seal cannot come before what it ends.
        """
        try:
            return self._append(flush, closing)
        except DiskFull:
            self._fold_log()  # what was trimmed left pages in the file, and the log can have their room
        if not leaving and closing is None:
            return self._append(flush, closing)
        return self._in_room_of((self._reserve,), lambda: self._append(flush, closing))

    def _append(self, flush: Flush, closing: Record | None) -> Head:
        with translated(None), self._transaction():
            head = self._head()
            if head.sealed:
                raise FlushRefused("the boot is sealed; nothing may follow")
            _refuse_imbalance(flush, head.frontier_ns, self._identity.devices)
            records = flush.records if closing is None else (*flush.records, closing)
            self._chain(head.boot_id, head.seq, head.hash, records)
            self._database.execute(
                "UPDATE boots SET frontier_ns = ?, sealed = ? WHERE boot_id = ?",
                (flush.frontier_ns, closing is not None, head.boot_id),
            )
            return self._head()  # read before the commit: after it nothing may fail, or the flush would be tried again

    def head(self) -> Head:
        """Where this boot's chain stands. Raises JournalUnusable."""
        with translated(None):
            return self._head()

    def acknowledge(self, acknowledgement: Acknowledgement) -> Head:
        """Trim what the collector has committed; a former boot that is sealed and committed whole is forgotten.

        The same acknowledgement twice changes nothing. Raises AcknowledgementRefused, JournalUnusable.
        """
        try:
            head = self._trim(acknowledgement)
        except DiskFull:
            self._fold_log()
            try:
                work = partial(self._trim_in_steps, acknowledgement)
                head = self._in_room_of((self._for_trimming, self._reserve), work)
            finally:
                self._fold_log()
                self._for_trimming.take_again()
        if not (self._for_trimming.take() and self._reserve.take()):
            self._fold_log()
            self._for_trimming.take()
            self._reserve.take()
        return head

    def ends_acknowledged(self, acknowledgement: Acknowledgement) -> bool:
        """Whether an acknowledgement that was not refused names, by seq and hash, the last record acknowledged of its
        boot: it trimmed something just now, or repeats what did. Raises JournalUnusable.
        """
        with translated(None):
            # A boot that is not there any more was forgotten because of it.
            last = self._database.execute(
                "SELECT acknowledged_seq, acknowledged_hash FROM boots WHERE boot_id = ?", (acknowledgement.boot_id,)
            ).fetchone()
        return acknowledgement.seq > 0 and (last is None or last == (acknowledgement.seq, acknowledgement.hash))

    def _trim_in_steps(self, acknowledgement: Acknowledgement) -> Head:
        """SQLite writes before it deletes. Little by little there is room for that, because the log is used again."""
        with translated(None):
            self._refuse_unheld(acknowledgement)
            steps = self._database.execute(
                "SELECT seq, hash FROM records WHERE boot_id = ? AND seq < ? AND seq % ? = 0 ORDER BY seq",
                (acknowledgement.boot_id, acknowledgement.seq, _STEP_RECORDS),
            ).fetchall()
        for seq, digest in steps:
            self._trim(Acknowledgement(acknowledgement.boot_id, seq, digest))
            self._fold_log()
        return self._trim(acknowledgement)

    def _trim(self, acknowledgement: Acknowledgement) -> Head:
        boot_id, seq = acknowledgement.boot_id, acknowledgement.seq
        with translated(None), self._transaction():
            known = self._database.execute(
                "SELECT acknowledged_seq, head_seq, sealed FROM boots WHERE boot_id = ?", (boot_id,)
            ).fetchone()
            if known is None:
                raise AcknowledgementRefused(f"the journal holds no boot {boot_id:.40}")
            acknowledged_seq, head_seq, sealed = known
            if seq > acknowledged_seq:
                self._refuse_unheld(acknowledgement)
                self._database.execute(
                    "UPDATE boots SET acknowledged_seq = ?, acknowledged_hash = ? WHERE boot_id = ?",
                    (seq, acknowledgement.hash, boot_id),
                )
                self._database.execute("DELETE FROM records WHERE boot_id = ? AND seq <= ?", (boot_id, seq))
                if sealed and seq == head_seq and boot_id != self._identity.boot_id:
                    self._database.execute("DELETE FROM boots WHERE boot_id = ?", (boot_id,))
            return self._head()

    def _refuse_unheld(self, acknowledgement: Acknowledgement) -> None:
        boot_id, seq = acknowledgement.boot_id, acknowledgement.seq
        if self._value("SELECT hash FROM records WHERE boot_id = ? AND seq = ?", boot_id, seq) != acknowledgement.hash:
            raise AcknowledgementRefused(f"record {seq} of the boot {boot_id} has another hash here, or does not exist")

    def size_bytes(self) -> int:
        """What the records on disk take, without what trimming set free."""
        with translated(None):
            pages = self._value("SELECT (SELECT * FROM pragma_page_count()) - (SELECT * FROM pragma_freelist_count())")
            return int(pages) * int(self._value("PRAGMA page_size"))

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def _begin(self, started_ns: int) -> None:
        with translated(self._directory):
            self._database.executescript(SETTINGS + _SCHEMA)
            if not self._value(HAS_ACKNOWLEDGED_HASH):
                self._database.execute("ALTER TABLE boots ADD COLUMN acknowledged_hash TEXT NOT NULL DEFAULT ''")
            self._refuse_foreign()
            self._refuse_broken_chains()
            with self._transaction():
                self._seal_former_boots()
                ordinal = self._value("SELECT COALESCE(MAX(ordinal), 0) + 1 FROM boots")
                self._database.execute(
                    "INSERT INTO boots VALUES (?, ?, ?, ?, 0, ?, 0, 0, ?)",
                    (self._identity.boot_id, ordinal, json.dumps(asdict(self._identity)), started_ns, GENESIS, GENESIS),
                )

    def _opened(self) -> sqlite3.Connection:
        for reserve in (self._reserve, self._for_trimming):
            try:
                return opened(self._directory, "rwc")
            except DiskFull:
                reserve.give()
        return opened(self._directory, "rwc")

    def _in_room_of(self, reserves: tuple[Reserve, ...], work: Callable[[], T]) -> T:
        """On a full disk the work is tried again, in the room that was kept back for it: one after the other."""
        for reserve in reserves:
            try:
                return work()
            except DiskFull:
                reserve.give()
                self._fold_log()
        return work()

    def _fold_log(self) -> None:
        with suppress(sqlite3.Error):  # where it does not work, the log stays as it is
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _head(self) -> Head:
        row = self._database.execute(
            "SELECT boot_id, head_seq, head_hash, acknowledged_seq, frontier_ns, sealed FROM boots WHERE boot_id = ?",
            (self._identity.boot_id,),
        ).fetchone()
        boot_id, seq, digest, acknowledged_seq, frontier_ns, sealed = row
        return Head(boot_id, seq, digest, acknowledged_seq, frontier_ns, bool(sealed))

    def _seal_former_boots(self) -> None:
        left_open = self._database.execute(
            "SELECT boot_id, identity, frontier_ns, head_seq, head_hash FROM boots WHERE NOT sealed ORDER BY ordinal"
        ).fetchall()
        for boot_id, identity, frontier_ns, head_seq, head_hash in left_open:
            ending = seal(Identity(**json.loads(identity)), frontier_ns, Status.RECOVERED)
            self._chain(boot_id, head_seq, head_hash, (ending,))
            self._database.execute("UPDATE boots SET sealed = 1 WHERE boot_id = ?", (boot_id,))
        # A boot that was acknowledged whole after its seal has nothing left to say.
        self._database.execute("DELETE FROM boots WHERE sealed AND acknowledged_seq = head_seq")

    def _chain(self, boot_id: str, seq: int, head_hash: str, records: tuple[Record, ...]) -> None:
        rows = []
        flush_end_seq = seq + len(records)
        for record in records:
            seq += 1
            joined = link(head_hash, canonical(record, seq))
            head_hash = joined.hash
            rows.append((boot_id, seq, joined.hash, joined.body, flush_end_seq))
        self._database.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?)", rows)
        self._database.execute(
            "UPDATE boots SET head_seq = ?, head_hash = ? WHERE boot_id = ?", (seq, head_hash, boot_id)
        )

    def _refuse_broken_chains(self) -> None:
        """A flipped bit in a record is no damage to SQLite; to a bill it is."""
        for boot_id, acknowledged_seq, acknowledged_hash, head_seq, head_hash in self._database.execute(
            "SELECT boot_id, acknowledged_seq, acknowledged_hash, head_seq, head_hash FROM boots"
        ).fetchall():
            rows = self._database.execute(
                "SELECT seq, hash, body FROM records WHERE boot_id = ? AND seq > ? ORDER BY seq",
                (boot_id, acknowledged_seq),
            )
            last_seq, last_hash = acknowledged_seq, GENESIS if acknowledged_seq == 0 else acknowledged_hash
            for seq, digest, body in rows:
                if seq != last_seq + 1 or not continues(last_hash, digest, body):
                    break
                last_seq, last_hash = seq, digest
            if last_seq != head_seq or (last_hash and last_hash != head_hash):
                raise Damaged(
                    f"the journal in {self._directory} is damaged (boot {boot_id} after record {last_seq}); what comes "
                    "before is still served; keep the file and start with an empty volume"
                )

    def _refuse_foreign(self) -> None:
        for (identity,) in self._database.execute("SELECT identity FROM boots"):
            owner = json.loads(identity)
            if (owner["worker_uid"], owner["service"]) != (self._identity.worker_uid, self._identity.service):
                raise JournalUnusable(
                    f"the journal holds records of the worker {owner['worker_uid']} of {owner['service']}; "
                    "give every worker a journal directory of its own"
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # a COMMIT that failed may leave it open as well
                self._database.execute("ROLLBACK")
            raise

    def _value(self, statement: str, *parameters: str | int) -> Any:
        row = self._database.execute(statement, parameters).fetchone()
        return row[0] if row else None


def _refuse_imbalance(flush: Flush, frontier_ns: int, devices: int) -> None:
    accounts_ns = sum(record.gpu_ns for record in flush.records if record.kind is Kind.ACCOUNT)
    passed_ns = (flush.frontier_ns - frontier_ns) * devices
    if flush.unmeasured_ns < 0 or accounts_ns + flush.unmeasured_ns != passed_ns:
        on = f" on {devices} devices" if devices > 1 else ""
        raise FlushRefused(
            f"the accounts of the flush sum to {accounts_ns} ns, {flush.unmeasured_ns} ns were not measured, and the "
            f"time since the last one{on} is {passed_ns} ns"
        )
    try:
        left = balance(BALANCED, flush.records)
    except SlicesDisagree as error:
        raise FlushRefused(str(error)) from None
    if left.gpu_ns:
        raise FlushRefused(f"the sessions' slices sum to {left.gpu_ns} ns, the account attributed has none of it")
    of_platform = [record for record in flush.records if record.account == Account.NONBILLABLE]
    slices_ns = sum(record.gpu_ns for record in of_platform if record.kind is Kind.SESSION)
    change_ns = sum(record.gpu_ns for record in of_platform if record.kind is Kind.ACCOUNT)
    if slices_ns > change_ns:
        raise FlushRefused(f"the slices sum to {slices_ns} ns, the account nonbillable changed by {change_ns} ns")
