"""A model's directory, read without loading it: whether it is whole, and how much memory it will take.

Owns the file formats' headers and what config.json means for memory. Knows no machine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from gpumeter_worker.failure import MODEL_INVALID, MODEL_NOT_FOUND, StartupFailed

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_MAX_MODEL_LEN = 4096
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the kinds that loading turns into the dtype that is served; others, quantised ones, stay as they are."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the files say."""

    model_type: str
    own_code: bool  # config.json names code of its own
    dtype: str  # of the weights, as config.json or else the weights say
    floats: int  # how many numbers are floating point
    other_bytes: int  # bytes of everything else
    kv_elements: int  # keys and values of one token, all layers; 0: the configuration does not say
    max_positions: int  # 0: the configuration does not say

    def weight_bytes(self, dtype: str) -> int:
        """Memory of the weights when they are served in `dtype`."""
        return self.floats * ITEM_BYTES[dtype] + self.other_bytes

    def sequence_bytes(self, dtype: str, tokens: int) -> int:
        """Memory of the keys and values of one sequence of so many tokens."""
        return self.kv_elements * ITEM_BYTES[dtype] * tokens

    def length(self, asked: int) -> int:
        """The longest sequence: what was asked for (0 asks for nothing), and never more than the model's own limit."""
        return served_length(asked, self.max_positions)


def read_model(path: Path, *, allow_pickle: bool = False) -> ModelFacts:
    """Raises StartupFailed when the folder cannot be a model: which file is missing, damaged or cut short."""
    if not path.is_dir():
        raise StartupFailed(MODEL_NOT_FOUND, f"there is no model directory {path}; check spec.model.uri and its volume")
    config = _json_file(path / "config.json")
    if "model_type" not in config:
        raise StartupFailed(MODEL_INVALID, f"{path / 'config.json'} names no model_type; copy the whole model again")
    if not (path / "tokenizer.json").is_file():
        raise StartupFailed(MODEL_INVALID, f"{path / 'tokenizer.json'} is missing; copy the whole model again")
    floats, other_bytes = _numbers(path, allow_pickle=allow_pickle)
    return ModelFacts(
        model_type=str(config["model_type"]),
        own_code=bool(config.get("auto_map")),
        dtype=_dtype(config, floats),
        floats=sum(floats.values()),
        other_bytes=other_bytes,
        kv_elements=_kv_elements(config),
        max_positions=_whole(_text(config).get("max_position_embeddings")),
    )


def stored_dtype(path: Path, *, allow_pickle: bool) -> str:
    """The dtype that a model is stored in, as config.json or else its weights say. Raises StartupFailed."""
    floats, _ = _numbers(path, allow_pickle=allow_pickle)
    return _dtype(_json_file(path / "config.json"), floats)


def served_dtype(asked: str, stored: str, *, gpu: bool) -> str:
    """What `auto` means: the model's own dtype, but float32 for float16 on a CPU, which is slow and narrow there."""
    if asked != "auto":
        return asked
    return "float32" if stored == "float16" and not gpu else stored


def served_length(asked: int, own: int) -> int:
    """The longest sequence: what was asked for, and never more than the model's own limit; 0: neither says anything."""
    return min(asked or DEFAULT_MAX_MODEL_LEN, own or DEFAULT_MAX_MODEL_LEN)


def _numbers(path: Path, *, allow_pickle: bool) -> tuple[dict[str, int], int]:
    """How many floating-point numbers of each kind the weights are, and the bytes of everything else."""
    floats: dict[str, int] = {}
    other_bytes = 0
    for file in _weight_files(path, allow_pickle=allow_pickle):
        if file.suffix != ".safetensors":
            other_bytes += file.stat().st_size  # what is in it is not looked at
            continue
        for kind, size in _read_safetensors(file):
            if kind in _FLOATS:
                floats[kind] = floats.get(kind, 0) + size // _FLOATS[kind]
            else:
                other_bytes += size
    return floats, other_bytes


