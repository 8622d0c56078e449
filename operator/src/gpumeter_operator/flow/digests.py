"""Makes the digests that are due and exports them.

Owns when a digest is made (as soon as a period is Final), how far back facts are looked for, and that what is in the
ledger is in the file. Decides nothing about what a digest says.
"""

import logging
from functools import partial
from pathlib import Path

from gpumeter_operator.adapters import digest_file
from gpumeter_operator.adapters.digest_file import FileUnusable
from gpumeter_operator.adapters.ledger import digests
from gpumeter_operator.adapters.ledger.digests import LATE_NS, Due
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.digest import entry_of
from gpumeter_operator.billing.signing import SigningKey
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import rfc3339

log = logging.getLogger(__name__)

DIGESTS_PER_ROUND = 30
"""A round must end while its liveness is watched; the next one goes on."""


class Digester:
    """Makes digests, a bounded number a round. Without a key it makes none, and says so once."""

    def __init__(self, ledger: Reader, execute: Execute, key: SigningKey | None, file: Path | None) -> None:
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
            await self._export(self._file)

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

    async def _export(self, file: Path) -> None:
        try:
            await self._execute(partial(_catch_up, self._ledger, file))
        except FileUnusable as problem:
            if str(problem) != self._file_problem:
                log.error("%s", problem)
            self._file_problem = str(problem)
        else:
            self._file_problem = ""


def _catch_up(ledger: Reader, file: Path) -> int:
    newest = digests.last_made(ledger.engine)
    if newest is None:
        return 0
    written = digest_file.last_seq(file)
    if written >= entry_of(newest.body).seq:
        return 0
    return digest_file.append(file, (each.digest for each in digests.kept(ledger.engine, written)))
