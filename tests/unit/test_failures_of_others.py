"""tests/failures-of-others.md names, for each failure of another system, the tests that keep it from happening here."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "tests/failures-of-others.md").read_text()
FAILURES = {
    match[1]: re.findall(r"^  - `([^`]+)` `([^`]+)`$", match[2], re.MULTILINE)
    for match in re.finditer(r"^- (.+)\n((?:  - .+\n)*)", TEXT, re.MULTILINE)
}


@cache
def defined_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_has_tests_and_each_of_them_exists(failure: str) -> None:
    assert FAILURES[failure], f"{failure}: no test is named"
    for path, name in FAILURES[failure]:
        assert name in defined_in(path), f"{failure}: {path} has no {name}"


def test_the_list_is_read_whole() -> None:
    written = [line for line in TEXT.splitlines() if line.startswith(("- ", "  - "))]
    assert len(written) == len(FAILURES) + sum(map(len, FAILURES.values())), "a line that is written otherwise"
    assert len(FAILURES) >= 20
