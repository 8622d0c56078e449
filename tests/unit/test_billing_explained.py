"""docs/billing-explained.md says what the product does: its figures are recomputed by the product's own functions from
what the document itself states, its script is run on a real ledger, and the tests that it names exist."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from devcluster.layout import REPOSITORY
from gpumeter_operator.adapters.ledger.days import DAY_NS
from gpumeter_operator.adapters.ledger.retention import remove_old
from gpumeter_operator.billing.accounts import fold
from gpumeter_operator.billing.close import Phase, Verdict
from gpumeter_operator.billing.correct import Wanted
from gpumeter_operator.billing.facts import PLATFORM, Line, Pod, Span, Tokens, Worker
from gpumeter_operator.billing.report import RECONCILED_PER_MILLE, PodPeriod, ServicePeriod, reports
from gpumeter_operator.billing.tariff import (
    HOUR_NS,
    BillingMode,
    PeriodPlan,
    Terms,
    canonical_spec,
    per_thousand,
    plain,
    plan_from,
)
from gpumeter_operator.cli.accounts import accounts
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.correct import book
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity, from_rfc3339, period_of
from gpumeter_usage.record import Account, Kind, Record
from gpumeter_worker.metering.attribution import Load, Profile, Rule, split
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker
from rigs.pricing import PricedHour, plan, rate

DOCUMENT = REPOSITORY / "docs/billing-explained.md"
SCRIPT = REPOSITORY / "docs/verify.py"
TEXT = DOCUMENT.read_text()
PERIOD = period_of(from_rfc3339("2026-11-21T15:00:00Z"), Granularity.HOUR)
STARTED_NS = from_rfc3339("2026-11-21T14:10:00Z")
COLUMNS = ["NAME", "TENANT", "SERVICE", "PERIOD", "SESSIONS", "GPU-SECONDS", "TOKENS", "AMOUNT", "CUR", "PHASE"]


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [block for named, block in fenced if named == language]


def rows_after(sentence: str) -> list[list[str]]:
    """The cells of the first table after a sentence, without its head."""
    _, found, rest = TEXT.partition(sentence)
    assert found, f"the document no longer says {sentence!r}"
    lines = re.search(r"((?:^\|.*\n)+)", rest, re.MULTILINE)
    assert lines
    return [[cell.strip(" *`") for cell in line.strip().strip("|").split("|")] for line in lines[1].splitlines()[2:]]


@pytest.mark.parametrize(
    "sentence",
    [
        "A step of 16,800,421 ns with a prompt of 512 tokens and two running answers:",
        "A step of 6,192,840 ns with the two answers:",
        "A step of 6,031,217 ns with one:",
    ],
)
def test_the_shares_in_the_document_are_those_of_the_products_split(sentence: str) -> None:
    profile = Profile("example", Rule.KNEE, **json.loads(blocks("json")[0]))
    duration_ns = int(re.findall(r"A step of ([0-9,]+) ns", sentence)[0].replace(",", ""))
    table = rows_after(sentence)
    shares = [int(share) for *_, share in table]
    assert split(duration_ns, [Load(int(new), int(context)) for _, new, context, _ in table], profile) == shares
    assert sum(shares) == duration_ns


def worked_example() -> list[dict]:  # type: ignore[type-arg]
    """The reports of the hour, from the document's accounts and tenants."""
    of = Worker("uid", "team-a", "smollm2", "svc", "smollm2", "h100", 1, "smollm2-x")
    accounts = {name: int(ns) for name, ns, _ in rows_after("These are its accounts, in nanoseconds:")}
    lines = [
        Line("uid", "boot", Kind.ACCOUNT, name, "", "cuda", 1, 1, 1, gpu_ns=ns)
        for name, ns in accounts.items()
        if name in Account.__members__.values()
    ]
    for tenant, requests, prompt, cached, answer, used_ns in rows_after("Two tenants used it:"):
        counts = {
            "sessions": int(requests),
            "gpu_ns": int(used_ns),
            "prompt_tokens": int(prompt),
            "cached_tokens": int(cached),
            "completion_tokens": int(answer),
        }
        lines.append(Line("uid", "boot", Kind.SESSION, Account.ATTRIBUTED, tenant, "cuda", 1, 1, 1, **counts))
    booked = fold(Pod(of, (Span("c", STARTED_NS),)), PERIOD, lines, until_ns=PERIOD.end_ns)
    assert booked.problems == (), "what tenants used is what the pod booked as attributed"
    assert booked.accounts.allocated == accounts["allocated"]
    assert booked.accounts.unaccounted == accounts["unaccounted"]
    spec = {"currency": "USD", "rates": [{"gpuClass": "h100", "perGpuHour": "2.50"}]}
    plan = PeriodPlan("default", plan_from("default", 1, canonical_spec(spec)), PERIOD.start_ns)
    verdict = Verdict(Phase.FINAL, "AllRecordsCommitted", "All records of 1 worker are in the ledger.", 1)
    pods = (PodPeriod(of, booked, tuple(lines)),)
    return list(reports(ServicePeriod("team-a", "smollm2", PERIOD, verdict, pods, plan, {})))


