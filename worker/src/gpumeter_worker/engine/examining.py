"""Asks a loaded model, by one token, what its layers want of attention, and refuses what would be computed wrongly.

Owns what a model must keep to besides what engine.interface refuses in every step: shapes, one call of attention for
each layer, no mask of the model's own. Runs once, before a cache is made, so that no step has to look. Knows no cache
and no device: attention gives zeros here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpumeter_worker.engine.interface import Asked, AttentionUnsupported, answering, register
from gpumeter_worker.engine.paged_attention import Heads

NAME = "gpumeter_examined"


@dataclass(frozen=True, slots=True)
class _Examination:
    """What the model's configuration promises, and what each layer asked for instead of the step."""

    heads: Heads
    layers: int
    asked: dict[int, Asked] = field(default_factory=dict)


def examine(model: Any, heads: Heads, layers: int, max_model_len: int) -> None:
    """Run one token through a model, with attention that only looks; the model is afterwards as it was.

    Raises AttentionUnsupported, with a sentence, where a layer's query, key or value is not of `heads`' shape, where
    layers would share a place in the cache or have none, and where the model keeps to a window, or to any other mask,
    without telling attention. transformers makes no mask for an implementation that it does not know.
    """
    device = model.get_input_embeddings().weight.device
    examination = _Examination(heads, layers)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=device),
            position_ids=torch.zeros((1, 1), dtype=torch.long, device=device),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=1,
            step=examination,
        )
    finally:
        model.set_attn_implementation(before)
    text = model.config.get_text_config(decoder=True)
    if problem := _window_problem(
        int(getattr(text, "sliding_window", None) or 0) if getattr(text, "use_sliding_window", True) else 0,
        getattr(text, "layer_types", None) or (),
        {layer: asked.window for layer, asked in examination.asked.items()},
        max_model_len,
    ):
        raise AttentionUnsupported(problem)


def _window_problem(
    window: int, kinds: "list[str] | tuple[str, ...]", told: Mapping[int, int | None], max_model_len: int
) -> str:
    """A sentence when layers keep to a window of so many tokens, 0: to none, of which attention is not `told`.

    Without `kinds` of layers nobody knows which of them do: then one that tells its window is enough.
    """
    if not 0 < window < max_model_len:
        return ""
    if kinds:
        untold = any(told.get(layer, window) is None for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        untold = all(one is None for one in told.values())
    if not untold:
        return ""
    return (
        f"this model sees the last {window} tokens only and does not tell attention so, which would see all of them; "
        f"set spec.model.maxModelLen to at most {window}"
    )


def _look(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, step: _Examination
) -> torch.Tensor:
    """See interface.Attend."""
    heads, rows = step.heads, query.shape[2]
    shapes = {
        "query": (query, (1, heads.query, rows, heads.dim)),
        "key": (key, (1, heads.kv, rows, heads.dim)),
        "value": (value, (1, heads.kv, rows, heads.dim)),
    }
    for name, (tensor, expected) in shapes.items():
        if tuple(tensor.shape) != expected:
            raise AttentionUnsupported(
                f"layer {asked.layer} of this model has a {name} of {_shape(tensor.shape)} and its configuration says "
                f"{_shape(expected)}; this engine computes attention whose queries, keys and values are of one size in "
                "all layers, and no latent attention (MLA) yet"
            )
    if not 0 <= asked.layer < step.layers:
        raise AttentionUnsupported(
            f"this model has a layer {asked.layer} and its configuration says that there are {step.layers}"
        )
    if asked.layer in step.asked:
        raise AttentionUnsupported(f"layer {asked.layer} of this model asks for attention more than once")
    step.asked[asked.layer] = asked
    return query.new_zeros((1, rows, heads.query, heads.dim))


def _shape(sizes: "torch.Size | tuple[int, ...]") -> str:
    return f"{sizes[1]} heads of {sizes[3]}"


_answer = answering(_look)


def _refuse_masks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *others: Any,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None:
        raise AttentionUnsupported("this model gives attention a mask of its own, which the engine does not apply")
    return _answer(module, query, key, value, None, *others, **named)


register(NAME, _refuse_masks)
