"""Compiles a model's decoder to one graph with torch.compile, on request.

Owns what a compiler must not look into: attention, which depends on the step that runs, is one opaque operation;
without that every layer is compiled anew for every step's shape. Does not know how attention is computed.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

log = logging.getLogger("gpumeter_worker.engine.compiling")

NAME = "gpumeter_opaque"

Attend = Callable[..., tuple[torch.Tensor, None]]


class _Layer:
    """All that attention wants to know of a model's module."""

    def __init__(self, index: int) -> None:
        self.layer_idx = index


class _Running:
    """Who computes attention, and the step that runs: one at a time in a process."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.step: dict[str, Any] = {}
        self.layers: list[_Layer] = []


_running = _Running()


class CompiledDecoder:
    """Replaces the decoder inside a model by a compiled one; `undo` puts the original back."""

    def __init__(self, model: Any, attend: Attend, attention_name: str) -> None:
        self._model = model
        self._attention_name = attention_name
        decoder = model.base_model
        self._decoder = decoder
        self._original = decoder.forward
        _running.attend = attend
        _running.layers = [_Layer(index) for index in range(model.config.get_text_config().num_hidden_layers)]
        model.set_attn_implementation(NAME)

        def run(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self._original(
                input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False
            ).last_hidden_state
            return hidden

        compiled = torch.compile(run, fullgraph=True, dynamic=True)

        def forward(input_ids: torch.Tensor, position_ids: torch.Tensor, **others: Any) -> BaseModelOutputWithPast:
            _running.step = {name: others[name] for name in ("step", "backend") if name in others}
            return BaseModelOutputWithPast(last_hidden_state=compiled(input_ids, position_ids))

        decoder.forward = forward

    def undo(self) -> None:
        """Everything runs eagerly again."""
        self._decoder.forward = self._original
        self._model.set_attn_implementation(self._attention_name)


def compile_decoder(
    model: Any, attend: Attend, attention_name: str, steps: list[Callable[[], torch.Tensor]], tolerance: float
) -> str:
    """Compile, try every step in turn, and say how it went in a sentence.

    Each of `steps` returns the logits of one step; they are run eagerly first, then compiled, and must agree within
    `tolerance` times the largest of them. What fails leaves the model as it was.
    """
    expected = [step().float().clone() for step in steps]
    eager_s = [_seconds(step) for step in steps]
    began = time.monotonic()
    compiled = CompiledDecoder(model, attend, attention_name)
    try:
        for step, wanted in zip(steps, expected, strict=True):
            found = step().float()
            worst = float((found - wanted).abs().max())
            if not worst <= tolerance * float(wanted.abs().max()):
                raise RuntimeError(f"its logits are off by {worst:.2g}")
    except Exception as error:  # a compiler, a C++ or a device's toolchain may raise anything
        compiled.undo()
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
        sentence = f"the model could not be compiled ({text}); it runs eagerly"
        log.warning("%s", sentence)
        return sentence
    took_s = time.monotonic() - began
    gains = ", ".join(
        f"{before * 1e3:.1f} to {_seconds(step) * 1e3:.1f} ms" for before, step in zip(eager_s, steps, strict=True)
    )
    log.info("compiled in %.0f s; steps went from %s", took_s, gains)
    return ""


def _seconds(step: Callable[[], torch.Tensor]) -> float:
    """The fastest of three runs, to the last kernel's end."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        if step().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _attend_opaquely(  # noqa: PLR0917 - the interface is transformers'
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise RuntimeError(f"this model's attention uses {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.gpumeter.attend(
        query, key, value, module.layer_idx, float(scale), sliding_window or 0, float(softcap or 0)
    )
    return out, None


def _attend(  # noqa: PLR0917 - an operation takes no keywords
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    assert _running.attend is not None  # noqa: S101 - only a compiled decoder asks
    out, _ = _running.attend(
        _running.layers[layer],
        query,
        key,
        value,
        None,
        scaling=scale,
        sliding_window=window or None,
        softcap=softcap or None,
        **_running.step,
    )
    return out.contiguous()


def _attend_shape(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


_library = torch.library.Library("gpumeter", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, float scale, int window, float softcap) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _library.impl("attend", _attend, _device)
torch.library.register_fake("gpumeter::attend", _attend_shape, lib=_library)
ALL_ATTENTION_FUNCTIONS.register(NAME, _attend_opaquely)
