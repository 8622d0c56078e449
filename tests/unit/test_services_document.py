"""docs/services.md says what the operator does: its objects, its reasons, its settings."""

import re
from pathlib import Path

from gpumeter_operator.decide.access import Monitoring, Peers
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/services.md").read_text()
SOURCES = "\n".join(
    file.read_text() for folder in ("operator", "worker") for file in (ROOT / folder / "src").rglob("*.py")
)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    table = TEXT[TEXT.index(heading) :].partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_objects_is_what_is_made_of_a_service() -> None:
    metadata = {"namespace": "team-a", "name": "NAME", "uid": "u-1", "generation": 1}
    plain = {"model": {"uri": "hf://o/n"}}
    peers = Peers(({"podSelector": {}},), ({"podSelector": {}},))
    whole = Installation(
        "worker:1", "IfNotPresent", "", peers=peers, monitoring=Monitoring({}, "15s"), development_image="notebook:1"
    )
    names = set()
    for wanted in (plain, {**plain, "development": {"jupyter": True}}):
        spec, _ = read({"metadata": metadata, "spec": wanted})
        made = build(spec, 1, whole, credentials_of(b"k" * 32, "u-1"))
        names |= {(one["kind"], f"`{one['metadata']['name']}`") for one in (*made.secrets, *made.others)}
    assert {(kind, name) for kind, name, *_ in rows("# What the operator makes")} == names


def test_every_reason_that_is_named_is_one_that_the_code_gives() -> None:
    told = {reason for row in rows("## Rollouts") for reason in re.findall(r"`([A-Z]\w+)`", row[0])}
    told |= set(re.findall(r"\(`([A-Z][A-Za-z]+)`\)", TEXT)) - {"False"}
    assert len(told) > 15
    assert not {reason for reason in told if f'"{reason}"' not in SOURCES}


def test_every_last_word_of_a_worker_is_in_the_table() -> None:
    told = {reason for row in rows("## Rollouts") for reason in re.findall(r"`([A-Z]\w+)`", row[0])}
    source = (ROOT / "worker/src/gpumeter_worker/failure.py").read_text()
    last_words = set(re.findall(r'^[A-Z_]+ = "([A-Z]\w+)"$', source, re.MULTILINE))
    assert len(last_words) > 15
    assert last_words - told == set()


def test_every_value_of_the_chart_that_is_named_is_there() -> None:
    values = (ROOT / "charts/gpumeter/values.yaml").read_text()
    named = re.findall(r"`((?:workers|operator)\.[A-Za-z.]+|gpuClasses|developmentImage)`", TEXT)
    assert len(set(named)) >= 6
    for path in named:
        assert re.search(rf"^ *{path.rpartition('.')[2]}:", values, re.MULTILINE), path
