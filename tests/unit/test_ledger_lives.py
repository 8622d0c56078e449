"""Which pods a round of closing looks at: the ledger finds them by what it keeps beside the facts, and loses none."""

import itertools
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import Pod
from gpumeter_usage.period import SECOND_NS
from rigs.databases import Database
from rigs.ledger import START_NS, ended, gone, open_ledger, started, worker

SERVICE = ("team-a", "smollm2")
TIMES_NS = [START_NS + number * 10 * SECOND_NS for number in range(6)]
EVENTS = (
    started("c-1", TIMES_NS[0]),
    ended("c-1", TIMES_NS[2]),
    started("c-2", TIMES_NS[2]),
    ContainerEvent("c-2", "vanished", TIMES_NS[3]),
    gone(TIMES_NS[4]),
)


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    ledger = open_ledger(database.url)
    yield ledger
    ledger.close()


def found(ledger: Ledger, since_ns: int) -> tuple[tuple[Pod, ...], tuple[Pod, ...]]:
    """The pods as a round finds them, and as the facts alone have them."""
    return ledger.pods(*SERVICE, since_ns, booked=()), ledger.pods(*SERVICE, since_ns)


def test_a_round_finds_the_pods_that_the_facts_tell_of_in_whatever_order_these_came(ledger: Ledger) -> None:
    for number, count in enumerate(itertools.chain(range(len(EVENTS) + 1), range(len(EVENTS) + 1))):
        of_pod = EVENTS[:count] if number <= len(EVENTS) else tuple(reversed(EVENTS))[:count]
        for event in of_pod:
            ledger.observe(worker(number), [event], TIMES_NS[5])
        ledger.observe(worker(number), [], TIMES_NS[5])
    ledger.observe(worker(99, service="other"), [started("c", TIMES_NS[0])], TIMES_NS[5])
    sizes = []
    for since_ns in (*TIMES_NS, *(each - 1 for each in TIMES_NS)):
        by_round, by_facts = found(ledger, since_ns)
        assert by_round == by_facts
        sizes.append(len(by_round))
    assert max(sizes) > min(sizes) > 0, "some pods ended before, and some never did"


def test_a_pod_whose_end_becomes_known_late_is_looked_at_again(ledger: Ledger) -> None:
    ledger.observe(worker(), [started("c", TIMES_NS[0]), gone(TIMES_NS[1])], TIMES_NS[1])
    assert found(ledger, TIMES_NS[1]) == ((), ())
    ledger.observe(worker(), [ended("c", TIMES_NS[2])], TIMES_NS[3])
    by_round, by_facts = found(ledger, TIMES_NS[1])
    assert [pod.worker for pod in by_round] == [worker()] and by_round == by_facts


def test_pods_of_an_older_ledger_are_found_after_the_upgrade(database: Database) -> None:
    ledger = open_ledger(database.url)
    for number in range(len(EVENTS) + 1):
        ledger.observe(worker(number), EVENTS[:number], TIMES_NS[5])
    ledger.close()
    for table, name in (("workers", "lives_begin"), ("containers", "lives_end")):
        if database.kind == "sqlite":
            database.run(f"DROP TRIGGER {name}")
        else:
            database.run(f"DROP TRIGGER {name} ON {table}")
            database.run(f"DROP FUNCTION {name}()")
    database.run("DROP TABLE lives")
    database.run("DROP TABLE gaps")
    database.run("DROP TABLE corrections")
    for column in ("kv_byte_s", "energy_mj"):
        database.run(f"ALTER TABLE records DROP COLUMN {column}")
    for column in ("open_seq", "open_ns", "open_minute_ns", "open_cut", "tokens"):
        database.run(f"ALTER TABLE boots DROP COLUMN {column}")
    database.run("UPDATE alembic_version SET version_num = '0008'")
    ledger = open_ledger(database.url)
    for since_ns in TIMES_NS:
        by_round, by_facts = found(ledger, since_ns)
        assert by_round == by_facts
    assert len(by_round) == len(EVENTS), "all but the one that was seen to go"
    ledger.observe(worker(0), [gone(TIMES_NS[1])], TIMES_NS[5])
    assert len(found(ledger, TIMES_NS[5])[0]) == len(EVENTS) - 1, "and the database goes on keeping it"
    ledger.close()


def test_what_follows_from_facts_is_there_for_whoever_writes_them(ledger: Ledger) -> None:
    ledger.observe(worker(), [started("c", TIMES_NS[0])], TIMES_NS[0])
    with ledger.writing() as connection:
        connection.execute(
            text("INSERT INTO containers VALUES ('pod-uid-1', '', 'gone', :at, :at)"), {"at": TIMES_NS[1]}
        )
    assert found(ledger, TIMES_NS[2]) == ((), ())
