"""What a reason means stands in one place, and names only reasons that somebody gives."""

from pathlib import Path

import pytest

import gpumeter_operator
from gpumeter_operator.decide import reasons
from gpumeter_operator.decide.development import development_problems
from gpumeter_operator.decide.placement import NodeChoice, placement_problems
from gpumeter_operator.decide.spec import read
from gpumeter_operator.gateway.outlook import outlook

PACKAGE = Path(gpumeter_operator.__file__).parent
SOURCES = "\n".join(one.read_text() for one in PACKAGE.rglob("*.py") if one.name != "reasons.py")
WORKER = "\n".join(one.read_text() for one in (PACKAGE.parents[2] / "worker/src").rglob("*.py"))


@pytest.mark.parametrize("table", ["ORDINARY", "STARTING", "LASTING", "UNMETERED", "NOT_AUTOSCALED"])
def test_every_reason_of_a_table_is_one_that_the_operator_or_a_worker_gives(table: str) -> None:
    given = SOURCES + WORKER
    assert not {reason for reason in getattr(reasons, table) if f'"{reason}"' not in given}


def test_what_keeps_a_spec_from_being_run_is_nothing_that_a_gateway_waits_for() -> None:
    broken = {
        "engine": {"type": "vllm"},
        "resources": {"gpu": {"class": "h200"}},
        "development": {"jupyter": True},
        "template": {"spec": {"volumes": ["data"]}},
    }
    metadata = {"namespace": "team-a", "name": "m", "uid": "u-1", "generation": 1}
    spec, problems = read({"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}, **broken}})
    problems += placement_problems(spec, {"h100": NodeChoice({"pool": "h100"})}) + development_problems(spec, "")
    told = {problem.reason for problem in problems}
    assert told == {"NotSupported", "TemplateInvalid", "GpuClassUnknown", "DevelopmentImageMissing"}
    for reason in told:
        ready = {"type": "Ready", "status": "False", "reason": reason, "message": "Because."}
        assert not outlook({"metadata": metadata, "spec": {}, "status": {"conditions": [ready]}}).comes, reason
