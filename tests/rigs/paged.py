"""Tiny models of random weights on a paged cache, decoded greedily step by step: the same on a CPU and on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from gpumeter_worker.engine import paged, paged_attention
from gpumeter_worker.engine.blocks import Copy
from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.paged_attention import Backend, Heads, PagedCache
from gpumeter_worker.engine.paged_steps import PagedSteps, make_forward
from gpumeter_worker.engine.sampling import Sampler, choose, read
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.metering.clock import StepClock

SIZE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far enough apart that the order of a sum cannot change the largest
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
UNTIED = {"tie_word_embeddings": False}  # else random weights repeat the last token for ever
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral with a window shorter than its prompts": ("MistralConfig", {"sliding_window": 8}),
    "gemma2: a softcap, and a window in every other layer": (
        "Gemma2Config",
        {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16} | UNTIED,
    ),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "query_pre_attn_scalar": 16} | UNTIED),
}
PROMPTS = [[(7 * row + 3 * column) % 97 + 1 for column in range(length)] for row, length in enumerate((3, 40, 16, 1))]
MAX_MODEL_LEN = 96


def tiny_model(kind: str, device: str) -> Any:
    torch.manual_seed(5)
    config_name, changes = KINDS[kind]
    config = getattr(transformers, config_name)(**SIZE | changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)


def heads_of(model: Any) -> Heads:
    config = model.config.get_text_config()
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)


def expected(model: Any, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """What transformers' own `generate` gives."""
    device = next(model.parameters()).device
    return [
        model.generate(torch.tensor([prompt], device=device), max_new_tokens=count, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


def steps_for(
    model: Any,
    backend: Backend,
    device: str,
    *,
    blocks: int = 40,
    multiprocessors: int = 0,
    max_model_len: int = MAX_MODEL_LEN,
) -> PagedSteps:
    model.set_attn_implementation(paged_attention.NAME)
    heads = heads_of(model)
    cache = PagedCache(model.config.get_text_config().num_hidden_layers, blocks, heads, torch.float32, device)
    return PagedSteps(
        make_forward(model, backend),
        cache,
        heads,
        device=device,
        max_model_len=max_model_len,
        block_q=backend.block_q,
        multiprocessors=multiprocessors,
    )


def greedy(
    steps: PagedSteps,
    prompts: Sequence[list[int]],
    count: int,
    *,
    chunk: int = 100,
    on_step: Callable[[int | None], None] = lambda bucket: None,
) -> list[list[int]]:
    """Prompts in chunks, mixed with the decodes of those that are through; blocks are handed out in no order."""
    free = torch.randperm(steps.cache.blocks, generator=torch.Generator().manual_seed(2)).tolist()
    sequences = [
        EngineSequence("", number, "", list(prompt), len(prompt), Sampling(count))
        for number, prompt in enumerate(prompts)
    ]
    running = list(sequences)
    while running:
        rows = []
        for sequence in running:
            new = min(chunk, len(sequence.tokens) - sequence.computed)
            while len(sequence.blocks) < paged.blocks_for(sequence.computed + new):
                sequence.blocks.append(free.pop())
            samples = sequence.computed + new == len(sequence.tokens)
            rows.append(Work(sequence, new, samples=samples, prefill=sequence.prefilling))
        with torch.inference_mode():
            staged = steps.stage(rows)
            tokens = iter(steps.logits(staged).argmax(-1).tolist())
        on_step(staged.bucket)
        for work in rows:
            work.sequence.computed += work.count
            if work.samples:
                work.sequence.tokens.append(next(tokens))
        running = [one for one in running if one.generated < count]
    return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]


class PagedRunner:
    """A real engine's runner over a paged cache on a CPU: what a GPU's is, without graphs."""

    def __init__(self, model: Any, blocks: int, max_model_len: int) -> None:
        config = model.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim)
        backend, _ = paged_attention.choose("gather", heads, torch.float32, "cpu")
        model.set_attn_implementation(paged_attention.NAME)
        self._steps = PagedSteps(
            make_forward(model, backend),
            PagedCache(config.num_hidden_layers, blocks, heads, torch.float32, "cpu"),
            heads,
            device="cpu",
            max_model_len=max_model_len,
            block_q=backend.block_q,
            multiprocessors=0,
        )
        self._sampler = Sampler(config.vocab_size, frozenset({2}), "cpu")

    def copy(self, copies: Sequence[Copy]) -> None:
        assert not copies, "blocks are shared, not copied"

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        with torch.inference_mode():
            staged = self._steps.stage(plan)
            sequences = [work.sequence for work in plan if work.samples]
            batch = self._sampler.prepare(sequences)
            clock.begin()
            logits = self._steps.logits(staged)
            chosen = choose(logits, batch) if sequences else None
            clock.end()
            return [] if chosen is None else read(chosen, batch)
