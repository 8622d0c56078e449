"""Books a correction by hand: gathers what the ledger knows of the report, lets billing decide, keeps it once.

Owns the order in which that is read, so that what is decided still holds when it is kept. Changes no report; the
collector's next round shows the correction in those of the period in which it is booked.
"""

import json
from collections.abc import Container

from gpumeter_operator.adapters.ledger import audit, corrections, prices
from gpumeter_operator.adapters.ledger.corrections import FinalReport
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.rollups import final_body
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.correct import (
    Closed,
    CorrectionRefused,
    Priced,
    Wanted,
    decide,
    meant,
    refuse_booked,
    refuse_wish,
)
from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.tariff import PeriodPlan
from gpumeter_operator.flow.close import DEFAULT_PLAN
from gpumeter_usage.tenant import tenant_problem

NOTHING_BILLED = {"gpuNanoseconds": "0", "tokens": {"prompt": 0, "cached": 0, "completion": 0}}
"""The status of who has no report."""


def book(ledger: Ledger, wanted: Wanted, now_ns: int) -> Priced:
    """Keep a correction, and return it. Raises CorrectionRefused, with nothing kept."""
    while True:
        of = final_report_of(ledger, wanted)
        made_from = corrections.version(ledger, of.namespace, of.service)  # before anything that is decided from
        priced = weigh(ledger, wanted, now_ns)
        if corrections.keep(ledger, priced.correction, made_from=made_from):
            return priced


def weigh(reader: Reader, wanted: Wanted, now_ns: int) -> Priced:
    """The correction as it would be booked now; keeps nothing. Raises CorrectionRefused."""
    refuse_wish(wanted)
    of = final_report_of(reader, wanted)
    schedule, service = reader.schedule(), (of.namespace, of.service)
    booked_end_ns = corrections.next_open(reader, *service, now_ns)
    bodies = {tenant: body for tenant, _, body, _ in audit.reports_of_period(reader.engine, *service, of.end_ns)}
    tenant = wanted.tenant or of.tenant
    _refuse_tenant(wanted, of, bodies)
    closed = Closed(
        service=of.service,
        tenant=tenant,
        report_digest=of.digest,
        status=NOTHING_BILLED if wanted.tenant else json.loads(of.body)["status"],
        platform=json.loads(bodies[PLATFORM])["status"],
        period=schedule.period_of(of.end_ns),
        plan=reader.period_plan(*service, of.end_ns) or PeriodPlan(DEFAULT_PLAN, None),
        gpu_classes=corrections.gpu_classes(reader, *service, of.end_ns),
        models=corrections.models(reader, *service, of.end_ns),
        booked_end_ns=booked_end_ns,
        booked_currency=_currency(reader, service, booked_end_ns),
    )
    earlier = corrections.of_service(reader, *service)
    wanted = meant(wanted, closed, earlier)
    refuse_booked(corrections.of_ids(reader, wanted.ids))
    return decide(wanted, closed, earlier, now_ns)


def _currency(reader: Reader, service: tuple[str, str], end_ns: int) -> str:
    """Of the period's plan; of the version of the service's last plan that is in force where it is not opened yet."""
    opened = reader.period_plan(*service, end_ns)
    if opened is not None:
        return "" if opened.plan is None else opened.plan.currency
    last = reader.last_plan_name(*service)
    newest = prices.newest_hashes(reader.engine).get(last or "", "")  # versions may go back, by their numbers
    spec = next((spec for name, digest, spec in reader.kept_plans() if (name, digest) == (last, newest)), None)
    return "" if spec is None else str(json.loads(spec)["currency"])


def _refuse_tenant(wanted: Wanted, of: FinalReport, bodies: Container[str]) -> None:
    """Raise CorrectionRefused where the tenant that is said has a report to be named, or is none."""
    if not wanted.tenant:
        return
    if wanted.tenant in bodies or of.tenant != PLATFORM:
        raise CorrectionRefused(
            "WhichTenant",
            f"--tenant is for who has no report of the period of {wanted.report}, which is the platform's then. "
            f"{wanted.tenant:.60} has one, or this is another tenant's; name the report of who is corrected, alone.",
        )
    if problem := tenant_problem(wanted.tenant):
        raise CorrectionRefused("TenantInvalid", f"{problem}.")


def final_report_of(reader: Reader, wanted: Wanted) -> FinalReport:
    """The report that a wish names. Raises CorrectionRefused where it is none that can be corrected."""
    found = corrections.final_report(reader, wanted.namespace, wanted.report)
    if found is not None:
        return found
    if final_body(reader.engine, wanted.namespace, wanted.report) is not None:
        raise CorrectionRefused(
            "SumOfReports",
            f"{wanted.report} is of a day or month, the sum of shorter reports; name the one that is wrong.",
        )
    raise CorrectionRefused(
        "NoFinalReport",
        f"The ledger has no Final report {wanted.report:.120} in the namespace {wanted.namespace:.120}. A period that "
        "is not Final yet needs no correction; a tenant without a report of that period is billed by --tenant and the "
        "platform's report of it. `kubectl get usagereports -A` lists the names.",
    )
