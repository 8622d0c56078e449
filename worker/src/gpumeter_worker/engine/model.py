"""Loads a model and runs planned steps on its device.

Owns torch, transformers and the cache. Does not know sessions, tenants or the channel; raises LoadFailed with a reason
and a sentence where the machine or the files are wrong.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gpumeter_worker.engine import attention
from gpumeter_worker.engine.loop import Sampled
from gpumeter_worker.engine.messages import EngineOptions, Ready
from gpumeter_worker.engine.sampling import Sampler, choose, read
from gpumeter_worker.engine.scheduler import Work
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.engine.sequence import Sequence as EngineSequence
from gpumeter_worker.metering.clock import StepClock

DEFAULT_MAX_MODEL_LEN = 4096
_CACHE_SHARE = 0.8
"""How much of the memory that is left after loading the cache may take."""

_CPU_WARM_TOKENS = 64
"""A CPU allocates nothing by the size of a chunk; the largest would cost seconds."""


class LoadFailed(Exception):
    """The model cannot be served here. `reason` is one of the worker's fatal reasons."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelRunner:
    """A loaded model with its cache. One step at a time, on one stream."""

    def __init__(self, options: EngineOptions) -> None:
        torch.set_num_threads(options.threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._device = options.device
        if options.device != "cpu" and not torch.cuda.is_available():
            raise LoadFailed(
                "GpuNotFound",
                f"a GPU was asked for and torch {torch.__version__} finds none it can use; check the node's driver "
                "against the image's CUDA version, or ask for 0 GPUs to run on the CPU",
            )
        self._config = _config(options.model_path)
        self._text = self._config.get_text_config(decoder=True)
        self._dtype = _dtype(options.dtype, self._config, options.device)
        self._model = self._load(options)
        self.max_model_len = _max_length(options.max_model_len, self._text)
        self.slots = self._fit(options)
        self._cache = self._make_cache()
        self._sampler = Sampler(self._text.vocab_size, _eos_ids(self._model), self._device)

    def run(self, plan: Sequence[Work], clock: StepClock) -> list[Sampled]:
        """One forward pass over the packed rows of a plan, and one new token for every work that samples."""
        rows = attention.order(plan)
        with torch.inference_mode():
            step = attention.step_context(rows, self._cache, self._device)
            tokens: list[int] = []
            last: list[int] = []
            sampling: list[Work] = []
            for work in rows:
                start = work.sequence.computed
                tokens += work.sequence.tokens[start : start + work.count]
                if work.samples:
                    last.append(len(tokens) - 1)
                    sampling.append(work)
            input_ids = torch.tensor([tokens], device=self._device)
            keep = torch.tensor(last, dtype=torch.long, device=self._device)
            batch = self._sampler.prepare([work.sequence for work in sampling])
            clock.begin()
            logits = self._model(
                input_ids=input_ids,
                position_ids=step.positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=keep,
                step=step,
            ).logits[0]
            chosen = choose(logits, batch) if sampling else None
            clock.end()
            found = [] if chosen is None else read(chosen, batch)
        by_work = dict(zip(map(id, sampling), found, strict=True))
        return [by_work[id(work)] for work in plan if work.samples]

    def warm_up(self, clock: StepClock, step_tokens: int) -> None:
        """Run a large chunk and a full batch of decodes once, so that no user's first step pays for start-up."""
        try:
            most = step_tokens if self._device != "cpu" else min(step_tokens, _CPU_WARM_TOKENS)
            count = max(1, min(most, self.max_model_len - 2))
            sampling = Sampling(max_tokens=2, temperature=1.0, top_p=0.9, seed=0)
            chunk = EngineSequence("", 0, "", [1] * count, count, sampling, blocks=[0])
            self.run([Work(chunk, count, samples=True, prefill=True)], clock)
            decodes = [EngineSequence("", 0, "", [1], 1, sampling, blocks=[slot]) for slot in range(self.slots)]
            self.run([Work(one, 1, samples=True, prefill=False) for one in decodes], clock)
        except attention.AttentionUnsupported as error:
            raise LoadFailed("ModelInvalid", f"{error}; serve another model") from error
        except torch.OutOfMemoryError as error:
            raise LoadFailed("OutOfMemory", _first_line(error) + "; lower maxModelLen or maxBatchSize") from error
        if self._device != "cpu":
            torch.cuda.synchronize()
        clock.harvest()

    def ready(self, at_ns: int) -> Ready:
        """What admission must know."""
        eos_ids = _eos_ids(self._model)
        name, uuid = "cpu", ""
        if self._device != "cpu":
            properties = torch.cuda.get_device_properties(0)
            name, uuid = properties.name, str(getattr(properties, "uuid", ""))
        return Ready(
            at_ns=at_ns,
            max_model_len=self.max_model_len,
            max_batch_size=self.slots,
            vocabulary=self._text.vocab_size,
            eos_ids=eos_ids,
            device_name=name,
            gpu_uuid=uuid,
            dtype=str(self._dtype).removeprefix("torch."),
            cache_tokens=self.slots * self.max_model_len,
        )

    def _load(self, options: EngineOptions) -> Any:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                options.model_path, dtype=self._dtype, local_files_only=True, use_safetensors=True
            ).eval()
            model = model.to(options.device)
        except torch.OutOfMemoryError as error:
            raise LoadFailed(
                "OutOfMemory", f"the weights do not fit on the GPU ({_first_line(error)}); use a smaller model or dtype"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise LoadFailed(
                "ModelInvalid", f"the model at {options.model_path} cannot be loaded: {_first_line(error)}"
            ) from error
        except Exception as error:  # safetensors raises a type of its own that is no subclass of these
            raise LoadFailed(
                "ModelInvalid",
                f"the weights at {options.model_path} are damaged ({_first_line(error)}); copy the model again",
            ) from error
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise LoadFailed(
                "ModelInvalid",
                f"{type(model).__name__} does not use transformers' attention interface; serve another model",
            )
        return model

    def _make_cache(self) -> attention.SlotCache:
        try:
            shape = (self.slots, self._kv_heads(), self.max_model_len, self._head_dim())
            return attention.SlotCache(self._text.num_hidden_layers, shape, self._dtype, self._device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise LoadFailed("OutOfMemory", f"{_first_line(error)}; lower maxModelLen or maxBatchSize") from error

    def _fit(self, options: EngineOptions) -> int:
        """How many sequences of full length the memory holds, at most maxBatchSize."""
        free_bytes = _free_bytes(options)
        slot_bytes = self._kv_token_bytes() * self.max_model_len
        if free_bytes is None:
            return options.max_batch_size
        slots = min(options.max_batch_size, int(free_bytes * _CACHE_SHARE) // slot_bytes)
        if slots < 1:
            raise LoadFailed(
                "OutOfMemory",
                f"one sequence of {self.max_model_len} tokens needs {slot_bytes // 2**20} MiB of cache and "
                f"{free_bytes // 2**20} MiB are free; give the worker more memory or lower maxModelLen",
            )
        return slots

    def _kv_heads(self) -> int:
        return int(getattr(self._text, "num_key_value_heads", None) or self._text.num_attention_heads)

    def _head_dim(self) -> int:
        head_dim = getattr(self._text, "head_dim", None)
        return int(head_dim or self._text.hidden_size // self._text.num_attention_heads)

    def _kv_token_bytes(self) -> int:
        return 2 * int(self._text.num_hidden_layers) * self._kv_heads() * self._head_dim() * self._dtype.itemsize


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise LoadFailed("ModelInvalid", f"{path}/config.json cannot be used: {_first_line(error)}") from error


def _dtype(asked: str, config: Any, device: str) -> torch.dtype:
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    own = getattr(torch, own) if isinstance(own, str) else own
    return torch.float32 if own is torch.float16 and device == "cpu" else own


def _max_length(asked: int, config: Any) -> int:
    """What was asked for (0 asks for nothing), or the model's own limit where that is smaller."""
    own = int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN)
    return min(asked or DEFAULT_MAX_MODEL_LEN, own)


def _eos_ids(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list | tuple) else frozenset((found,))


def _free_bytes(options: EngineOptions) -> int | None:
    if options.device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    if not options.memory_bytes:
        return None
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return options.memory_bytes - resident_pages * os.sysconf("SC_PAGE_SIZE")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:300]
