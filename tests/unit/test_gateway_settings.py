import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_operator.environment import SettingsInvalid
from gpumeter_operator.gateway.settings import DEFAULTS, settings_from

DOCUMENT = Path(__file__).parents[2] / "docs/gateway.md"


def test_only_the_namespace_has_no_default() -> None:
    settings = settings_from({"GPUMETER_NAMESPACE": "gpumeter"})
    assert (settings.namespace, settings.port) == ("gpumeter", 8080)
    assert settings.master_key_file == Path("/etc/gpumeter/master/master-key")


def test_every_setting_that_cannot_be_is_told_at_once() -> None:
    wrong = {
        "GPUMETER_GATEWAY_PORT": "eighty",
        "GPUMETER_GATEWAY_BODY_BYTES_MAX": "0",
        "GPUMETER_GATEWAY_SETTLE_S": "-1",
        "GPUMETER_GATEWAY_DRAIN_TIMEOUT_S": "nan",
    }
    with pytest.raises(SettingsInvalid) as refused:
        settings_from(wrong)
    for name in (*wrong, "GPUMETER_NAMESPACE"):
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("GPUMETER_GATEWAY_BODY_BYTES_MAX", str(1 << 30), "one body must fit into a tenant's share"),
        ("GPUMETER_GATEWAY_HELD_BYTES_MAX", str(16 << 20), "a tenant's share must fit into the whole"),
        ("GPUMETER_GATEWAY_WAITING_MAX", "100", "a tenant's share must fit into the waiting room"),
        ("GPUMETER_GATEWAY_IN_FLIGHT_MAX", "100", "must leave room for others"),
        ("GPUMETER_GATEWAY_WAITING_BYTES_MAX", str(1 << 40), "must leave room for others"),
        ("GPUMETER_GATEWAY_INTERNAL_PORT", "8080", "must be one of its own"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_names(variable: str, value: str, told: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        settings_from({"GPUMETER_NAMESPACE": "x", variable: value})
    assert variable in str(refused.value)
    assert told in str(refused.value)


def test_what_is_set_wins_over_the_default() -> None:
    settings = settings_from({"GPUMETER_NAMESPACE": "x", "GPUMETER_GATEWAY_DRAIN_TIMEOUT_S": "7.5"})
    assert settings.drain_timeout_s == 7.5


def test_the_settings_in_the_document_have_their_defaults_and_are_read() -> None:
    rows = re.findall(r"^\|[^|]*\| `(GPUMETER_[A-Z_]+)` \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == 8
    units = {"5m": "300", "10s": "10"}
    stated = {name: units.get(default.strip(), default.strip()) for name, default in rows}
    assert settings_from({"GPUMETER_NAMESPACE": "x", **stated}) == replace(DEFAULTS, namespace="x")
    for name in stated:
        with pytest.raises(SettingsInvalid, match=name):
            settings_from({"GPUMETER_NAMESPACE": "x", name: "many"})
