"""The CRDs as text: no rule without a refused manifest, no field without words, no copy that differs."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import CRDS, ROOT, rule_file, schema_of

pytestmark = pytest.mark.shared

RULE_KEY = "x-kubernetes-validations"


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from fields(below, f"{path}.{name}" if path else name)
    if "items" in schema:
        yield from fields(schema["items"], f"{path}[]")


def own_fields(plural: str) -> list[tuple[str, dict[str, Any]]]:
    """Fields that are ours to explain: not those that every object has."""
    return [(path, field) for path, field in fields(schema_of(plural)) if path.startswith(("spec", "status"))]


TOLD = ("digest", "previousDigest", "sessions", "accounts.unaccounted")


@pytest.mark.parametrize("plural", CRDS)
def test_every_rule_has_a_manifest_that_it_refuses_and_every_such_manifest_a_rule(plural: str) -> None:
    rules = Counter(rule["message"] for _, field in fields(schema_of(plural)) for rule in field.get(RULE_KEY, ()))
    tested = Counter(entry["sentence"] for entry in rule_file(plural)["rules"])
    assert rules == tested
    assert sum(rules.values()) >= 9, "the schema was not read"


@pytest.mark.parametrize("plural", CRDS)
def test_every_rule_is_tested_with_accepted_and_refused_manifests(plural: str) -> None:
    for entry in rule_file(plural)["rules"]:
        assert entry["accepted"], entry["name"]
        assert entry["refused"], entry["name"]


@pytest.mark.parametrize("plural", CRDS)
def test_every_refusal_is_a_sentence(plural: str) -> None:
    for path, field in fields(schema_of(plural)):
        for rule in field.get(RULE_KEY, ()):
            assert rule["message"][0].isupper() or rule["message"].startswith(("spec.", "status.")), path
            assert rule["message"] == " ".join(rule["message"].split()), path
            assert rule["message"].endswith("."), path


@pytest.mark.parametrize("plural", CRDS)
def test_every_field_is_described(plural: str) -> None:
    silent = [path for path, field in own_fields(plural) if not path.endswith("[]") and not field.get("description")]
    assert silent == []


@pytest.mark.parametrize("plural", CRDS)
def test_every_default_is_told_in_the_description(plural: str) -> None:
    """kubectl explain shows descriptions and no defaults."""
    silent = []
    for path, field in own_fields(plural):
        if "default" in field and field["default"] != {}:
            value = field["default"]
            words = {"": "Empty", "1970-01-01T00:00:00Z": "the beginning"}.get(value, json.dumps(value).strip('"'))
            if words not in field["description"] or "efault" not in field["description"]:
                silent.append((path, value))
    assert silent == []


def test_the_chart_holds_the_same_crds() -> None:
    source = {file.name: file.read_bytes() for file in (ROOT / "crds").glob("*.yaml")}
    copy = {file.name: file.read_bytes() for file in (ROOT / "charts/gpumeter/crds").iterdir()}
    assert copy == source, "run: make chart-crds"
    assert set(source) == {f"{plural}.yaml" for plural in CRDS}


@pytest.mark.parametrize("plural", CRDS)
def test_text_in_rules_has_a_bound(plural: str) -> None:
    """The API server reckons the cost of a rule by the longest input; without a bound it refuses the CRD one day."""
    unbound = [
        path
        for path, field in own_fields(plural)
        if field.get(RULE_KEY) and (field.get("type") == "string" or field.get("x-kubernetes-int-or-string"))
        if "maxLength" not in field and "enum" not in field
    ]
    assert unbound == []


def test_each_figure_of_a_service_says_what_it_is_of_which_time_and_in_which_unit() -> None:
    said = dict(own_fields("inferenceservices"))
    for name, *words in (
        ("gpuSeconds", "requests used", "attributed", "running hour", "seconds of one GPU"),
        ("unaccounted", "nobody measured", "running hour", "seconds of one GPU"),
        ("gpuHours", "pods held", "allocated", "running month", "hours of one GPU", "GPU-HOURS"),
        ("cost", "reports", "running month", "currency", "COST"),
    ):
        text = said[f"status.usage.{name}"]["description"]
        assert [word for word in words if word not in text] == [], name


def test_the_text_of_a_report_promises_what_reports_hold() -> None:
    said = dict(own_fields("usagereports"))
    told = {name: said[f"status.{name}"]["description"] for name in TOLD}
    assert "hashes of this report's records" in told["digest"], "it is not what the next report names"
    assert "Final report before this one" in told["previousDigest"] and "64 zeros" in told["previousDigest"]
    assert "ended in the period" in told["sessions"]
    assert "crosses the period's edge" in told["accounts.unaccounted"]
