"""Whoever may write the ledger's file, and has no signing key, changes a row: `gpumeter verify` finds and names it."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpumeter_operator.adapters.ledger.tables import FACTS
from gpumeter_operator.flow.verify import Finding
from rigs.audited import Arena, made
from rigs.thoroughness import examples

FILLED = tuple(table for table in FACTS if table.name != "removals")  # for those ninety days would have to pass
NAMES = tuple(table.name for table in FILLED)
COLUMNS = tuple((table.name, column.name) for table in FILLED for column in table.columns)
KEYS = {table.name: tuple(column.name for column in table.primary_key) for table in FACTS}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    folder = tmp_path_factory.mktemp("ledger")
    arena = Arena(made(folder / "ledger.db", corrected=True), folder / "copy.db")
    assert arena.found() == []
    return arena


def another(value: Any, choice: int) -> Any:
    """A value of the same kind that is not this one."""
    if isinstance(value, int):
        return value + (1, -1, 60_000_000_000, -value - 1, 10**9)[choice % 5]
    if isinstance(value, bytes):
        at = choice % max(1, len(value))
        return value[:at] + bytes([(value[at] if value else 0) ^ 1]) + value[at + 1 :]
    text = str(value)
    return (text + "0", text[:-1] if text else "x", "beta-corp" if text != "beta-corp" else "acme", "0" * 64)[
        choice % 4
    ]


def tampering(test: Any) -> Any:
    quick = settings(
        max_examples=examples(20),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        database=None,
    )
    return quick(given(row=st.integers(0, 10_000), choice=st.integers(0, 10_000), which=st.integers(0, 10_000))(test))


def one_of(raw: Any, table: str, row: int) -> tuple[int, dict[str, Any]]:
    cursor = raw.execute(f"SELECT rowid, * FROM {table}")
    names = [each[0] for each in cursor.description]
    rows = cursor.fetchall()
    values = dict(zip(names[1:], rows[row % len(rows)][1:], strict=True))
    return rows[row % len(rows)][0], values


def names_the_row(findings: list[Finding], table: str, *values: dict[str, Any]) -> bool:
    """Whether the first findings say which row it is: by its key, or by the digest that its leaf belongs to."""
    told = findings[0].message
    for each in values:
        if table == "records" and f"boot {each['boot_id']}" in " ".join(one.message for one in findings):
            return True
        if table in ("digests", "digest_facts") and "digest" in told:
            return True
        if any(" ".join(str(each[name]) for name in KEYS[table]) in one.message for one in findings):
            return True
    return False


@tampering
@example(row=0, choice=0, which=COLUMNS.index(("records", "booked_end_ns")))
@example(row=0, choice=0, which=COLUMNS.index(("containers", "observed_ns")))
@example(row=0, choice=0, which=COLUMNS.index(("digests", "signature")))
@example(row=0, choice=0, which=COLUMNS.index(("digest_facts", "position")))
@example(row=0, choice=0, which=COLUMNS.index(("signing_keys", "public_der")))
def test_any_column_of_any_fact_that_is_changed_is_found_and_named(
    arena: Arena, row: int, choice: int, which: int
) -> None:
    table, column = COLUMNS[which % len(COLUMNS)]
    arena.put_back()
    raw = arena.raw
    rowid, values = one_of(raw, table, row)
    value = another(values[column], choice)
    if value == values[column]:
        return
    try:
        raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid))
    except Exception as refused:
        assert "UNIQUE" in str(refused)
        return
    findings = arena.found()
    assert findings, f"{table}.{column} of {values}: {value!r}"
    assert names_the_row(findings, table, values, values | {column: value}), findings


@tampering
def test_any_fact_that_is_taken_out_is_found_and_named(arena: Arena, row: int, choice: int, which: int) -> None:
    table = NAMES[which % len(NAMES)]
    arena.put_back()
    raw = arena.raw
    rowid, values = one_of(raw, table, row)
    raw.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
    findings = arena.found()
    assert findings, f"{table}: {values}"
    assert names_the_row(findings, table, values), findings


@tampering
def test_any_fact_that_is_put_in_as_an_old_one_is_found_and_named(
    arena: Arena, row: int, choice: int, which: int
) -> None:
    """A copy of a row under another key. What claims to be newer than the last digest is not yet proved by any."""
    table = NAMES[which % len(NAMES)]
    arena.put_back()
    raw = arena.raw
    _, values = one_of(raw, table, row)
    key = KEYS[table][choice % len(KEYS[table])]
    put = values | {key: another(values[key], choice)}
    if table == "alarms":
        put["fingerprint"] = "f" * 64
    if table == "digest_facts":
        put["row_key"] = put["row_key"] + "0"
    try:
        raw.execute(f"INSERT INTO {table} ({', '.join(put)}) VALUES ({', '.join('?' * len(put))})", tuple(put.values()))
    except Exception as refused:
        assert "UNIQUE" in str(refused)
        return
    findings = arena.found()
    assert findings, f"{table}: {put}"
    assert names_the_row(findings, table, values, put), findings


@tampering
def test_two_facts_that_change_places_are_found_and_named(arena: Arena, row: int, choice: int, which: int) -> None:
    """Everything but their keys is exchanged."""
    table = NAMES[which % len(NAMES)]
    arena.put_back()
    raw = arena.raw
    one, first = one_of(raw, table, row)
    two, second = one_of(raw, table, choice)
    rest = [name for name in first if name not in KEYS[table] and name != "fingerprint"]
    if one == two or all(first[name] == second[name] for name in rest):
        return
    change = f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in rest)} WHERE rowid = ?"
    try:
        raw.execute(change, (*(second[name] for name in rest), one))
        raw.execute(change, (*(first[name] for name in rest), two))
    except Exception as refused:
        assert "UNIQUE" in str(refused)
        return
    findings = arena.found()
    assert findings, f"{table}: {first} and {second}"
    assert names_the_row(findings, table, first, second), findings


@pytest.mark.parametrize("table", ["rollups", "period_terms"])
def test_days_months_and_terms_are_facts_of_which_no_column_can_be_changed(arena: Arena, table: str) -> None:
    for column in (column for name, column in COLUMNS if name == table):
        arena.put_back()
        rowid, values = one_of(arena.raw, table, 1)
        value = another(values[column], 0)
        arena.raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid))
        findings = arena.found()
        assert findings and names_the_row(findings, table, values, values | {column: value}), (column, findings)
    arena.put_back()
    rowid, values = one_of(arena.raw, table, 1)
    arena.raw.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
    assert [each.reason for each in arena.found()][:1] == ["FactMissing"]
    arena.put_back()
    put = values | {"service": "smollm3"}
    marks = ", ".join("?" * len(put))
    arena.raw.execute(f"INSERT INTO {table} ({', '.join(put)}) VALUES ({marks})", tuple(put.values()))
    assert [each.reason for each in arena.found()][:1] == ["FactInserted"]
    arena.put_back()
