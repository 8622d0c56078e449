"""torch.compile on request: the same tokens, compiled before readiness, and eager with a sentence where it fails."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import EngineOptions, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.clock import HostClock
from rigs.paged import KINDS, SIZE

PROMPTS = [[(7 * row + 3 * column) % 97 + 1 for column in range(length)] for row, length in enumerate((3, 40, 11, 1))]

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU, and there is none"),
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    from gpumeter_worker.engine import compiling

    compiling.forget()
    yield
    compiling.forget()


def saved(folder: Path, kind: str) -> Path:
    import torch
    import transformers

    torch.manual_seed(5)
    config_name, changes = KINDS[kind]
    config = getattr(transformers, config_name)(**SIZE | changes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def started(folder: Path, *, compiled: bool) -> Any:
    from gpumeter_worker.engine.model import ModelRunner

    runner = ModelRunner(EngineOptions(folder, "cpu", "float32", 128, 3, 16, 0, 1, 0, compile=compiled))
    runner.warm_up(HostClock())
    return runner


def tokens_of(runner: Any) -> dict[str, list[int]]:
    engine = Engine(runner, HostClock(), Limits(3, 16), frozenset(), 128)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Submit(str(number), prompt, Sampling(max_tokens=24, temperature=0)))
    given: dict[str, list[int]] = {}
    while engine.busy:
        for event in engine.turn():
            for token in event.tokens if isinstance(event, StepReport) else ():
                given.setdefault(token.session_id, []).append(token.token)
    return given


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("llama", "gemma2"))])
def test_a_compiled_model_gives_the_eager_ones_tokens_and_compiles_nothing_in_a_users_step(
    kind: str, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    folder = saved(tmp_path, kind)
    wanted = tokens_of(started(folder, compiled=False))
    counters.clear()
    runner = started(folder, compiled=True)
    assert not runner.ready(0).remarks
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2, "one for a single row, one for any other number"
    assert tokens_of(runner) == wanted
    assert counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_the_model_runs_eagerly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    wanted = tokens_of(started(folder, compiled=False))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    runner = started(folder, compiled=True)
    [remark] = runner.ready(0).remarks
    assert "could not be compiled" in remark
    assert "runs eagerly" in remark
    assert tokens_of(runner) == wanted
