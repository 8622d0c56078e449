"""Takes the journals that dead pods left on a volume into the ledger, by the way of every other record.

Owns whose a journal is: the worker's that the ledger knows by its uid, because Kubernetes told of it while it lived.
What is there already is known by its key, so a journal may be taken twice, and while its worker is asked, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpumeter_operator.adapters.journals import JournalFile, JournalUnreadable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.gaps import NO_CONTINUATION
from gpumeter_operator.flow.collect import Collector, Execute

NOWHERE = Target("", "")  # a file has no address and asks for no token


@dataclass(frozen=True, slots=True)
class Leftover:
    """What became of one journal. `reason` is "" where all of it is in the ledger now."""

    path: Path
    records: int
    reason: str
    message: str


async def take_journal(
    path: Path, ledger: Ledger, execute: Execute, clock_ns: Callable[[], int], *, over_gaps: bool = False
) -> Leftover:
    """Commit everything in a journal that is not in the ledger; what is missing before it is given up only where its
    chain may go on `over_gaps`: an older copy of the same journal may still hold it. Raises LedgerUnavailable."""
    try:
        journal = JournalFile(path, over_gaps=over_gaps)
    except JournalUnreadable as problem:
        return Leftover(path, 0, "JournalUnreadable", str(problem))
    try:
        pod = await execute(lambda: ledger.pod(journal.worker_uid))
        if pod is None:
            message = (
                f"The ledger knows no worker {journal.worker_uid:.64} (of {journal.service:.128}), so nobody "
                f"says whose {path} is; nothing of it is taken."
            )
            return Leftover(path, 0, "WorkerUnknown", message)
        collector = Collector(ledger, journal, execute, clock_ns)
        whole = await collector.pull(pod.worker, NOWHERE)
        taken, name = collector.counters.records, f"{pod.worker.namespace}/{pod.worker.pod}"
        if whole:
            return Leftover(path, taken, "", f"Pod {name}: {taken} records were taken from {path}.")
        if collector.counters.ledger_problem:
            return Leftover(path, taken, "LedgerUnavailable", collector.counters.ledger_problem)
        after = await execute(lambda: ledger.pod(journal.worker_uid))
        why = after.problem if after else ""
        advice = ""
        if not over_gaps and NO_CONTINUATION in why:
            why = why.replace(NO_CONTINUATION, "")
            advice = " Take an older copy of this journal; where there is none, give --over-gaps."
        message = f"Pod {name}: after {taken} records {path} was refused: {why}.{advice}"
        return Leftover(path, taken, "JournalRefused", message)
    finally:
        journal.close()
