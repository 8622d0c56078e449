"""Kinds of models, each tiny and of random weights: the engine gives the tokens of transformers' own `generate`."""

from pathlib import Path
from typing import Any

import pytest

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import EngineOptions, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.clock import HostClock

NEW_TOKENS = 24
PROMPTS = [[(7 * row + 3 * column) % 97 + 1 for column in range(length)] for row, length in enumerate((3, 40, 11, 1))]
SIZE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far enough apart that the order of a sum cannot change the largest
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "llama": ("LlamaConfig", {}),
    "llama with one head of keys and values and a head size of its own": (
        "LlamaConfig",
        {"num_key_value_heads": 1, "head_dim": 24},
    ),
    "qwen2": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral with a window shorter than its prompts": ("MistralConfig", {"sliding_window": 8}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_gets_generates_tokens_in_mixed_batches_with_forced_chunks(kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    from gpumeter_worker.engine.model import ModelRunner

    torch.manual_seed(5)
    config_name, changes = KINDS[kind]
    config = getattr(transformers, config_name)(**SIZE | changes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert all(len(set(tokens)) > 2 for tokens in expected), "a model that repeats itself proves nothing"

    runner = ModelRunner(EngineOptions(tmp_path, "cpu", "float32", 128, 3, 16, 0, 2, 0))
    engine = Engine(runner, HostClock(), Limits(3, 16), frozenset(), 128)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Submit(str(number), prompt, Sampling(max_tokens=NEW_TOKENS, temperature=0)))
    given: dict[str, list[int]] = {}
    while engine.busy:
        for event in engine.turn():
            for token in event.tokens if isinstance(event, StepReport) else ():
                given.setdefault(token.session_id, []).append(token.token)
    assert given == {str(number): tokens for number, tokens in enumerate(expected)}
