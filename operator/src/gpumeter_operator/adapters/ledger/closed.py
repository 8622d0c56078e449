"""How far a service is closed, and how many facts there are: what a writer asks within its transaction.

Owns these questions, so that whoever folds and whoever keeps asks the same ones. Changes nothing.
"""

from sqlalchemy import Connection, bindparam, func, select

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_usage.period import Granularity

FactsVersion = tuple[int, int, int]
"""How many facts a fold was made from. Facts only grow, so an equal count is an equal set."""


def last_final_ns(connection: Connection, namespace: str, service: str) -> int:
    """The end of the last Final period of a service, inside a transaction.

    A Final day or month counts: what comes late for an hour of it in which nobody was known to live is booked after it.
    """
    of_service = {"namespace": namespace, "service": service}
    last_ns = int(connection.scalar(_LAST_FINAL, of_service) or 0)
    return max(last_ns, last_sum_ns(connection, namespace, service))


def last_sum_ns(connection: Connection, namespace: str, service: str, granularity: Granularity | None = None) -> int:
    """The end of the last Final day or month of a service, of either kind or of one; 0 where there is none."""
    of = {"namespace": namespace, "service": service}
    if granularity is None:
        return int(connection.scalar(_LAST_SUM, of) or 0)
    return int(connection.scalar(_LAST_SUM_OF_KIND, of | {"granularity": granularity.value}) or 0)


# Asked once a service and page: to build them each time would cost more than to ask them.
_LAST_FINAL = select(func.max(t.reports.c.period_end_ns)).where(
    t.reports.c.namespace == bindparam("namespace"),
    t.reports.c.service == bindparam("service"),
    t.reports.c.tenant == PLATFORM,
    t.reports.c.phase == Phase.FINAL.value,
)
_LAST_SUM = select(func.max(t.rollups.c.period_end_ns)).where(
    t.rollups.c.namespace == bindparam("namespace"),
    t.rollups.c.service == bindparam("service"),
)
_LAST_SUM_OF_KIND = _LAST_SUM.where(t.rollups.c.granularity == bindparam("granularity"))


def facts_version(connection: Connection, namespace: str, service: str, end_ns: int) -> FactsVersion:
    """The counts of records, container events, and adjustments with corrections, inside a transaction."""
    uids = select(t.workers.c.worker_uid).where(t.workers.c.namespace == namespace, t.workers.c.service == service)
    counts = (
        select(func.count()).where(
            t.records.c.service == f"{namespace}/{service}", t.records.c.booked_end_ns == end_ns
        ),
        select(func.count()).where(t.containers.c.worker_uid.in_(uids)),
        select(func.count()).where(t.adjustments.c.namespace == namespace, t.adjustments.c.service == service),
    )
    first, second, third = (int(connection.scalar(count) or 0) for count in counts)
    return first, second, third + corrections_count(connection, namespace, service)


def corrections_count(connection: Connection, namespace: str, service: str) -> int:
    """How many corrections of a service there are, inside a transaction."""
    c = t.corrections.c
    return int(connection.scalar(select(func.count()).where(c.namespace == namespace, c.service == service)) or 0)
