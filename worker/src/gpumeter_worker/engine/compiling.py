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

from gpumeter_worker.engine.interface import Asked, Attend, offer
from gpumeter_worker.failure import first_line

log = logging.getLogger("gpumeter_worker.engine.compiling")

NAME = "gpumeter_opaque"


class _Running:
    """Who computes attention, and the step that runs: one at a time in a process."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.step: object = None


_running = _Running()


class CompiledDecoder:
    """Replaces the decoder inside a model by a compiled one; `undo` puts the original back."""

    def __init__(self, model: Any, attend: Attend, attention_name: str) -> None:
        if _running.attend is not None:
            raise RuntimeError("a process compiles one decoder; undo the former first")
        self._model = model
        self._attention_name = attention_name
        decoder = model.base_model
        self._decoder = decoder
        self._original = decoder.forward
        _running.attend = attend
        model.set_attn_implementation(NAME)

        def run(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self._original(
                input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, step="the running one"
            ).last_hidden_state
            return hidden

        compiled = torch.compile(run, fullgraph=True, dynamic=True, options=_options())

        def forward(
            input_ids: torch.Tensor, position_ids: torch.Tensor, step: object, **others: Any
        ) -> BaseModelOutputWithPast:
            _running.step = step
            return BaseModelOutputWithPast(last_hidden_state=compiled(input_ids, position_ids))

        decoder.forward = forward

    def undo(self) -> None:
        """Everything runs eagerly again."""
        forget()
        self._decoder.forward = self._original
        self._model.set_attn_implementation(self._attention_name)


def forget() -> None:
    """Another decoder may be compiled in this process; the former one must not run again."""
    _running.attend = None
    torch.compiler.reset()


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
        sentence = f"the model could not be compiled ({first_line(error)}); it runs eagerly"
        log.warning("%s", sentence)
        return sentence
    took_s = time.monotonic() - began
    gains = ", ".join(
        f"{before * 1e3:.1f} to {_seconds(step) * 1e3:.1f} ms" for before, step in zip(eager_s, steps, strict=True)
    )
    log.info("compiled in %.0f s; steps went from %s", took_s, gains)
    return ""


def _options() -> dict[str, Any] | None:
    """A loaded model never changes, and to make sure of that before each step costs more than a millisecond.

    What is not guarded has to hold: one compiled decoder at a time, and every call in inference mode.
    """
    if not hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # a torch without such filters
        return None
    return {"guard_filter_fn": lambda guards: _kept([(guard.name, guard.guard_type) for guard in guards])}


def _kept(guards: list[tuple[str, str]]) -> list[bool]:
    """Those on a step's shapes and on what it is given; all of them where a torch names its inputs in another way."""
    on_input = [name in {"tokens", "positions", "L['tokens']", "L['positions']"} for name, _ in guards]
    if not any(on_input):
        return [True] * len(guards)
    return [kept or kind == "SHAPE_ENV" for kept, (_, kind) in zip(on_input, guards, strict=True)]


def _seconds(step: Callable[[], torch.Tensor]) -> float:
    """The fastest of three runs, to the last kernel's end."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        if step().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _attend_opaquely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked, step: object
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.gpumeter.attend(
        query, key, value, asked.layer, float(asked.scale), asked.window or 0, float(asked.softcap or 0)
    )
    return out


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
    asked = Asked(layer, scale, window or None, softcap or None)
    return _running.attend(query, key, value, asked, _running.step).contiguous()


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
offer(NAME, _attend_opaquely)
