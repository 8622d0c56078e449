"""A tiny model that is split over ranks, rank 0 of which is the test's own process; on a CPU and on GPUs alike.

Owns how it is made, started and asked. The other ranks are real processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpumeter_worker.engine.blocks import KvBlocks
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Cancel, EngineOptions, Event, StepReport, Submit
from gpumeter_worker.engine.ranks import Ranks
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.clock import step_clock
from gpumeter_worker.metering.parts import Part

KINDS: dict[str, dict[str, Any]] = {
    "qwen2, with biases, its embeddings tied": {"config": "Qwen2Config", "tie_word_embeddings": True},
    "llama": {"config": "LlamaConfig", "tie_word_embeddings": False},
}
NEW_TOKENS = 8
_ALIKE = [(5 * place) % 89 + 1 for place in range(33)]
PROMPTS = [[(7 * row + 3 * column) % 97 + 1 for column in range(length)] for row, length in enumerate((3, 40, 11, 1))]
PROMPTS += [[*_ALIKE, row] for row in (7, 8)]

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def split_model(folder: Path, kind: str) -> Any:
    """One of random weights, written to `folder`. Each of its layers is two meetings of the ranks, so it has few."""
    import torch
    import transformers

    from rigs.paged import SIZE

    torch.manual_seed(5)
    given = SIZE | {"num_hidden_layers": 2} | KINDS[kind]
    config = getattr(transformers, given.pop("config"))(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # made as zeros, which nobody would miss
    model.save_pretrained(folder)
    return model


def options(folder: Path, device: str = "cpu", ranks: int = 2) -> EngineOptions:
    """Small enough that prompts come in chunks."""
    return EngineOptions(folder, device, "float32", 128, 3, 16, 0, 1, 0, ranks=ranks)


@contextmanager
def split_runner(asked: EngineOptions) -> Iterator[Any]:
    """A runner that is ready, with its ranks; nothing of them is left afterwards, nor of what they set here."""
    import torch
    import torch.distributed as dist

    from gpumeter_worker.engine.model import ModelRunner

    lost: list[Event] = []
    threads, named = torch.get_num_threads(), {name: os.environ[name] for name in _INTERFACES if name in os.environ}
    ranks = Ranks(asked, lost.append)
    try:
        runner = ModelRunner(ranks.options, ranks)
        runner.warm_up(step_clock(asked.device))
        yield runner
        assert lost == []
    finally:
        ranks.leave()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        for name in _INTERFACES:
            os.environ.pop(name, None)
        os.environ.update(named)


def given(
    runner: Any,
    blocks: KvBlocks,
    prompts: Sequence[list[int]],
    at_once: int,
    device: str = "cpu",
    *,
    cancelled: str = "",
) -> tuple[list[list[int]], list[Part]]:
    """Every prompt's greedy tokens, so many in the engine at a time, and all parts of the steps.

    `cancelled`: the number of the prompt that nobody wants any more once it has a second token.
    """
    engine = Engine(runner, step_clock(device), Limits(3, 16), frozenset(), 128, blocks)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    parts: list[Part] = []
    coming = list(enumerate(prompts))
    while coming or engine.busy:
        while coming and engine.waiting + engine.running < at_once:
            number, prompt = coming.pop(0)
            engine.submit(Submit(str(number), prompt, Sampling(NEW_TOKENS, temperature=0)))
        for event in engine.turn():
            if isinstance(event, StepReport):
                parts += event.parts
                for token in event.tokens:
                    tokens[token.session_id].append(token.token)
        if cancelled and len(tokens[cancelled]) == 2:
            engine.cancel(Cancel(cancelled))
    return list(tokens.values()), parts


def expected(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What transformers' own `generate` gives."""
    import torch

    device = next(model.parameters()).device
    made = [
        model.generate(torch.tensor([one], device=device), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(one) :]
        for one in prompts
    ]
    return [tokens.tolist() for tokens in made]
