"""docs/price-plans.md says what the product does: each of its plans bills the hour that it describes, in a ledger."""

import re
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from devcluster.layout import REPOSITORY
from gpumeter_operator.billing.tariff import BillingMode, IdlePayer, PlanInvalid, Terms, canonical_spec, plan_from
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account
from rigs.ledger import FakeWorker
from rigs.pricing import PricedHour, at

TEXT = (REPOSITORY / "docs/price-plans.md").read_text()
EXAMPLES = dict(re.findall(r"^### Example: (.+?)\n(.+?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE))
PLANS = sorted((REPOSITORY / "examples").glob("priceplan*.yaml"))


def the_hour(fake: FakeWorker) -> None:
    """What the document says of it."""
    fake.spend(Account.LOAD, at(5))
    fake.serve("s-1", "acme", at(25))
    fake.serve("s-2", "beta", at(35))
    fake.spend(Account.IDLE, at(50))
    fake.serve("s-3", "acme", at(60))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_document_is_what_the_product_bills(tmp_path: Path, name: str) -> None:
    text = EXAMPLES[name]
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    owner = "".join(re.findall(r"pricing: \{owner: (\w+)\}", text))
    mode = BillingMode.STANDARD_RATE if "{billingMode: standardRate}" in text else BillingMode.MEASURED
    hour = PricedHour(tmp_path, Terms(mode, owner))
    hour.see(canonical_spec(yaml.safe_load(written)), 0)
    hour.pod(the_hour, gpu_class="h100.1g.10gb" if "class `h100.1g.10gb`" in text else "h100")
    found = {
        tenant: (
            str(int(status["gpuNanoseconds"]) // SECOND_NS),
            str(int(status.get("idleGpuNanoseconds", 0)) // SECOND_NS),
            status["amount"],
        )
        for tenant, status in hour.close().items()
    }
    table = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {tenant: tuple(cells) for tenant, *cells in table} == found
    assert sum(int(cells[1]) for cells in table) == 3600


def test_the_document_has_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) == 5
    plans = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
    assert {each.get("idlePayer", "platform") for each in plans} == set(IdlePayer)


def test_what_the_document_says_of_the_difference_adds_up() -> None:
    own, of_time, total, time, paid = (
        Decimal(figure)
        for figure in re.search(  # type: ignore[union-attr]
            r"The platform's ([\d.]+) are ([\d.]+) for its own time and ([\d.]+) of difference: tenants' time cost "
            r"([\d.]+), and they paid ([\d.]+)\.",
            " ".join(TEXT.split()),
        ).groups()
    )
    assert own == of_time + total
    assert total == time - paid


def test_every_reason_that_the_document_names_is_one_that_reports_have() -> None:
    source = (REPOSITORY / "operator/src/gpumeter_operator/billing/charges.py").read_text()
    told = set(re.findall(r"`([A-Z]\w+)`", TEXT.partition("condition `Priced` says")[2].partition("\n\n")[0]))
    assert told == set(re.findall(r'"([A-Z][a-z]+[A-Z]\w+)"', source))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_plan_among_the_examples_can_be_used(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        try:
            plan_from(manifest["metadata"]["name"], 1, canonical_spec(manifest["spec"]))
        except PlanInvalid as problem:
            pytest.fail(str(problem))