def as_printed(report: dict) -> list[str]:  # type: ignore[type-arg]
    spec, status = report["spec"], report["status"]
    return [
        report["metadata"]["name"],
        spec["tenant"],
        spec["serviceRef"]["name"],
        spec["period"]["start"],
        str(status["sessions"]),
        status["gpuSeconds"],
        str(status["tokens"]["total"]),
        status["amount"],
        status["currency"],
        status["phase"],
    ]


def test_the_bill_in_the_document_is_what_the_product_makes_of_its_accounts() -> None:
    (printed,) = [block for block in blocks("") if "kubectl get usagereports" in block]
    head, *lines = [line.split() for line in printed.splitlines()[1:]]
    assert head[:-1] == COLUMNS
    by_name = {report["metadata"]["name"]: as_printed(report) for report in worked_example()}
    assert {line[0]: line[:-1] for line in lines} == by_name


def test_the_columns_of_the_document_are_those_of_the_resource() -> None:
    crd = (REPOSITORY / "crds/usagereports.yaml").read_text()
    standing = re.findall(r"- \{name: ([A-Z0-9-]+), type: \w+, jsonPath: [\w.]+(?:, description: [^}]*)?\}", crd)
    assert standing == [*COLUMNS[1:], "AGE"]
    told = {name.strip() for cell, _ in rows_after("prints one line a tenant") for name in cell.split(",")}
    assert told == set(standing) - {"SERVICE", "AGE"}


def test_the_sums_that_the_document_draws_from_the_bill_are_right() -> None:
    made = {report["spec"]["tenant"]: report["status"] for report in worked_example()}
    seconds, price, hour, amount, per_1k = re.search(
        r"([\d.]+) s x ([\d.]+) USD / ([\d,]+) s = ([\d.]+) USD, or ([\d.]+) USD for each 1,000", TEXT
    ).groups()  # type: ignore[union-attr]
    assert (seconds, amount) == (made["acme"]["gpuSeconds"], made["acme"]["amount"])
    assert int(hour.replace(",", "")) * SECOND_NS == HOUR_NS
    assert per_1k == made["acme"]["pricePerThousandTokens"]
    assert per_1k == plain(per_thousand(Decimal(amount), made["acme"]["tokens"]["total"]))
    allocated_s, whole = re.search(r"price of ([\d,]+) GPU-seconds, ([\d.]+) USD", TEXT).groups()  # type: ignore[union-attr]
    assert int(allocated_s.replace(",", "")) * SECOND_NS == int(made[PLATFORM]["accounts"]["allocated"])
    exact = Fraction(int(allocated_s.replace(",", ""))) * Fraction(price) / 3600
    assert abs(exact - Fraction(whole)) <= Fraction(1, 2 * 10**12)
    total = sum(Decimal(status["amount"]) for status in made.values())
    assert abs(Fraction(total) - exact) <= Fraction(3, 2 * 10**12), "three amounts, each rounded once"


def test_every_field_of_a_record_is_in_the_document_and_no_other() -> None:
    told = {name for cell, _ in rows_after("These are the fields:") for name in re.findall(r"\w+", cell)}
    assert told == set(Record.__dataclass_fields__)


def test_the_script_that_the_document_links_is_there_and_of_the_length_it_says() -> None:
    told = re.search(r"\[verify\.py\]\((\S+)\), some (\d+) lines", " ".join(TEXT.split()))
    assert told
    assert DOCUMENT.parent / told[1] == SCRIPT
    assert abs(len(SCRIPT.read_text().splitlines()) - int(told[2])) < 20


