"""Kinds of models, each tiny and of random weights: the engine gives the tokens of transformers' own `generate`."""

from pathlib import Path
from typing import Any

import pytest

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import EngineOptions, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.clock import HostClock
from rigs.paged import KINDS, SIZE, UNTIED

pytestmark = pytest.mark.shared

NEW_TOKENS = 24
PROMPTS = [[(7 * row + 3 * column) % 97 + 1 for column in range(length)] for row, length in enumerate((3, 40, 11, 1))]
MORE = {
    "llama with one head of keys and values and a head size of its own": (
        "LlamaConfig",
        {"num_key_value_heads": 1, "head_dim": 24},
    ),
    "mistral without a window": ("MistralConfig", {"sliding_window": None}),
    "gemma": ("GemmaConfig", UNTIED),
}
ALL = KINDS | MORE


@pytest.mark.parametrize("kind", ALL)
def test_a_kind_of_model_gets_generates_tokens_in_mixed_batches_with_forced_chunks(kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    from gpumeter_worker.engine.model import ModelRunner

    torch.manual_seed(5)
    config_name, changes = ALL[kind]
    config = getattr(transformers, config_name)(**SIZE | changes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert all(len(set(tokens)) > 2 for tokens in expected), "a model that repeats itself proves nothing"

    runner = ModelRunner(EngineOptions(tmp_path, "cpu", "float32", 128, 3, 16, 0, 1, 0))
    engine = Engine(runner, HostClock(), Limits(3, 16), frozenset(), 128)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Submit(str(number), prompt, Sampling(max_tokens=NEW_TOKENS, temperature=0)))
    given: dict[str, list[int]] = {}
    while engine.busy:
        for event in engine.turn():
            for token in event.tokens if isinstance(event, StepReport) else ():
                given.setdefault(token.session_id, []).append(token.token)
    assert given == {str(number): tokens for number, tokens in enumerate(expected)}


def test_keys_and_values_that_are_no_numbers_fail_their_own_request_and_nobody_after_it(tmp_path: Path) -> None:
    import torch
    import transformers

    from gpumeter_worker.engine.model import ModelRunner

    torch.manual_seed(5)
    model: Any = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZE), dtype=torch.float32)
    poison = 127
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    model.save_pretrained(tmp_path)
    runner = ModelRunner(EngineOptions(tmp_path, "cpu", "float32", 128, 2, 64, 0, 1, 0, prefix_cache=False))

    def run(*prompts: list[int]) -> list[list[int]]:
        engine = Engine(runner, HostClock(), Limits(2, 64), frozenset({0}), 128, runner.blocks())
        given: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            engine.submit(Submit(str(number), prompt, Sampling(max_tokens=6, temperature=0, logit_bias=((127, -100),))))
        while engine.busy:
            for event in engine.turn():
                for token in event.tokens if isinstance(event, StepReport) else ():
                    given[token.session_id].append(token.token)
        return list(given.values())

    short, long = [5, 6, 7], list(range(1, 41))
    alone = run(short, long)
    assert all(alone)
    assert run([*range(1, 50), poison], [*range(1, 50), poison]) == [[], []]
    assert run(short, long) == alone  # the short one is padded to the long one's length, over what the slot held


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
PER_LAYER = {"per_layer_config": {"1": {"head_dim": 32}}, "vocab_size_per_layer_input": 128}
REFUSED = {
    "layers that are no attention": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        128,
        "layers of the kind conv",
    ),
    "angles that follow the longest sequence": ("LlamaConfig", {"rope_parameters": LONGROPE}, 128, "at most 64"),
    "latent attention whose configuration tells the size of its rotated part": (
        "Glm4MoeLiteConfig",
        LATENT | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
        128,
        "a query of 4 heads of 16 and its configuration says 4 heads of 8",
    ),
    "latent attention with values smaller than its keys": (
        "DeepseekV3Config",
        LATENT | {"v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 3},
        128,
        "and its configuration says",
    ),
    "the like without experts": ("MiniCPM3Config", LATENT | {"v_head_dim": 8}, 128, "and its configuration says"),
    "heads of another size in every other layer": (
        "Gemma4TextConfig",
        {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 8}
        | PER_LAYER,
        128,
        "Gemma4TextConfig does not tell what this engine must know of every layer",
    ),
    "a window that only a mask tells": (
        "PhimoeConfig",
        {"sliding_window": 64, "num_local_experts": 4},
        128,
        "set spec.model.maxModelLen to at most 64",
    ),
    "such a window in every other layer": (
        "Qwen2MoeConfig",
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}
        | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4},
        128,
        "set spec.model.maxModelLen to at most 64",
    ),
    "a mask that the model makes itself": ("DogeConfig", {}, 128, "a mask of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_sequences_would_change_one_another_is_refused_with_a_sentence(kind: str, tmp_path: Path) -> None:
    import transformers

    from gpumeter_worker.engine.loading import LoadFailed
    from gpumeter_worker.engine.model import ModelRunner

    config_name, changes, length, said = REFUSED[kind]
    config = getattr(transformers, config_name)(**SIZE | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LoadFailed, match=said) as refused:
        ModelRunner(EngineOptions(tmp_path, "cpu", "float32", length, 3, 16, 0, 1, 0))
    assert refused.value.reason == "ModelInvalid"


def test_angles_that_would_follow_a_long_sequence_are_fine_where_none_gets_that_long(tmp_path: Path) -> None:
    import transformers

    from gpumeter_worker.engine.model import ModelRunner

    _, changes, _, _ = REFUSED["angles that follow the longest sequence"]
    config = transformers.LlamaConfig(**SIZE | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    runner = ModelRunner(EngineOptions(tmp_path, "cpu", "float32", 64, 3, 16, 0, 1, 0, sequences_max=70))
    assert (runner.max_model_len, runner.limits.waiting) == (64, 70)
