"""The seam with transformers' public attention interface: what every layer asks, in one place.

Owns the interface's signature and what is refused of it: whatever this engine would silently leave out. Any decoder
that calls ALL_ATTENTION_FUNCTIONS and passes its **kwargs on works unchanged. Does not know how attention is computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NOT_COMPUTED = ("s_aux", "position_bias")


class AttentionUnsupported(Exception):
    """The model asks attention for something that this engine would silently leave out."""


class Asked(NamedTuple):
    """What a layer asks for besides its tensors.

    `scale` multiplies the scores; a token sees the last `window` tokens, None: all of them; `softcap` bends the scores
    to softcap * tanh(score / softcap), None: not at all.
    """

    layer: int
    scale: float
    window: int | None
    softcap: float | None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Asked, Any], torch.Tensor]
"""query [1, heads, rows, head_dim], key and value [1, kv_heads, rows, head_dim], what is asked, and the step that the
forward pass was given as `step` -> [1, rows, heads, head_dim]."""


def offer(name: str, attend: Attend) -> None:
    """Models whose attention implementation is `name` have it computed by `attend`."""
    register(name, answering(attend))


def register(name: str, answer: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """`answer` is called as transformers calls attention."""
    ALL_ATTENTION_FUNCTIONS.register(name, answer)


def answering(attend: Attend) -> Callable[..., tuple[torch.Tensor, None]]:
    """`attend` as transformers calls it. Only what every step must look at is looked at; see engine.examining."""

    def answer(  # noqa: PLR0917 - the interface is transformers'
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        step: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        if step is None:
            raise AttentionUnsupported("this model does not hand the step on to its attention layers")
        for one in _NOT_COMPUTED:
            if others.get(one) is not None:
                raise AttentionUnsupported(f"this model's attention uses {one}, which the engine does not compute yet")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, Asked(module.layer_idx, scale, sliding_window, softcap), step), None

    return answer