def description_digest(path: Path) -> str:
    """SHA-256 of config.json and of the weights' names and sizes: what a step costs, if not what it says."""
    digest = sha256((path / "config.json").read_bytes())
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        digest.update(f"\n{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def _kv_elements(config: Mapping[str, Any]) -> int:
    """2 (keys and values) x layers x heads of keys and values x size of a head."""
    text = _text(config)
    heads = _whole(text.get("num_attention_heads"))
    head_dim = _whole(text.get("head_dim")) or (_whole(text.get("hidden_size")) // heads if heads else 0)
    return 2 * _whole(text.get("num_hidden_layers")) * (_whole(text.get("num_key_value_heads")) or heads) * head_dim


def _dtype(config: Mapping[str, Any], floats: Mapping[str, int]) -> str:
    for place in (config, _text(config)):
        for name in ("dtype", "torch_dtype"):
            told = str(place.get(name)).removeprefix("torch.")
            if told in ITEM_BYTES:
                return told
    most = max(floats, key=lambda kind: floats[kind], default="F32")
    return {"F16": "float16", "BF16": "bfloat16"}.get(most, "float32")


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the decoder, where a configuration has several."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _weight_files(path: Path, *, allow_pickle: bool) -> list[Path]:
    for name, pattern in (("model.safetensors.index.json", "*.safetensors"), ("pytorch_model.bin.index.json", "")):
        index = path / name
        if index.is_file() and (allow_pickle or pattern):
            named = _json_file(index).get("weight_map")
            if not isinstance(named, dict) or not named:
                raise StartupFailed(MODEL_INVALID, f"{index} has no weight_map; copy the whole model again")
            files = [path / str(one) for one in sorted(set(named.values()))]
            break
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files and allow_pickle:
            files = sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise StartupFailed(MODEL_INVALID, _no_weights(path))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StartupFailed(MODEL_INVALID, f"{path} lacks the weights {', '.join(missing)}; copy the whole model again")
    return files


def _no_weights(path: Path) -> str:
    pickled = next(iter(sorted(path.glob("*.bin"))), None)
    if pickled is not None:
        return (
            f"{path} holds no *.safetensors weights, and {pickled.name} is a pickle, which may run code when it is "
            "read; convert the model to safetensors, or set GPUMETER_ALLOW_PICKLE to 1 if you trust it"
        )
    other = next(iter(sorted(path.glob("*.gguf"))), None)
    found = f" ({other.name} is of a kind that is not loaded)" if other else ""
    return f"{path} holds no *.safetensors weights{found}; convert or copy the model"


def _read_safetensors(file: Path) -> list[tuple[str, int]]:
    """Kind and bytes of every tensor. The header says how long the file is, so a copy cut short is seen unread."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_size <= min(size, 100 * 2**20):
                raise ValueError("its header has no sensible length")
            header = json.loads(stream.read(header_size))
        tensors = [(str(one["dtype"]), one["data_offsets"]) for name, one in header.items() if name != "__metadata__"]
        end = max((int(offsets[1]) for _, offsets in tensors), default=0)
        found = [(kind, int(offsets[1]) - int(offsets[0])) for kind, offsets in tensors]
    except OSError as error:
        raise StartupFailed(MODEL_INVALID, f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StartupFailed(MODEL_INVALID, f"{file} is damaged ({error!s:.80}); copy the model again") from None
    expected = 8 + header_size + end
    if size < expected:
        raise StartupFailed(MODEL_INVALID, f"{file} is cut short ({size} of {expected} bytes); copy the model again")
    return found


def _json_file(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise StartupFailed(MODEL_INVALID, f"{file} is missing; copy the whole model again") from None
    except (OSError, ValueError) as error:
        raise StartupFailed(MODEL_INVALID, f"{file} cannot be read ({error!s:.120}); copy the model again") from None
    if not isinstance(values, dict):
        raise StartupFailed(MODEL_INVALID, f"{file} is not a JSON object; copy the model again")
    return values
