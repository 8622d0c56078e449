"""Every CEL rule and the schema, asked of a real API server: what is accepted, what is refused, and in which words."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from apiserver import CRDS, ROOT, Answer, Server, collection, merged, rule_file


@dataclass(frozen=True)
class Case:
    """One manifest: a patch over the file's base, and the rule that it keeps or breaks."""

    plural: str
    base: dict[str, Any]
    rule: dict[str, Any]
    patch: dict[str, Any]


def cases(section: str, outcome: str) -> list[Any]:
    found = []
    for plural in CRDS:
        file = rule_file(plural)
        for rule in file[section]:
            patches = rule[outcome] if isinstance(rule[outcome], list) else [rule[outcome]]
            for number, patch in enumerate(patches):
                found.append(
                    pytest.param(Case(plural, file["base"], rule, patch), id=f"{plural}: {rule['name']} [{number}]")
                )
    return found


@pytest.mark.parametrize("case", cases("rules", "accepted"))
def test_a_manifest_that_keeps_the_rule_is_accepted(server: Server, namespace: str, case: Case) -> None:
    answer = attempt(server, namespace, case)
    assert answer.code in (200, 201), answer.body


@pytest.mark.parametrize("case", cases("rules", "refused"))
def test_a_manifest_that_breaks_the_rule_is_refused_with_its_sentence_and_no_other(
    server: Server, namespace: str, case: Case
) -> None:
    answer = attempt(server, namespace, case)
    assert answer.code == 422, answer.body
    [(field, message)] = answer.causes
    assert field == case.rule["field"]
    assert re.fullmatch(r"(Forbidden|Invalid value: .*?): " + re.escape(case.rule["sentence"]), message), message


@pytest.mark.parametrize("case", cases("schema", "refused"))
def test_a_manifest_against_the_schema_is_refused(server: Server, namespace: str, case: Case) -> None:
    answer = attempt(server, namespace, case)
    assert answer.code == 422, answer.body
    assert (case.rule["field"], case.rule["text"]) in answer.causes, answer.causes


def examples() -> list[Any]:
    """What a user copies first."""
    found = []
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        for number, manifest in enumerate(yaml.safe_load_all(file.read_text())):
            found.append(pytest.param(manifest, id=f"{file.stem} [{number}]"))
    return found


@pytest.mark.parametrize("manifest", examples())
def test_every_example_is_accepted(server: Server, namespace: str, manifest: dict[str, Any]) -> None:
    plural = f"{manifest['kind'].lower()}s"
    path = collection(namespace, plural) if plural in CRDS else f"/api/v1/namespaces/{namespace}/{plural}"
    here = {} if plural == "priceplans" else {"metadata": {"namespace": namespace}}
    answer = server.call("POST", f"{path}?dryRun=All&fieldValidation=Strict", merged(manifest, here))
    assert answer.code == 201, answer.body


def attempt(server: Server, namespace: str, case: Case) -> Answer:
    """Send the manifest as a dry run: as a new object, or as an update of what `before` and `status` describe."""
    status, before = bool(case.rule.get("status")), case.rule.get("before")
    if not status and before is None:
        return server.create(namespace, case.plural, merged(case.base, case.patch), dry=True)
    # Cluster-scoped objects of two tests must not meet.
    base = merged(case.base, {"metadata": {"name": f"{case.base['metadata']['name']}-{namespace[-8:]}"}})
    first = merged(base, before or {})
    made = server.create(namespace, case.plural, first)
    assert made.code == 201, made.body
    try:
        if status and before is not None:
            made = server.replace(namespace, case.plural, at_version_of(made, first), status=True)
            assert made.code == 200, made.body
        after = at_version_of(made, merged(base if status else first, case.patch))
        return server.replace(namespace, case.plural, after, status=status, dry=True)
    finally:
        server.delete(namespace, case.plural, base["metadata"]["name"])


def at_version_of(made: Answer, manifest: dict[str, Any]) -> dict[str, Any]:
    return merged(manifest, {"metadata": {"resourceVersion": made.body["metadata"]["resourceVersion"]}})
