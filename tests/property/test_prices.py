"""Amounts add up: whatever is used, idle, allocated and charged, in however many parts."""

from decimal import Decimal
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumeter_operator.billing.charges import ChargeKind, PodStretch, bills, price
from gpumeter_operator.billing.facts import PLATFORM, Line, Worker
from gpumeter_operator.billing.stretches import stretches
from gpumeter_operator.billing.tariff import (
    AMOUNT_STEP,
    BillingMode,
    PeriodPlan,
    PricePlan,
    Terms,
    Version,
    canonical_spec,
    plan_from,
    rounded,
)
from gpumeter_usage.period import MINUTE_NS, Granularity, period_of, rfc3339
from gpumeter_usage.record import Account, Kind
from rigs.thoroughness import examples

PERIOD = period_of(1_795_258_800 * 10**9, Granularity.HOUR)
CLASSES = ("h100", "h100.1g.10gb", "cpu")
TENANTS = ("acme", "beta", "gamma")
HALF = Fraction(AMOUNT_STEP) / 2

prices = st.decimals(min_value=0, max_value=10**6, places=12).map(lambda value: format(value, "f"))
minutes = st.integers(0, 59).map(lambda minute: PERIOD.start_ns + minute * MINUTE_NS)
times = st.integers(0, 10**13)


@st.composite
def plans(draw: st.DrawFn) -> PricePlan:
    since = draw(st.lists(minutes, max_size=3, unique=True))

    def of_class(name: str) -> list[dict[str, str]]:
        later = [{"gpuClass": name, "perGpuHour": draw(prices), "effectiveFrom": rfc3339(at_ns)} for at_ns in since]
        return [{"gpuClass": name, "perGpuHour": draw(prices)}, *later]

    tokens = {"perThousandPromptTokens": draw(prices), "perThousandCompletionTokens": draw(prices)}
    part = f"1/{draw(st.integers(2, 7))}"
    spec = {
        "currency": "USD",
        "rates": [*of_class("h100"), *of_class("cpu"), {"gpuClass": "h100.1g.10gb", "of": "h100", "fraction": part}],
        "standardRates": [{"model": "m", **tokens}],
        "idlePayer": draw(st.sampled_from(["platform", "tenant", "owner"])),
    }
    return plan_from("default", draw(st.integers(1, 9)), canonical_spec(spec))


@st.composite
def hours(draw: st.DrawFn) -> tuple[PeriodPlan, tuple[PodStretch, ...]]:
    versions = [Version(PERIOD.start_ns, draw(plans()))]
    for from_ns in sorted(draw(st.lists(minutes.filter(lambda at: at > PERIOD.start_ns), max_size=2, unique=True))):
        versions.append(Version(from_ns, draw(plans())))
    terms = Terms(draw(st.sampled_from(BillingMode)), draw(st.sampled_from(["", "acme", "delta"])))
    plan = PeriodPlan("default", versions[0].plan, PERIOD.start_ns, tuple(versions), terms)
    parts = []
    for number in range(draw(st.integers(1, 3))):
        worker = Worker(f"uid-{number}", "n", "s", "svc", "m", draw(st.sampled_from(CLASSES)), 1, f"pod-{number}")
        for stretch in stretches(plan, PERIOD):
            used = {tenant: draw(times) for tenant in draw(st.sets(st.sampled_from(TENANTS)))}
            lines = [line(Kind.SESSION, Account.ATTRIBUTED, tenant, gpu_ns) for tenant, gpu_ns in used.items()]
            lines += [line(Kind.ACCOUNT, Account.IDLE, "", draw(times)), line(Kind.ACCOUNT, Account.LOAD, "", 7)]
            parts.append(PodStretch(worker, stretch, draw(times), tuple(lines)))
    return plan, tuple(parts)


def line(kind: Kind, account: Account, tenant: str, gpu_ns: int) -> Line:
    counts = {"prompt_tokens": gpu_ns % 1000, "cached_tokens": gpu_ns % 7, "completion_tokens": gpu_ns % 313}
    return Line("uid", "boot", kind, account, tenant, "cuda", 1, 1, 1, gpu_ns=gpu_ns, **counts)


@settings(deadline=None, max_examples=examples(60))
@given(hours())
def test_every_nanosecond_and_every_part_of_a_cent_stands_on_one_bill(
    hour: tuple[PeriodPlan, tuple[PodStretch, ...]],
) -> None:
    plan, parts = hour
    found = bills(parts, plan, PERIOD)
    assert sum(bill.gpu_ns for bill in found.values()) == sum(part.allocated_ns for part in parts)
    whole = Fraction(0)
    for part in parts:
        version = part.stretch.version.plan
        each = version and version.hour_price(part.worker.gpu_class, part.stretch.start_ns)
        assert each is not None
        whole += each.of_time(part.allocated_ns)
    amounts = [price(bill, plan, PERIOD).amount for bill in found.values()]
    exact = [charge.exact for bill in found.values() for charge in bill.charges if charge.counted]
    assert None not in exact
    assert sum(exact, Fraction(0)) == whole, "before the one rounding the bills are the price of what was allocated"
    total = sum((Fraction(amount) for amount in amounts if amount is not None), Fraction(0))
    assert abs(total - whole) <= HALF * len(amounts), "each bill is rounded once"


@settings(deadline=None, max_examples=examples(60))
@given(hours())
def test_a_bill_is_the_sum_of_its_charges_rounded_once_and_never_negative_for_a_tenant(
    hour: tuple[PeriodPlan, tuple[PodStretch, ...]],
) -> None:
    plan, parts = hour
    for tenant, bill in bills(parts, plan, PERIOD).items():
        of = price(bill, plan, PERIOD)
        assert of.amount is not None
        counted = [charge for charge in bill.charges if charge.counted]
        shown = sum((Fraction(rounded(charge.exact or Fraction(0))) for charge in counted), Fraction(0))
        assert abs(shown - Fraction(of.amount)) <= HALF * (len(counted) + 1)
        assert of.amount == of.amount.quantize(AMOUNT_STEP)
        if tenant != PLATFORM:
            assert of.amount >= 0
            assert bill.idle_ns >= 0
            assert all(charge.kind in (ChargeKind.USAGE, ChargeKind.IDLE, ChargeKind.TOKENS) for charge in bill.charges)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_the_one_rounding_is_half_to_even(numerator: int, denominator: int) -> None:
    exact = Fraction(numerator, denominator)
    found = rounded(exact)
    off = abs(Fraction(found) - exact)
    assert off <= HALF
    if off == HALF:
        assert int(Fraction(found) * 10**12) % 2 == 0
    assert rounded(Fraction(5, 10**13)) == Decimal(0)
    assert rounded(Fraction(15, 10**13)) == Decimal("0.000000000002")
