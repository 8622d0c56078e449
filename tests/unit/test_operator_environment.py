"""How a GPUMETER_* variable becomes a value, for every command."""

from pathlib import Path

import pytest

from gpumeter_operator.environment import Environment, SettingsInvalid


def test_an_empty_variable_counts_as_not_set() -> None:
    read = Environment({"A": "", "B": "", "C": "", "D": ""})
    assert (read.text("A", "x"), read.number("B", 3, 1, 5), read.seconds("C", 1.5)) == ("x", 3, 1.5)
    assert read.choice("D", "b", ("a", "b")) == "b"
    assert read.problems == []


@pytest.mark.parametrize("text", ["0", "11", "-1", "1.5", "ten", "²", "9" * 5000])
def test_a_number_out_of_its_limits_is_told_with_them(text: str) -> None:
    read = Environment({"N": text})
    assert read.number("N", 3, 1, 10) == 3
    (problem,) = read.problems
    assert "set a whole number from 1 to 10, or leave it out (3)" in problem
    assert len(problem) < 200


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "86400", "soon"])
def test_seconds_that_cannot_be_are_told(text: str) -> None:
    read = Environment({"S": text})
    assert read.seconds("S", 2.5) == 2.5
    assert read.problems == [f"S is {text!r}; set seconds, more than 0 and less than 86400, or leave it out (2.5)."]


def test_a_choice_may_be_written_in_any_case_and_comes_back_as_it_is_spelt() -> None:
    read = Environment({"C": "ifnotpresent"})
    assert read.choice("C", "Always", ("Always", "IfNotPresent")) == "IfNotPresent"


def test_all_problems_are_raised_together(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"k")
    read = Environment({"N": "x", "GPUMETER_MASTER_KEY_FILE": str(short)})
    read.number("N", 1, 0, 9)
    read.needed("I", "name the image")
    read.master_key()
    with pytest.raises(SettingsInvalid) as invalid:
        read.check()
    assert len(invalid.value.problems) == 3
    assert "I is not set; name the image." in invalid.value.problems
