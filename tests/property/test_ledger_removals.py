"""Retention takes records out of what can be recomputed; who forges a removal to hide behind it is found and named."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumeter_operator.adapters.ledger.tables import removals
from rigs.audited import DAY_END_NS, DAY_NS, HOUR_NS, OLD_NS, Arena, made, made_old
from rigs.thoroughness import examples

COLUMNS = tuple(column.name for column in removals.columns)
KEY = tuple(column.name for column in removals.primary_key)
JUDGED = ("worker_uid", "day_end_ns", "first_seq", "records", "service", "retention_days")
AFTER_NS = OLD_NS + 2 * DAY_NS
FORGED = """INSERT INTO removals SELECT worker_uid, boot_id, :day, min(seq), max(seq),
    (SELECT hash FROM records l WHERE l.worker_uid = r.worker_uid AND l.boot_id = r.boot_id ORDER BY seq DESC LIMIT 1),
    count(*) + :more, '', service, min(booked_end_ns), max(booked_end_ns), 90, :removed
    FROM records r WHERE service = 'team-a/smollm2' GROUP BY worker_uid, boot_id, service"""


def whole(folder: Path, name: str, *, covered: bool) -> Arena:
    arena = Arena(made_old(folder / f"{name}.db", covered=covered), folder / f"{name}-copy.db", AFTER_NS)
    assert arena.found() == [], "what retention did is no difference"
    arena.raw.execute("PRAGMA ignore_check_constraints = ON")
    return arena


@pytest.fixture(scope="module")
def covered(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return whole(tmp_path_factory.mktemp("ledger"), "covered", covered=True)


@pytest.fixture(scope="module")
def pending(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return whole(tmp_path_factory.mktemp("ledger"), "pending", covered=False)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arena, Arena]:
    """Nothing was removed: looked at on the next day, and after the day's time is over."""
    folder = tmp_path_factory.mktemp("ledger")
    source = made(folder / "ledger.db")
    both = Arena(source, folder / "soon.db"), Arena(source, folder / "late.db", AFTER_NS)
    for arena in both:
        arena.raw.execute("PRAGMA ignore_check_constraints = ON")
    return both


def another(value: Any, choice: int) -> Any:
    if isinstance(value, int):
        return value + (1, -1, 7 * HOUR_NS, -value - 1, 400 * DAY_NS)[choice % 5]
    return (str(value) + "0", "x" + str(value)[1:], "0" * 64)[choice % 3]


def names_it(told: list[Any], *rows: dict[str, Any]) -> bool:
    return any(" ".join(str(row[name]) for name in KEY) in each.message for each in told for row in rows)


def rows_of(arena: Arena) -> list[dict[str, Any]]:
    cursor = arena.raw.execute("SELECT rowid, * FROM removals")
    names = [each[0] for each in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


quick = settings(
    max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@quick
@given(row=st.integers(0, 2), column=st.sampled_from(COLUMNS), choice=st.integers(0, 4))
def test_a_removal_that_a_digest_covers_cannot_be_changed(covered: Arena, row: int, column: str, choice: int) -> None:
    covered.put_back()
    was = rows_of(covered)[row]
    is_now = was | {column: another(was[column], choice)}
    covered.raw.execute(f"UPDATE removals SET {column} = ? WHERE rowid = ?", (is_now[column], was["rowid"]))
    assert names_it(covered.found(), was, is_now), (was, is_now)


@pytest.mark.parametrize("column", JUDGED)
@pytest.mark.parametrize(("row", "choice"), [(0, 0), (2, 3)])
def test_of_one_that_none_covers_nothing_can_be_changed_that_says_what_went(
    pending: Arena, row: int, column: str, choice: int
) -> None:
    pending.put_back()
    was = rows_of(pending)[row]
    is_now = was | {column: another(was[column], choice)}
    pending.raw.execute(f"UPDATE removals SET {column} = ? WHERE rowid = ?", (is_now[column], was["rowid"]))
    assert pending.found()[0].reason == "RemovalUnproved", (was, is_now)


def test_without_its_removal_what_went_is_missing(covered: Arena, pending: Arena) -> None:
    for arena in (covered, pending):
        arena.put_back()
        arena.raw.execute("DELETE FROM removals WHERE rowid = 1")
        assert {"RecordDiffers", "RemovalUnproved"} & {each.reason for each in arena.found()}


@pytest.mark.parametrize(
    ("late", "claim", "told"),
    [
        (False, {}, "and it is 2026"),  # the database itself lets this one in
        (False, {"removed": DAY_END_NS}, "before its day was over"),
        (True, {"more": 1}, "there are no"),
        (True, {"more": -1}, "the day's digests state"),
        (True, {"day": DAY_END_NS - DAY_NS}, "not of the day"),
        (True, {"day": -1}, "what is no time"),
    ],
)
@pytest.mark.parametrize("gone", [True, False])
def test_a_forged_removal_is_named_and_excuses_nothing(
    full: tuple[Arena, Arena], late: bool, claim: dict[str, int], told: str, gone: bool
) -> None:
    arena = full[late]
    arena.put_back()
    arena.raw.execute(FORGED, {"day": DAY_END_NS, "more": 0, "removed": OLD_NS} | claim)
    forged = rows_of(arena)
    change = "DELETE FROM records" if gone else "UPDATE records SET gpu_ns = gpu_ns + 1"
    arena.raw.execute(f"{change} WHERE service = 'team-a/smollm2'")
    findings = arena.found()
    unproved = [each for each in findings if each.reason == "RemovalUnproved"]
    assert len(unproved) == len(forged) == 2
    assert all(names_it([each], *forged) and told in each.message for each in unproved), unproved
    assert ("RecordsRoot" if gone else "RecordDiffers") in {each.reason for each in findings}


def test_what_a_removal_says_went_must_not_be_there(full: tuple[Arena, Arena]) -> None:
    late = full[1]
    late.put_back()
    late.raw.execute(FORGED, {"day": DAY_END_NS, "more": 0, "removed": OLD_NS})
    late.raw.execute("UPDATE records SET gpu_ns = gpu_ns + 1 WHERE service = 'team-a/smollm2' AND seq > 4")
    told = late.found()
    assert any(each.reason == "RemovalUnproved" and "and is there" in each.message for each in told)
    assert "RecordDiffers" in {each.reason for each in told}


def test_a_fact_from_the_future_is_no_fact_that_the_next_digest_covers(full: tuple[Arena, Arena]) -> None:
    soon = full[0]
    soon.put_back()
    soon.raw.execute(
        "INSERT INTO containers SELECT worker_uid, 'c-9', event, at_ns, :ns FROM containers LIMIT 1", {"ns": AFTER_NS}
    )
    assert "FactAhead" in {each.reason for each in soon.found()}
