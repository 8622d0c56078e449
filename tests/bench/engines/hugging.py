"""transformers on its own, in three ways: `generate` one prompt at a time, `generate` on a padded batch, and its own
continuous batching.
"""

import threading
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StoppingCriteria
from transformers.utils import logging as transformers_logging

from bench.engines.serving import Engine, Setup, Stepping, serve


def make(setup: Setup) -> Engine:
    """`mode` is single, static or continuous."""
    torch.set_num_threads(setup.threads)
    transformers_logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.bfloat16, local_files_only=True).eval()
    model.generation_config.eos_token_id = None
    return Continuous(model, setup) if setup.mode == "continuous" else Generate(model, together=setup.mode == "static")


class Generate:
    """`generate`, on all prompts together (the same length here, so that nothing is padded) or one after the other."""

    def __init__(self, model: Any, *, together: bool) -> None:
        self._model = model
        self._together = together

    def about(self) -> dict[str, str]:
        """See Engine."""
        return {"torch": torch.__version__, "transformers": transformers.__version__, "remarks": ""}

    def batch(self, prompts: list[list[int]], new: int, stream: bool) -> list[list[float]]:
        """See Engine. The times come for nothing, so they are taken in any case."""
        if self._together:
            return [self._generate(prompts, new)] * len(prompts)
        return [self._generate([prompt], new) for prompt in prompts]

    def _generate(self, prompts: list[list[int]], new: int) -> list[float]:
        times = Times()
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[times],
        )
        return times.seen


class Times(StoppingCriteria):
    """Stops nothing; is asked after every token, and looks at the clock."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.seen.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Continuous(Stepping):
    """The manager runs steps in a thread of its own. No prefix sharing, as everywhere; a cache for 64 of 2,048."""

    def __init__(self, model: Any, setup: Setup) -> None:
        page = 256
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=setup.sequences * setup.model_len // page,
            max_batch_tokens=setup.step_tokens,
            max_requests_per_batch=setup.sequences,
            allow_block_sharing=False,
        )
        wish = GenerationConfig(max_new_tokens=setup.model_len, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(generation_config=wish, continuous_batching_config=config)
        self._manager.start()
        self._given: dict[str, int] = {}

    def about(self) -> dict[str, str]:
        """See Engine."""
        return {"torch": torch.__version__, "transformers": transformers.__version__, "remarks": ""}

    def submit(self, name: str, prompt: list[int], new: int, *, stream: bool) -> None:
        """See Stepping."""
        self._given[name] = 0
        self._manager.add_request(prompt, request_id=name, max_new_tokens=new, streaming=stream)

    def step(self) -> list[tuple[str, int]]:
        """See Stepping."""
        result = self._manager.get_result(timeout=60)
        if result is None or result.error is not None:
            raise AssertionError(f"continuous batching gave up: {result and result.error}")
        count = len(result.generated_tokens) - self._given[result.request_id]
        self._given[result.request_id] += count
        return [(result.request_id, count)]


if __name__ == "__main__":
    threading.current_thread().name = "bench"
    serve(make)
