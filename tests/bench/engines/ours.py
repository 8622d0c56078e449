"""This project's engine, as its own process runs it: the loop, the scheduler, the runner and the clock."""

import time
from pathlib import Path

import torch
import transformers

from bench.engines.serving import Setup, Stepping, serve
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Ended, EngineOptions, StepReport, Submit
from gpumeter_worker.engine.model import ModelRunner
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.machine import memory_bytes
from gpumeter_worker.metering.clock import step_clock


class Ours(Stepping):
    """`mode` is eager or compiled. Prefix caching is off: a figure of throughput must not be one of a cache."""

    def __init__(self, setup: Setup) -> None:
        options = EngineOptions(
            model_path=Path(setup.model),
            device="cpu",
            dtype="bfloat16",
            max_model_len=setup.model_len,
            max_batch_size=setup.sequences,
            max_batch_tokens=setup.step_tokens,
            max_wait_ms=0,
            threads=setup.threads,
            memory_bytes=memory_bytes(),
            compile=setup.mode == "compiled",
            prefix_cache=False,
        )
        runner = ModelRunner(options)
        clock = step_clock(options.device)
        runner.warm_up(clock)
        self._ready = runner.ready(time.monotonic_ns())
        self._engine = Engine(runner, clock, runner.limits, self._ready.eos_ids, runner.max_model_len, runner.blocks())

    def about(self) -> dict[str, str]:
        """See Engine."""
        remarks = "; ".join(self._ready.remarks)
        return {"torch": torch.__version__, "transformers": transformers.__version__, "remarks": remarks}

    def submit(self, name: str, prompt: list[int], new: int, *, stream: bool) -> None:
        """See Stepping."""
        self._engine.submit(Submit(name, prompt, Sampling(new, temperature=0.0, ignore_eos=True)))

    def step(self) -> list[tuple[str, int]]:
        """See Stepping."""
        given = []
        for event in self._engine.turn():
            if isinstance(event, StepReport):
                given += [(token.session_id, 1) for token in event.tokens]
            elif isinstance(event, Ended) and event.finish is not Finish.LENGTH:
                raise AssertionError(f"{event.session_id} ended: {event.finish} {event.message}")
        return given


if __name__ == "__main__":
    serve(Ours)
