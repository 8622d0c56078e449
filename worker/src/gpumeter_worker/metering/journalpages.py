"""The journal as the collector reads it: pages of a boot's chain, and where every boot stands.

Owns what a page holds: whole flushes, and of a damaged file what comes before the damage. Reads beside the writer and
writes nothing. Every call blocks on the disk; one Reader belongs to one thread.
"""

import sqlite3
from pathlib import Path

from gpumeter_usage.chain import GENESIS, Link
from gpumeter_usage.page import MAX_PAGE_RECORDS, Boot, JournalStatus, Page
from gpumeter_worker.metering.journal import HAS_ACKNOWLEDGED_HASH
from gpumeter_worker.metering.journalfile import Damaged, continues, opened, translated

MAX_PAGE_BODY_BYTES = 16 * 2**20
"""A page ends before it grows beyond this, well under what a reader accepts."""


class RecordsGone(Exception):
    """Records below the acknowledgement are asked for: they are trimmed."""


class Reader:
    """Reads pages and the status beside the writer, even where the writer has given up. Belongs to one thread."""

    def __init__(self, directory: Path, worker_uid: str, service: str) -> None:
        self._worker_uid = worker_uid
        self._service = service
        self._database = opened(directory, "ro")

    def status(self) -> JournalStatus:
        """Every boot in the journal, oldest first. Raises JournalUnusable."""
        with translated(None):
            is_kept = self._database.execute(HAS_ACKNOWLEDGED_HASH).fetchone() is not None
            last = "acknowledged_hash" if is_kept else "''"
            rows = self._database.execute(
                "SELECT boot_id, head_seq, head_hash, acknowledged_seq, sealed, frontier_ns, "  # noqa: S608 - ours
                f"{last} FROM boots ORDER BY ordinal"
            ).fetchall()
        boots = tuple(Boot(row[0], row[1], row[2], row[3], bool(row[4]), row[6]) for row in rows)
        return JournalStatus(self._worker_uid, self._service, rows[-1][5] if rows else 0, boots)

    def page(self, boot_id: str, after: int, limit: int) -> Page | None:
        """The records of a boot after `after`, or None when the journal holds no such boot. Raises RecordsGone."""
        with translated(None):
            self._database.execute("BEGIN")
            try:
                watermark_ns = self._database.execute(
                    "SELECT frontier_ns FROM boots ORDER BY ordinal DESC LIMIT 1"
                ).fetchone()
                known = self._database.execute(
                    "SELECT acknowledged_seq FROM boots WHERE boot_id = ?", (boot_id,)
                ).fetchone()
                if known is None:
                    return None
                if after < known[0]:
                    raise RecordsGone(f"records up to {known[0]} of the boot {boot_id} are acknowledged and trimmed")
                links = self._links(boot_id, after, min(limit, MAX_PAGE_RECORDS))
            finally:
                self._database.execute("COMMIT")
        return Page(self._worker_uid, self._service, boot_id, after, watermark_ns[0], tuple(links))

    def _hash(self, boot_id: str, seq: int) -> str:
        """Of a record that is held, or of the last that was trimmed; "" where it is not known."""
        if seq == 0:
            return GENESIS
        held = "SELECT hash FROM records WHERE boot_id = ? AND seq = ?"
        trimmed = "SELECT acknowledged_hash FROM boots WHERE boot_id = ? AND acknowledged_seq = ?"
        row = self._database.execute(held, (boot_id, seq)).fetchone()
        if row is None and self._database.execute(HAS_ACKNOWLEDGED_HASH).fetchone():
            row = self._database.execute(trimmed, (boot_id, seq)).fetchone()
        return str(row[0]) if row else ""

    def _links(self, boot_id: str, after: int, limit: int) -> list[Link]:
        """Whole flushes, as many as fit: slices of sessions must not arrive without the accounts that they sum to.

        Only a flush that is larger than a page is cut, or one that is damaged: what is readable before the damage is
        handed over, and only what starts in the damage itself raises JournalUnusable.
        """
        links: list[Link] = []
        size_bytes = whole = 0
        last_hash = self._hash(boot_id, after)
        damage = ""
        rows = self._database.execute(
            "SELECT hash, body, seq, flush_end_seq FROM records WHERE boot_id = ? AND seq > ? ORDER BY seq LIMIT ?",
            (boot_id, after, limit),
        )
        try:
            for digest, body, seq, flush_end_seq in rows:
                if seq != after + len(links) + 1 or not continues(last_hash, digest, body):
                    damage = "it does not continue the chain"
                    break
                links.append(Link(digest, bytes(body)))
                last_hash = digest
                size_bytes += len(body)
                if seq == flush_end_seq:
                    whole = len(links)
                if size_bytes > MAX_PAGE_BODY_BYTES:
                    break
        except sqlite3.DatabaseError as error:
            damage = str(error)
        if damage and not links:
            raise Damaged(f"the journal is damaged at record {after + 1} of the boot {boot_id} ({damage})")
        return links if damage else links[: whole or len(links)]

    def close(self) -> None:
        """Give the file back."""
        self._database.close()
