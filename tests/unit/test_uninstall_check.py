"""The sentence of the uninstall check."""

from gpumeter_operator.cli.uninstall_check import NAMES_MAX, refusal


def test_nothing_is_refused_when_no_service_exists() -> None:
    assert refusal([]) is None


def test_services_are_named_in_order() -> None:
    sentence = refusal(["b/two", "a/one"])
    assert sentence is not None
    assert sentence.startswith("2 InferenceServices exist: a/one, b/two. Delete them first")


def test_a_long_list_is_cut() -> None:
    sentence = refusal([f"team/s{number:02}" for number in range(NAMES_MAX + 1)])
    assert sentence is not None
    assert f"{NAMES_MAX + 1} InferenceServices exist: team/s00, " in sentence
    assert "team/s09 and 1 more. Delete" in sentence
    assert "team/s10" not in sentence
