"""Loads a model's weights for an engine: what it is, and the sentence when it cannot be.

Owns what is read from a model's configuration. Does not know how its steps are run. Raises LoadFailed with a reason and
a sentence where the machine or the files are wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gpumeter_worker.engine.messages import EngineOptions
from gpumeter_worker.engine.paged_attention import Heads
from gpumeter_worker.engine.sharding import local_heads, split
from gpumeter_worker.failure import GPU_NOT_FOUND, MODEL_INVALID, OUT_OF_MEMORY, LoadFailed, StartupFailed, first_line
from gpumeter_worker.modelfiles import served_dtype, served_length, stored_dtype

__all__ = ["LoadFailed", "Loaded", "load"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, and what an engine must know of it. Of a split one: this rank's part, and its heads."""

    model: Any
    device: str
    dtype: torch.dtype
    layers: int
    heads: Heads
    vocabulary: int
    eos_ids: frozenset[int]
    max_model_len: int
    ranks: int = 1

    @property
    def kv_token_bytes(self) -> int:
        """What one token takes in the cache of this rank: keys and values of every layer."""
        size: int = 2 * self.layers * self.heads.kv * self.heads.dim * self.dtype.itemsize
        return size


def load(options: EngineOptions, attention: str, rank: int = 0) -> Loaded:
    """Load the model that the options name, with attention of the name given; of a split one a rank's part.

    Raises LoadFailed.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise LoadFailed(
            GPU_NOT_FOUND,
            f"a GPU was asked for and torch {torch.__version__} finds none it can use; check the node's driver "
            "against the image's CUDA version, or ask for 0 GPUs to run on the CPU",
        )
    config = _config(options.model_path)
    dtype = _dtype(options)
    with _readable(config):  # before the weights are read
        text = config.get_text_config(decoder=True)
        max_model_len = served_length(options.max_model_len, int(getattr(text, "max_position_embeddings", None) or 0))
        _refuse_moving_angles(text, max_model_len)
        layers, heads, vocabulary = int(text.num_hidden_layers), _heads(text, options), int(text.vocab_size)
    model = _model(options, dtype, attention, rank)
    _refuse_state(model, text)
    return Loaded(
        model=model,
        device=options.device,
        dtype=dtype,
        layers=layers,
        heads=heads,
        vocabulary=vocabulary,
        eos_ids=_eos_ids(model),
        max_model_len=max_model_len,
        ranks=options.ranks,
    )


def _model(options: EngineOptions, dtype: torch.dtype, attention: str, rank: int) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.model_path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=None if options.allow_pickle else True,
        ).eval()
        if options.ranks > 1:  # before it goes to a device, which need not hold the whole
            split(model, rank, options.ranks, options.device)
        model = model.to(options.device)
    except LoadFailed:
        raise
    except torch.OutOfMemoryError as error:
        raise LoadFailed(
            OUT_OF_MEMORY, f"the weights do not fit on the GPU ({first_line(error)}); use a smaller model or dtype"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise LoadFailed(
            MODEL_INVALID, f"the model at {options.model_path} cannot be loaded: {first_line(error)}"
        ) from error
    except Exception as error:  # safetensors raises a type of its own that is no subclass of these
        raise LoadFailed(
            MODEL_INVALID,
            f"the weights at {options.model_path} are damaged ({first_line(error)}); copy the model again",
        ) from error
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise LoadFailed(
            MODEL_INVALID,
            f"{type(model).__name__} does not use transformers' attention interface; serve another model",
        )
    return model


def _refuse_state(model: Any, text: Any) -> None:
    """A step holds tokens of many sequences side by side, and only attention keeps them apart."""
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(model, "_is_stateful", False):
        what = f"layers of the kind {', '.join(sorted(kinds))}" if kinds else "layers with a state of their own"
        raise LoadFailed(
            MODEL_INVALID,
            f"{type(model).__name__} has {what}, and this engine computes full and sliding attention only; serve "
            "another model",
        )


def _refuse_moving_angles(text: Any, max_model_len: int) -> None:
    """Rotary angles that follow the longest sequence of a step would change those of all others in it."""
    parameters = getattr(text, "rope_parameters", None) or {}
    for one in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if one.get("rope_type") not in {"dynamic", "longrope"}:
            continue
        fixed = int(one.get("original_max_position_embeddings") or text.max_position_embeddings)
        if max_model_len > fixed:
            raise LoadFailed(
                MODEL_INVALID,
                f"this model's rotary angles ({one['rope_type']}) change for a whole step when one sequence has more "
                f"than {fixed} tokens; set spec.model.maxModelLen to at most {fixed}",
            )


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise LoadFailed(MODEL_INVALID, f"{path}/config.json cannot be used: {first_line(error)}") from error


@contextmanager
def _readable(config: Any) -> Iterator[None]:
    """A configuration may lack an attribute, or refuse to tell it where it differs from layer to layer."""
    try:
        yield
    except LoadFailed:
        raise
    except Exception as error:
        raise LoadFailed(
            MODEL_INVALID,
            f"{type(config).__name__} does not tell what this engine must know of every layer ({first_line(error)}); "
            "serve another model",
        ) from error


def _heads(text: Any, options: EngineOptions) -> Heads:
    whole = Heads(
        query=int(text.num_attention_heads),
        kv=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
    )
    return whole if options.ranks == 1 else local_heads(whole, text, options.ranks)


def _dtype(options: EngineOptions) -> torch.dtype:
    own = ""
    if options.dtype == "auto":
        try:
            own = stored_dtype(options.model_path, allow_pickle=options.allow_pickle)
        except StartupFailed as error:
            raise LoadFailed(error.reason, error.message) from error
    dtype: torch.dtype = getattr(torch, served_dtype(options.dtype, own, gpu=options.device != "cpu"))
    return dtype


def _eos_ids(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list | tuple) else frozenset((found,))
