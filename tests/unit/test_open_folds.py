"""What a round adds to the sums of open periods is what the ledger would sum anew, to the nanosecond."""

import random
from dataclasses import fields
from pathlib import Path

import pytest

from gpumeter_operator.billing.facts import FIGURES, Line
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.folds import Folds
from gpumeter_operator.flow.periods import open_periods
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from rigs.ledger import START_NS, FakeWorker, live, open_ledger, started, worker

SERVICE = ("team-a", "smollm2")


def test_the_last_fields_of_a_line_are_the_figures_in_the_order_in_which_they_are_read() -> None:
    assert tuple(field.name for field in fields(Line))[-len(FIGURES) :] == FIGURES


@pytest.mark.parametrize("seed", range(3))
def test_sums_kept_from_round_to_round_are_those_of_the_ledger(seed: int, tmp_path: Path) -> None:
    random_, ledger = random.Random(seed), open_ledger(tmp_path / "ledger.db")
    fakes = [FakeWorker(worker(number), START_NS + number) for number in (1, 2)]
    for fake in fakes:
        ledger.observe(fake.identity, [started("c", START_NS)], START_NS)
    kept, compared = Folds(ledger), 0
    closer = Closer(ledger, 20 * SECOND_NS)
    for turn in range(40):
        now_ns = START_NS + (turn + 1) * 5 * SECOND_NS
        for fake, pace in zip(fakes, (9, 3), strict=True):
            live(fake, random_, now_ns)
            if random_.random() < 0.05:
                fake.restart(f"boot-{len(fake.boots) + 1}", now_ns)
            for boot in fake.boots:
                if random_.random() < 0.6:  # the second falls behind, until its minutes are Final without it
                    page = fake.page(boot.boot_id, boot.trimmed, random_.randrange(1, pace))
                    boot.trimmed += len(page.links)
                    ledger.take(fake.identity, page, now_ns)
        if turn == 20:
            kept = Folds(ledger)  # the collector starts anew in the middle of a minute
        for period in open_periods(ledger, SERVICE, ledger.schedule(), now_ns):
            pods = ledger.pods(*SERVICE, period.start_ns)
            found = kept.lines(SERVICE, period, pods)
            assert sorted(found, key=repr) == sorted(ledger.lines(*SERVICE, period.end_ns), key=repr)
            compared += len(found)
        before = ledger.last_final_ns(*SERVICE)
        closer.close_all(Pricing({}, {}), now_ns)
        assert ledger.last_final_ns(*SERVICE) >= before
    assert compared > 100 and ledger.last_final_ns(*SERVICE) >= START_NS + 2 * MINUTE_NS
    assert any(reason == "LateRecords" for reason, _, _ in ledger.alarms()), "nobody fell behind; give it another seed"
