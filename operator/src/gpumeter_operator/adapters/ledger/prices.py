"""Which price plan a period was reckoned with: the versions that were seen, and how the service was billed.

Owns the queries for it and the table `period_terms`. Interprets no plan beyond reading it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, and_, exists, func, insert, literal, or_, select
from sqlalchemy.exc import IntegrityError

from gpumeter_operator.adapters.ledger import tables as t
from gpumeter_operator.adapters.ledger.engine import reading, writing
from gpumeter_operator.billing.plan_status import SeenVersion
from gpumeter_operator.billing.stretches import holds_from_ns
from gpumeter_operator.billing.tariff import BillingMode, PeriodPlan, PlanInvalid, PricePlan, Terms, Version, plan_from
from gpumeter_usage.period import Period


def keep_terms(engine: Engine, service: tuple[str, str], period: Period, terms: Terms) -> None:
    """Keep how a service is billed in a period, once; the first to say it is believed. Raises LedgerUnavailable."""
    p = t.period_terms.c
    key = {"namespace": service[0], "service": service[1], "end_ns": period.end_ns}
    values = key | {"billing_mode": terms.billing_mode.value, "owner": terms.owner}
    known = exists().where(*(p[name] == value for name, value in key.items()))
    row = select(*(literal(value).label(name) for name, value in values.items())).where(~known)
    try:
        with writing(engine) as connection:
            connection.execute(insert(t.period_terms).from_select(list(values), row))
    except IntegrityError:
        return  # another collector said it in the same moment


def last_terms(engine: Engine, service: tuple[str, str]) -> Terms:
    """How a service was billed in its latest period; as measured where it had none. Raises LedgerUnavailable."""
    p = t.period_terms.c
    latest = select(p.billing_mode, p.owner).where(p.namespace == service[0], p.service == service[1])
    with reading(engine) as connection:
        row = connection.execute(latest.order_by(p.end_ns.desc()).limit(1)).one_or_none()
    return Terms() if row is None else Terms(BillingMode(row.billing_mode), row.owner)


def seen_versions(engine: Engine, name: str) -> list[SeenVersion]:
    """The two newest versions of a price plan that were seen, the newest last. Raises LedgerUnavailable."""
    o, p = t.plan_observations.c, t.price_plans.c
    both = and_(p.name == o.name, p.hash == o.hash)
    query = select(p.version, p.hash, p.spec, o.observed_ns).select_from(t.plan_observations.join(t.price_plans, both))
    with reading(engine) as connection:
        rows = connection.execute(query.where(o.name == name).order_by(o.observed_ns.desc(), o.id.desc()).limit(2))
        return [SeenVersion(row.version, row.hash, row.spec, row.observed_ns) for row in rows][::-1]


def newest_hashes(engine: Engine) -> dict[str, str]:
    """By name, the hash of the version of each price plan that was seen last; "" where it was gone then. Raises
    LedgerUnavailable."""
    o = t.plan_observations.c
    with reading(engine) as connection:
        rows = connection.execute(select(o.name, o.hash).order_by(o.observed_ns, o.id))
        return {row.name: row.hash for row in rows}


def in_force(connection: Connection, name: str, at_ns: int, until_ns: int | None = None) -> tuple[str, int] | None:
    """(hash, when it was seen) of the version of a price plan that was in force at a time, as far as anyone saw; ""
    where the plan was deleted then. Where nothing had been seen of it yet: the first that was seen after, up to
    `until_ns`. None where there is neither."""
    o = t.plan_observations.c
    newest = select(o.hash, o.observed_ns).where(o.name == name, o.observed_ns <= at_ns)
    row = connection.execute(newest.order_by(o.observed_ns.desc(), o.id.desc()).limit(1)).one_or_none()
    if row is None and until_ns is not None:
        first = select(o.hash, o.observed_ns).where(o.name == name, o.observed_ns <= until_ns)
        row = connection.execute(first.order_by(o.observed_ns, o.id).limit(1)).one_or_none()
    return None if row is None else (row.hash, row.observed_ns)


def period_plan(connection: Connection, namespace: str, service: str, end_ns: int) -> PeriodPlan | None:
    """The price plan of a period with all versions that price what is booked in it; None where it was not opened."""
    p = t.periods.c
    of_service = and_(p.namespace == namespace, p.service == service)
    row = connection.execute(select(t.periods).where(of_service, p.end_ns == end_ns)).one_or_none()
    if row is None:
        return None
    a, c = t.adjustments.c, t.corrections.c
    late = select(a.closed_end_ns).where(a.namespace == namespace, a.service == service, a.booked_end_ns == end_ns)
    priced_ns = func.coalesce(c.part_start_ns, c.closed_start_ns)
    by_hand = exists().where(c.namespace == namespace, c.service == service, c.booked_end_ns == end_ns)
    belated = or_(p.end_ns.in_(late), by_hand.where(p.start_ns <= priced_ns, priced_ns < p.end_ns))
    closed = select(t.periods).where(of_service, p.end_ns < end_ns, belated).order_by(p.end_ns)
    own, as_of_ns = _versions(connection, row)
    opened_with, _ = _read(connection, row.plan_name, {row.plan_hash}).get(row.plan_hash, (None, ""))
    earlier: list[Version] = []
    for each in connection.execute(closed):
        billed = _terms(connection, each)
        earlier += [replace(version, terms=billed) for version in _versions(connection, each)[0]]
    return PeriodPlan(row.plan_name, opened_with, as_of_ns, (*earlier, *own), _terms(connection, row))


def _terms(connection: Connection, period: Row[Any]) -> Terms:
    """How the service was billed in a period (a row of `periods`); an older ledger knows of one way only."""
    p = t.period_terms.c
    of_period = and_(p.namespace == period.namespace, p.service == period.service, p.end_ns == period.end_ns)
    stated = connection.execute(select(p.billing_mode, p.owner).where(of_period)).one_or_none()
    return Terms() if stated is None else Terms(BillingMode(stated.billing_mode), stated.owner)


def _versions(connection: Connection, period: Row[Any]) -> tuple[list[Version], int]:
    """The versions of a plan in a period (a row of `periods`) from its start on, and when the first of them was seen.

    A plan that is deleted prices the period to its end: a promise is not shortened by taking it away.
    """
    name, base, start_ns, end_ns = period.plan_name, period.plan_hash, period.start_ns, period.end_ns
    known = in_force(connection, name, start_ns, period.opened_ns)
    as_of_ns = period.opened_ns if known is None or known[0] != base else max(start_ns, known[1])
    o = t.plan_observations.c
    later = select(o.hash, o.observed_ns).where(
        o.name == name, o.hash != "", o.observed_ns > as_of_ns, o.observed_ns < end_ns
    )
    seen: dict[int, str] = {start_ns: base}
    for row in connection.execute(later.order_by(o.observed_ns, o.id)):
        # Of several within a minute the last; a period may be opened a moment before it begins.
        seen[max(start_ns, holds_from_ns(row.observed_ns))] = row.hash
    held = [(from_ns, digest) for from_ns, digest in seen.items() if from_ns < end_ns]
    plans = _read(connection, name, {digest for _, digest in held})
    found: list[Version] = []
    for from_ns, digest in held:
        plan, problem = plans.get(digest, (None, ""))
        if not found or found[-1].plan != plan or found[-1].problem != problem:
            found.append(Version(from_ns, plan, problem))
    return found, as_of_ns


def _read(connection: Connection, name: str, digests: Iterable[str]) -> dict[str, tuple[PricePlan | None, str]]:
    p = t.price_plans.c
    found: dict[str, tuple[PricePlan | None, str]] = {}
    for row in connection.execute(select(p.hash, p.version, p.spec).where(p.name == name, p.hash.in_(digests))):
        try:
            found[row.hash] = (plan_from(name, row.version, row.spec), "")
        except PlanInvalid as problem:
            found[row.hash] = (None, str(problem))
    return found