def test_every_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    there = "\n".join(path.read_text() for path in (REPOSITORY / "tests").glob("*/test_billing_rules*.py"))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in there} == set()


def test_every_condition_that_the_document_explains_is_one_that_reports_have() -> None:
    stated = {each["type"] for report in worked_example() for each in report["status"]["conditions"]}
    told = {re.split(r"[=`]", cell)[0] for cell, _ in rows_after("### What the conditions of a report mean")}
    assert told == stated
    source = (REPOSITORY / "operator/src/gpumeter_operator/billing/report.py").read_text()
    for reason in ("UnaccountedTime", "SlicesDisagree", "HostClock"):
        assert reason in TEXT
        assert f'"{reason}"' in source


def test_the_limits_that_the_document_states_are_the_defaults() -> None:
    resource = (REPOSITORY / "crds/inferenceservices.yaml").read_text()
    values = (REPOSITORY / "charts/gpumeter/values.yaml").read_text()
    for sentence, default, text in (
        ("about 5 seconds later (`metering.checkpointInterval`)", r"checkpointInterval:.{,99}default: 5s", resource),
        ("for 60 seconds (`metering.leaseTimeout`)", r"leaseTimeout:.{,99}default: 60s", resource),
        ("the grace period (10 minutes, unless set otherwise)", r"closeGrace: 10m", values),
        ("(an hour, unless the installation says otherwise)", r"period: 1h", values),
    ):
        assert sentence in " ".join(TEXT.split())
        assert re.search(default, text, re.DOTALL), default
    assert "more than 0.1 % of `allocated`" in TEXT
    assert RECONCILED_PER_MILLE == 1


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Two pods of two services, two tenants, three minutes, all closed; one pod drained, one was killed."""
    path = tmp_path / "ledger.db"
    kept = open_ledger(path)
    for number, service in enumerate(("smollm2", "big"), start=1):
        fake = FakeWorker(worker(number, service=service), START_NS)
        fake.spend(Account.LOAD, START_NS + 10 * SECOND_NS)
        fake.serve("s-1", "acme", START_NS + 70 * SECOND_NS)
        fake.serve("s-2", "beta-corp", START_NS + 85 * SECOND_NS)
        fake.spend(Account.NONBILLABLE, START_NS + 90 * SECOND_NS)
        fake.spend(Account.HOST_GAP, START_NS + 95 * SECOND_NS)
        if number == 1:
            fake.seal()
        at_ns = START_NS + 130 * SECOND_NS
        kept.observe(fake.identity, [started("c", START_NS), ended("c", at_ns), gone(at_ns)], at_ns)
        kept.take(fake.identity, fake.page("boot-1", 0), at_ns)
    rates = [
        {"gpuClass": "h100", "perGpuHour": "2.50"},
        {"gpuClass": "h100", "perGpuHour": "9", "effectiveFrom": "2027-01-01T00:00:00Z"},
    ]
    plans = {"default": kept.keep_plan("default", 1, canonical_spec({"currency": "USD", "rates": rates}), START_NS)}
    Closer(kept, MINUTE_NS).close_all(Pricing({}, plans), START_NS + 10 * MINUTE_NS)
    kept.close()
    return path


def verify(ledger: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(SCRIPT, ledger.parent / "verify.py")
    return subprocess.run(
        [sys.executable, "-I", "verify.py", ledger.name], cwd=ledger.parent, capture_output=True, text=True, check=False
    )


def change(ledger: Path, table: str, statement: str) -> None:
    raw = sqlite3.connect(ledger)
    for name in (f"{table}_no_update", f"{table}_no_delete"):
        raw.execute(f"DROP TRIGGER IF EXISTS {name}")
    assert raw.execute(statement).rowcount > 0
    raw.commit()
    raw.close()


def test_the_auditors_script_finds_nothing_in_an_honest_ledger(ledger: Path) -> None:
    done = verify(ledger)
    assert (done.returncode, done.stderr) == (0, "")
    first, *until = done.stdout.splitlines()
    assert first == "all right: 2 chains, 6 closed periods"
    assert [line.split(": ", 1)[1] for line in until] == [
        "closed until 2026-11-21 10:03:00+00:00, 0 later periods with records"
    ] * 2


@pytest.fixture
def old_ledger(tmp_path: Path) -> Path:
    """A pod that served through midnight, its hours all Final; retention removed the records of its first day."""
    path = tmp_path / "ledger.db"
    kept = open_ledger(path, Granularity.HOUR)
    hour_ns = 60 * MINUTE_NS
    midnight_ns = START_NS // DAY_NS * DAY_NS + DAY_NS
    fake = FakeWorker(worker(), midnight_ns - hour_ns // 2)
    until_ns = midnight_ns + 2 * hour_ns
    kept.observe(fake.identity, [started("c", fake.frontier_ns)], until_ns)
    while fake.frontier_ns < until_ns:
        fake.serve(f"s-{fake.frontier_ns}", "acme", fake.frontier_ns + 300 * SECOND_NS)
        fake.spend(Account.IDLE, fake.frontier_ns + 300 * SECOND_NS)
    fake.seal()
    kept.observe(fake.identity, [ended("c", until_ns), gone(until_ns)], until_ns)
    kept.take(fake.identity, fake.page("boot-1", 0), until_ns)
    prices = canonical_spec({"currency": "USD", "rates": [{"gpuClass": "h100", "perGpuHour": "2.50"}]})
    plans = {"default": kept.keep_plan("default", 1, prices, START_NS)}
    Closer(kept, MINUTE_NS).close_all(Pricing({}, plans), until_ns + 4 * hour_ns)
    [removed] = remove_old(kept, 90, midnight_ns + 90 * DAY_NS)
    assert removed.records
    kept.close()
    return path


def test_the_auditors_script_finds_nothing_in_an_honest_ledger_after_retention(old_ledger: Path) -> None:
    done = verify(old_ledger)
    assert (done.stdout.splitlines()[0], done.stderr) == ("all right: 1 chains, 2 closed periods", "")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("table", "statement", "told"),
    [
        ("records", "DELETE FROM records WHERE seq = (SELECT MIN(seq) FROM records)", "the chain breaks here"),
        ("records", "DELETE FROM records", "does not end where the collector left it"),
        ("removals", "DELETE FROM removals", "the chain breaks here"),
        ("removals", "UPDATE removals SET last_hash = 'forged'", "the chain breaks here"),
        ("pod_accounts", "UPDATE pod_accounts SET unaccounted = unaccounted - 1", "the accounts do not add up"),
    ],
)
def test_the_auditors_script_finds_what_was_changed_beside_a_removal(
    old_ledger: Path, table: str, statement: str, told: str
) -> None:
    change(old_ledger, table, statement)
    done = verify(old_ledger)
    assert (done.returncode, told in done.stdout) == (1, True), done.stdout


@pytest.mark.parametrize(
    ("terms", "changes"),
    [
        (Terms(), {"idlePayer": "platform"}),
        (Terms(), {"idlePayer": "tenant"}),
        (Terms(owner="delta"), {"idlePayer": "owner"}),
        (Terms(BillingMode.STANDARD_RATE), {"idlePayer": "tenant"}),
    ],
)
def test_the_auditors_script_agrees_with_every_way_of_charging(
    tmp_path: Path, terms: Terms, changes: dict[str, str]
) -> None:
    """Rates and versions change within the hour, one pod is a slice, and one is collected when its hour is closed."""
    tokens = {"model": "smollm2", "perThousandPromptTokens": "0.10", "perThousandCompletionTokens": "1"}
    part = {"gpuClass": "h100.1g.10gb", "of": "h100", "fraction": "1/7"}
    first = plan(rate("3.60"), rate("7.20", 10), part, standardRates=[tokens], **changes)
    dearer = tokens | {"perThousandCompletionTokens": "3"}
    second = plan(rate("9"), rate("11", 40), part, standardRates=[dearer], **changes)
    hour = PricedHour(tmp_path, terms, Granularity.FIFTEEN_MINUTES)
    hour.see(first, 0)
    hour.run(0)

    def live(fake: FakeWorker) -> None:
        fake.spend(Account.LOAD, START_NS + 100 * SECOND_NS)
        fake.serve("s-1", "acme", START_NS + 1234 * SECOND_NS + 567)
        fake.spend(Account.IDLE, START_NS + 1500 * SECOND_NS)
        fake.serve("s-2", "beta", START_NS + 1777 * SECOND_NS)

    late = hour.pod(live, collect=False)
    hour.run(16.5)  # the first quarter is closed without it
    hour.see(second, 22.5)
    hour.pod(live, number=2, gpu_class="h100.1g.10gb")
    hour.collect(late, START_NS + 61 * MINUTE_NS)
    hour.close()
    if terms.billing_mode is BillingMode.MEASURED:
        wanted = Wanted("team-a", "smollm2-acme-20261121t1015", -(10**12) // 7, "Less.", "alice", gpu_class="h100")
        for minute, gpu_ns in ((0, wanted.gpu_ns), (10, wanted.gpu_ns // 3)):  # that quarter's, and what came late
            part = replace(wanted, gpu_ns=gpu_ns, part_start_ns=START_NS + minute * MINUTE_NS)
            book(hour.ledger, part, START_NS + 66 * MINUTE_NS)
    else:
        back = Wanted("team-a", "smollm2-acme-20261121t1015", 0, "Less.", "alice", tokens=Tokens(-7, 0, -11))
        billed = replace(back, tokens=Tokens(9, 4, 2), part_start_ns=START_NS + 23 * MINUTE_NS)
        for correction in (back, billed):
            book(hour.ledger, correction, START_NS + 66 * MINUTE_NS)
    hour.run(80)
    hour.ledger.close()
    done = verify(tmp_path / "ledger.db")
    assert (done.stdout.splitlines()[0], done.stderr) == ("all right: 2 chains, 5 closed periods", "")


@pytest.mark.parametrize(
    ("table", "statement", "told"),
    [
        (
            "records",
            "UPDATE records SET body = CAST(replace(body, 'acme', 'evil') AS BLOB) WHERE seq = 2",
            "the chain breaks here",
        ),
        ("records", "DELETE FROM records WHERE seq = 3", "the chain breaks here"),
        ("records", "DELETE FROM records WHERE kind = 'seal'", "does not end where the collector left it"),
        ("pod_accounts", "UPDATE pod_accounts SET unaccounted = unaccounted - 1", "the accounts do not add up"),
        ("pod_accounts", "UPDATE pod_accounts SET load = load - 1, idle = idle + 1", "nonbillable work is not what"),
        ("pod_accounts", "UPDATE pod_accounts SET idle = idle + 1, drain = drain - 1", "idle or drain is not what"),
        (
            "reports",
            """UPDATE reports SET body = CAST(replace(body, '"gpuNanoseconds":"15', '"gpuNanoseconds":"16') AS BLOB)
               WHERE tenant = 'beta-corp'""",
            "beta-corp is billed 16",
        ),
        ("reports", "DELETE FROM reports WHERE tenant = 'acme'", "acme has no report"),
        (
            "reports",
            f"DELETE FROM reports WHERE service = 'big' AND period_end_ns = {START_NS + 2 * MINUTE_NS}",
            "_platform has no report",
        ),
        ("reports", "DELETE FROM reports WHERE tenant = '_platform'", "_platform has no report"),
        (
            "reports",
            """UPDATE reports SET body = CAST(replace(body, '"amount":"', '"amount":"1') AS BLOB)
               WHERE tenant = 'beta-corp'""",
            "amount of beta-corp is 1",
        ),
        (
            "reports",
            "UPDATE reports SET body = CAST(replace(body, 'USD', 'EUR') AS BLOB)",
            "is billed in EUR, the plan is in USD",
        ),
        (
            "price_plans",
            """UPDATE price_plans SET spec = CAST(replace(spec, '2.50', '2.40') AS BLOB)""",
            "the price plan of this period is gone or was changed",
        ),
        ("periods", "UPDATE periods SET plan_hash = ''", "names another price plan"),
        ("pod_accounts", "DELETE FROM pod_accounts WHERE allocated < 60000000000", "closed periods hold"),
        ("containers", "UPDATE containers SET at_ns = at_ns - 1000000000 WHERE event = 'ended'", "closed periods hold"),
    ],
)
def test_the_auditors_script_finds_what_was_changed(ledger: Path, table: str, statement: str, told: str) -> None:
    change(ledger, table, statement)
    done = verify(ledger)
    assert done.returncode == 1, done.stdout
    assert told in done.stdout


def test_the_auditors_script_finds_a_bill_that_was_moved_to_the_platforms(ledger: Path) -> None:
    raw = sqlite3.connect(ledger)
    tenants = "SELECT sum(json_extract(body, '$.status.gpuNanoseconds')) FROM reports WHERE phase = 'Final'"
    end_ns = START_NS + MINUTE_NS
    at = f"AND service = 'big' AND period_end_ns = {end_ns}"
    moved_ns, kept_ns = (
        raw.execute(f"{tenants} {at} AND tenant = '{who}'").fetchone()[0] for who in ("acme", PLATFORM)
    )
    raw.close()
    total = f"json_set(body, '$.status.gpuNanoseconds', '{moved_ns + kept_ns}')"
    change(ledger, "reports", f"UPDATE reports SET body = CAST({total} AS BLOB) WHERE tenant = '{PLATFORM}' {at}")
    redo_digests(ledger)
    change(ledger, "reports", f"DELETE FROM reports WHERE tenant = 'acme' {at}")
    told = verify(ledger).stdout
    assert f"team-a/big {end_ns}: acme has no report" in told
    assert f"team-a/big {end_ns}: _platform is billed {moved_ns + kept_ns}, not {kept_ns}" in told


def test_the_auditors_script_finds_a_period_whose_bills_and_accounts_are_gone(ledger: Path) -> None:
    at = f"WHERE period_end_ns = {START_NS + 2 * MINUTE_NS}"
    change(ledger, "reports", f"DELETE FROM reports {at}")
    change(ledger, "pod_accounts", f"DELETE FROM pod_accounts {at}")
    told = verify(ledger).stdout
    for service in ("big", "smollm2"):
        for tenant in ("acme", "beta-corp", PLATFORM):
            assert f"team-a/{service} {START_NS + 2 * MINUTE_NS}: {tenant} has no report" in told


def test_the_auditors_script_says_how_far_each_service_is_closed(ledger: Path) -> None:
    at = f"WHERE period_end_ns >= {START_NS + 2 * MINUTE_NS}"
    change(ledger, "reports", f"DELETE FROM reports {at}")
    change(ledger, "pod_accounts", f"DELETE FROM pod_accounts {at}")
    told = verify(ledger).stdout
    assert "team-a/big: closed until 2026-11-21 10:01:00+00:00, 1 later periods with records" in told


def test_the_auditors_script_finds_an_amount_that_was_changed_with_its_digest(ledger: Path) -> None:
    changed = 'replace(body, \'"amount":"0.\', \'"amount":"0.9\')'
    change(ledger, "reports", f"UPDATE reports SET body = CAST({changed} AS BLOB) WHERE tenant = 'acme'")
    redo_digests(ledger)
    done = verify(ledger)
    assert done.returncode == 1
    assert all("amount of acme is 0.9" in line or "closed until" in line for line in done.stdout.splitlines())


def test_gpumeters_own_check_finds_changed_money_too(ledger: Path) -> None:
    url = f"sqlite:///{ledger}"
    assert CliRunner().invoke(accounts, ["--check", "--ledger", url]).exit_code == 0
    changed = 'replace(body, \'"amount":"0.\', \'"amount":"0.9\')'
    change(ledger, "reports", f"UPDATE reports SET body = CAST({changed} AS BLOB) WHERE tenant = 'acme'")
    redo_digests(ledger)
    done = CliRunner().invoke(accounts, ["--check", "--ledger", url])
    assert done.exit_code == 1
    assert "acme's amount is 0.9" in done.output


def redo_digests(ledger: Path) -> None:
    """As whoever changes a report's bytes and knows of the digest beside them would."""
    raw = sqlite3.connect(ledger)
    raw.execute("DROP TRIGGER IF EXISTS reports_no_update")
    raw.create_function("sha256", 1, lambda body: sha256(body).hexdigest())
    raw.execute("UPDATE reports SET digest = sha256(body)")
    raw.commit()
    raw.close()


def test_the_documents_way_to_copy_a_ledger_gives_a_whole_one(ledger: Path) -> None:
    (command,) = [block for block in blocks("sh") if "source.backup" in block]
    code = re.search(r'python3 -c "\n(.*?)" > ledger.db', command, re.DOTALL)
    assert code
    here = code[1].replace("/var/lib/gpumeter", str(ledger.parent))
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, check=True)
    copy = ledger.parent / "copy.db"
    copy.write_bytes(done.stdout)
    assert verify(copy).returncode == 0
