"""Makes the digests that are due and exports them.

Owns when a digest is made (as soon as a period is Final), how far back facts are looked for, that what is in the
ledger is in the file, and what is done about a file that another state of the ledger wrote. Decides nothing about what
a digest says.
"""

import logging
from functools import partial
from pathlib import Path

from gpumeter_operator.adapters import digest_file
from gpumeter_operator.adapters.digest_file import FileUnusable
from gpumeter_operator.adapters.ledger import digests
from gpumeter_operator.adapters.ledger.digests import LATE_NS, Due
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.digest import Digest, entry_of
from gpumeter_operator.billing.signing import SigningKey
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import rfc3339

log = logging.getLogger(__name__)

DIGESTS_FORKED = "DigestsForked"

DIGESTS_PER_ROUND = 30
"""A round must end while its liveness is watched; the next one goes on."""


class Digester:
    """Makes digests, a bounded number a round. Without a key it makes none, and says so once."""

    def __init__(self, ledger: Ledger, execute: Execute, key: SigningKey | None, file: Path | None) -> None:
        self._ledger = ledger
        self._execute = execute
        self._key = key
        self._file = file
        self._key_kept = False
        self._behind_until_ns = 0
        self._swept = False  # whether this process has looked at all facts once
        self._file_problem = ""
        if key is None:
            log.warning(
                "No GPUMETER_SIGNING_KEY_FILE is set: no digests are made, and nothing shows if the ledger is changed."
            )

    async def run(self, now_ns: int) -> None:
        """One round. Raises LedgerUnavailable."""
        if self._key is not None:
            await self._make(self._key, now_ns)
        if self._file is not None:
            await self._export(self._file, now_ns)

    async def _make(self, key: SigningKey, now_ns: int) -> None:
        engine = self._ledger.engine
        if not self._key_kept:
            await self._execute(partial(digests.keep_key, engine, key, now_ns))
            self._key_kept = True
        services = await self._execute(self._ledger.services)
        waiting = await self._execute(partial(digests.due, engine, services))
        if not waiting:
            await self._make_behind(key, now_ns)
            return
        # The first of a round looks for facts; what does not fit into it goes into the next ones, or into some more.
        since_ns = await self._since_ns(waiting, now_ns) if self._swept else -1
        for made in range(DIGESTS_PER_ROUND):
            of = waiting[made] if made < len(waiting) else Due()
            entry = await self._execute(partial(digests.make, engine, of, key, now_ns, since_ns=since_ns))
            if entry is None:
                break  # all is covered, or another collector is at it
            if of.service:
                log.info(
                    "%s/%s: the period that ended %s has digest %d.",
                    of.namespace,
                    of.service,
                    rfc3339(of.end_ns),
                    entry.seq,
                )
        else:
            return  # there may be more facts than this: the next round looks at all of them again
        self._swept = True

    async def _make_behind(self, key: SigningKey, now_ns: int) -> None:
        """Where the clock is behind the last digest, the facts that come now seem older than it, as if they had been
        put in. They wait for no period to be Final: none of them stands uncovered for as long as clocks differ."""
        if now_ns < self._behind_until_ns or await self._last_made_ns() <= now_ns:
            return
        self._behind_until_ns = now_ns + LATE_NS // 4
        await self._execute(
            partial(digests.make, self._ledger.engine, Due(), key, now_ns, since_ns=now_ns - 2 * LATE_NS)
        )

    async def _since_ns(self, waiting: list[Due], now_ns: int) -> int:
        return min(await self._last_made_ns() - LATE_NS, now_ns - 2 * LATE_NS, waiting[0].start_ns)

    async def _last_made_ns(self) -> int:
        last = await self._execute(partial(digests.last_made, self._ledger.engine))
        return entry_of(last.body).made_ns if last else 0

    async def _export(self, file: Path, now_ns: int) -> None:
        try:
            await self._execute(partial(_catch_up, self._ledger, file, now_ns))
        except FileUnusable as problem:
            if str(problem) != self._file_problem:
                log.error("%s", problem)
            self._file_problem = str(problem)
        else:
            self._file_problem = ""


def _catch_up(ledger: Ledger, file: Path, now_ns: int) -> None:
    """Append what the file lacks. Where it ends with what this ledger never said (an older copy was put in its place,
    or it was cut off), nothing may follow on that: it is put aside as it is, an alarm says so, and a new one begins."""
    newest, last = digests.last_made(ledger.engine), digest_file.last(file)
    written = 0 if last is None else entry_of(last.body).seq
    if last is not None:
        own = digests.of_seq(ledger.engine, written)
        if own is None or own.digest != last.digest:
            aside = digest_file.aside(file, last)
            message = _forked(file, aside, last, own, newest)
            ledger.raise_alarm(DIGESTS_FORKED, "digests", message, now_ns)  # first: a crash now raises it once more
            log.error("%s: %s", DIGESTS_FORKED, message)
            digest_file.put_aside(file, aside)
            written = 0
    if newest is not None and written < entry_of(newest.body).seq:
        digest_file.append(file, (each.digest for each in digests.kept(ledger.engine, written)))


def _forked(file: Path, aside: Path, last: Digest, own: Digest | None, newest: Digest | None) -> str:
    number = entry_of(last.body).seq
    if own is not None:
        told = f"its digest {number} is {own.digest}"
    else:
        told = f"its last one is digest {entry_of(newest.body).seq}" if newest else "it has none"
    return (
        f"{file} ends with digest {number} {last.digest}, which this ledger did not make: {told}. An older copy of the "
        f"ledger was put in its place, or it was cut off. The file is kept as {aside.name}, and {file.name} is begun "
        f"anew. If nobody restored a copy, find out who changed the ledger; if somebody did, anchor the new file from "
        f"its first line on and keep both."
    )
