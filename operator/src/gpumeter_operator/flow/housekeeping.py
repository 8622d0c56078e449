"""The ledger's housekeeping: makes days before they are needed, removes what retention lets go, and says so.

Owns when that happens. What may go is decided by the ledger, and once more by its database.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from gpumeter_operator.adapters.ledger.days import day_end_ns
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.retention import Removed, remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import rfc3339

log = logging.getLogger(__name__)

EVERY_S = 3600.0  # a day that may go is found within the hour, and midnight's partition is made a day ahead


async def keep_house(
    ledger: Ledger, retention_days: int, execute: Execute, clock_ns: Callable[[], int], stop: asyncio.Event
) -> None:
    """Once at the start and once an hour, until `stop`. What fails is tried again in an hour, and is loud."""
    while not stop.is_set():
        try:
            await clean_up(ledger, retention_days, execute, clock_ns())
        except LedgerUnavailable as problem:
            log.error("%s Old records are removed later.", problem)
        except Exception:
            log.exception("The ledger's housekeeping failed.")
        with suppress(TimeoutError):
            async with asyncio.timeout(EVERY_S):
                await stop.wait()


async def clean_up(ledger: Ledger, retention_days: int, execute: Execute, now_ns: int) -> list[Removed]:
    """One round; returns what was removed. Raises LedgerUnavailable."""
    await execute(partial(ledger.days.make, [day_end_ns(now_ns)]))
    removed = await execute(partial(remove_old, ledger, retention_days, now_ns))
    for day in removed:
        log.info(
            "RecordsRemoved: %d records of %d chains, of the day that ended %s, were older than %d days; what went "
            "stands in the table removals.",
            day.records,
            day.chains,
            rfc3339(day.day_end_ns),
            retention_days,
        )
    return removed
