"""The engine on a GPU: the same tokens as `generate`, and steps whose shares add up to what events measured."""

from collections.abc import Sequence

import pytest
import torch

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import EngineOptions, Event, StepReport, Submit
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, uncalibrated
from gpumeter_worker.metering.clock import Anchor, step_clock
from gpumeter_worker.metering.meter import Identity, Meter
from rigs.worker import model_path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def run(dtype: str, submits: Sequence[Submit], *, graphs: bool = True) -> list[Event]:
    """Serve the requests with an engine as a worker starts it, warmed up and all."""
    from gpumeter_worker.engine.model import ModelRunner

    runner = ModelRunner(
        EngineOptions(
            model_path=model_path(),
            device="cuda",
            dtype=dtype,
            max_model_len=512,
            max_batch_size=8,
            max_batch_tokens=64,
            max_wait_ms=0,
            threads=4,
            memory_bytes=0,
            cuda_graphs=graphs,
        )
    )
    clock = step_clock("cuda")
    runner.warm_up(clock)
    assert runner.ready(0).remarks == ()
    engine = Engine(runner, clock, runner.limits, frozenset({2}), runner.max_model_len, runner.blocks())
    for submit in submits:
        engine.submit(submit)
    events: list[Event] = []
    while engine.busy:
        events += engine.turn()
    return events


def tokens(events: Sequence[Event]) -> dict[str, list[int]]:
    given: dict[str, list[int]] = {}
    for event in events:
        for token in event.tokens if isinstance(event, StepReport) else ():
            given.setdefault(token.session_id, []).append(token.token)
    return given


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 40_000, (length,), generator=generator).tolist() for length in (5, 90, 33, 200)]


def test_greedy_tokens_equal_generate_in_mixed_batches_in_fp32() -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).to("cuda")
    submits = [Submit(str(i), prompt, Sampling(16, temperature=0)) for i, prompt in enumerate(prompts())]
    given = tokens(run("float32", submits))
    for submit in submits:
        made = reference.generate(torch.tensor([submit.prompt], device="cuda"), max_new_tokens=16, do_sample=False)
        assert given[submit.session_id] == made[0, len(submit.prompt) :].tolist()


def test_graphs_change_no_token() -> None:
    submits = [Submit(str(i), p, Sampling(24, temperature=0.8, seed=i)) for i, p in enumerate(prompts())]
    assert tokens(run("float32", submits)) == tokens(run("float32", submits, graphs=False))


def test_shares_add_up_to_what_the_events_measured() -> None:
    submits = [Submit(str(i), p, Sampling(32, temperature=0.8, seed=i)) for i, p in enumerate(prompts())]
    identity = Identity("worker", "boot", "team/model", "model", "gpu", "cuda")
    anchor = Anchor.now()
    import time

    began_ns = anchor.utc_ns(time.monotonic_ns())
    meter = Meter(identity, uncalibrated(Rule.KNEE, "cuda"), began_ns)
    events = run("bfloat16", submits)
    steps = [event for event in events if isinstance(event, StepReport)]
    meter.enter(Phase.SERVING, anchor.utc_ns(steps[0].started_ns))
    for submit in submits:
        meter.begin(submit.session_id, "acme", anchor.utc_ns(steps[0].started_ns))
    measured_ns = booked_ns = 0
    for step in steps:
        shares = meter.step(anchor.utc_ns(step.started_ns), anchor.utc_ns(step.ended_ns), step.gpu_ns, step.parts)
        measured_ns += step.gpu_ns
        booked_ns += sum(shares)
    assert booked_ns <= measured_ns
    assert measured_ns - booked_ns <= measured_ns // 1000  # two clocks on one timeline: parts per thousand at most
    assert sum(meter.accounts.totals_ns.values()) == meter.accounts.frontier_ns - began_ns
