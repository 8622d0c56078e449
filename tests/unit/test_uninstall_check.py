"""The sentences of the uninstall check."""

import pytest
from click.testing import CliRunner

from gpumeter_operator.cli.uninstall_check import NAMES_MAX, keeping, refusal, uninstall_check


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


def test_who_is_refused_is_told_how_to_keep_the_release() -> None:
    assert keeping("gpumeter", "billing", 3).startswith(
        "To keep gpumeter instead: helm rollback gpumeter 3 -n billing; "
    )


def test_a_cluster_that_cannot_be_asked_is_told_in_sentences_that_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    told = CliRunner().invoke(uninstall_check, ["--release=gpumeter", "--namespace=billing", "--revision=3"])
    assert told.exit_code == 1
    assert told.output.startswith("Whether InferenceServices exist could not be asked: ")
    assert ".." not in told.output
    assert "Try helm uninstall again. To keep gpumeter instead: helm rollback gpumeter 3 -n billing" in told.output
