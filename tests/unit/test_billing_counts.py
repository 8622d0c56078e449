"""Counts of tokens and steps: what a machine can do is believed, what none can is refused."""

from decimal import Decimal
from pathlib import Path

import pytest

from gpumeter_operator.adapters.ledger import rows
from gpumeter_operator.billing.accept import Accepted, PageRefused
from gpumeter_operator.billing.counts import Counts, impossible
from gpumeter_operator.billing.facts import Spent
from gpumeter_operator.billing.tariff import BillingMode, Terms
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account, Kind, Status, parse
from rigs.audited import DIGESTED_NS, audited, digested
from rigs.ledger import START_NS, FakeWorker, ended, finals, gone, started, worker
from rigs.pricing import PricedHour, at, plan, rate

MS = 10**6
HONEST = {
    "a decode step alone": Counts(9 * MS, 0, 0, 1, 1, 9 * MS),
    "a minute of decoding in a batch of 1,024": Counts(60 * SECOND_NS // 1024, 0, 0, 12_000, 12_000, 60 * SECOND_NS),
    "1,024 choices of one prompt, five seconds at 3 ms": Counts(5 * SECOND_NS, 8_192, 0, 1_700_000, 1_667, 2**43),
    "the last piece of a chunked prompt": Counts(2 * MS, 2_048, 0, 1, 1, 64 * MS),
    "the largest step that a worker can be set to": Counts(500 * MS, 2**20, 0, 4_096, 1, 500 * MS),
    "a prompt that is found whole but for its last token": Counts(3 * MS, 131_072, 131_071, 1, 1, 3 * MS),
    "many prompts that are found, admitted by one step": Counts(40 * MS, 64 * 131_072, 64 * 131_071, 64, 1, 2**31),
    "work done again after a preemption: no token is": Counts(0, 0, 0, 0, 0, 0),
    "the end of a session that was stated before": Counts(0, 0, 0, 0, 0, 0),
    "a share that is rounded to nothing": Counts(0, 512, 0, 1, 1, 0),
    "a small model on a fast device": Counts(SECOND_NS, 30_000_000, 0, 400_000, 900, 2**40),
    "a slice of four devices": Counts(240 * SECOND_NS, 4_000_000, 1_000_000, 2_000_000, 6_000, 2**45),
}


@pytest.mark.parametrize("counts", HONEST.values(), ids=HONEST.keys())
def test_what_an_honest_worker_can_write_is_believed(counts: Counts) -> None:
    assert impossible(counts) == ""


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (Counts(SECOND_NS, 0, 10**9, 1, 1, 0), "1000000000 cached tokens of 0 of its prompt"),
        (Counts(SECOND_NS, 7, 8, 1, 1, 0), "8 cached tokens of 7"),
        (Counts(SECOND_NS, 0, 0, 10**12, 1, 0), "more than 1 steps hold"),
        (Counts(SECOND_NS, 1, 0, 0, 0, 0), "more than 0 steps hold"),
        (Counts(SECOND_NS, 2**21, 0, 1, 1, 0), "more than 1 steps hold"),
        (Counts(SECOND_NS, 2**34, 2**34, 0, 1, 0), "more than 1 steps hold"),
        (Counts(SECOND_NS, 0, 0, 10**9, 10**6, 0), "more than any device computes in 1000000000 ns"),
        (Counts(0, 2**20, 0, 1, 1, 0), "more than any device computes in 0 ns"),
        (Counts(SECOND_NS, 2**41, 0, 0, 2**40, 0), "counts that no step can reach"),
        (Counts(SECOND_NS, 0, 0, 0, 2**41, 0), "counts that no step can reach"),
        (Counts(1, 0, 0, 1, 1, 2**17), "counts that no step can reach"),
    ],
)
def test_what_no_machine_can_do_is_told(counts: Counts, told: str) -> None:
    assert told in impossible(counts)


def an_hour(folder: Path) -> tuple[PricedHour, FakeWorker]:
    """A service that is billed by tokens, and a worker that states more cached tokens than prompts have."""
    tokens = {"model": "smollm2", "perThousandPromptTokens": "0.10", "perThousandCompletionTokens": "1"}
    hour = PricedHour(folder, Terms(BillingMode.STANDARD_RATE))
    hour.see(plan(rate("3.60"), standardRates=[tokens | {"perThousandCachedTokens": "0.01"}]), 0)
    fake = FakeWorker(worker(), START_NS)
    end_ns = START_NS + SECOND_NS
    used = {"session_id": "s-1", "tenant": "acme", "gpu_ns": SECOND_NS, "decode_ns": SECOND_NS, "steps": 1}
    used |= {"cached_tokens": 10**9, "completion_tokens": 1, "status": Status.FINISHED}
    fake._append(Kind.SESSION, Account.ATTRIBUTED, START_NS, end_ns, **used)
    fake._append(Kind.ACCOUNT, Account.ATTRIBUTED, START_NS, end_ns, gpu_ns=SECOND_NS)
    fake.frontier_ns = end_ns
    fake.spend(Account.IDLE, at(60))
    fake.seal()
    hour.ledger.observe(fake.identity, [started("c", START_NS), ended("c", at(60)), gone(at(60))], at(60))
    return hour, fake


def test_more_cached_tokens_than_sent_are_on_no_bill(tmp_path: Path) -> None:
    hour, fake = an_hour(tmp_path)
    with pytest.raises(PageRefused, match="boot boot-1 seq 1 claims 1000000000 cached tokens of 0 of its") as refused:
        hour.ledger.take(fake.identity, fake.page("boot-1", 0), at(60))
    assert refused.value.reason == "CountTooLarge"
    hour.run(65)
    assert {tenant for _, tenant in finals(hour.ledger)} == {"_platform"}


def test_what_a_version_before_took_of_such_is_billed_to_nobodys_gain_and_verify_names_it(tmp_path: Path) -> None:
    hour, fake = an_hour(tmp_path)
    links = tuple(fake.boot.links)
    records = tuple(parse(each.body) for each in links)
    hour_ns = at(60) - START_NS
    with hour.ledger.writing() as connection:
        taken = Accepted(records, links[-1].hash, Spent(START_NS, hour_ns, SECOND_NS))
        assert rows.advance(connection, None, taken)
        rows.insert_records(connection, fake.identity, records, links, at(60), days=hour.ledger.days)
    hour.ledger.settle(fake.identity.worker_uid, at(60))
    hour.run(65)
    acme = finals(hour.ledger)[at(60), "acme"]["status"]
    assert Decimal(acme["amount"]) == Decimal("0.001"), "the one token of the answer"
    digested(hour.ledger, DIGESTED_NS)
    (found,) = audited(hour.ledger)
    assert found.reason == "RecordDiffers"
    assert "seq 1: claims 1000000000 cached tokens of 0 of its prompt, and was taken by a version" in found.message
