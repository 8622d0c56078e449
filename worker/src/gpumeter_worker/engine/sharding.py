"""Splits a model over the ranks of one worker, as the plan says that transformers has for it (`tp_plan`).

Owns which part of a layer is whose, and what the ranks exchange for it. Knows neither processes nor steps. Raises
LoadFailed with a sentence where a model cannot be split.

The plan names linear layers and a style for each. `colwise`: a rank has some of the outputs, of the attention's layers
whole heads. `rowwise`: a rank has some of the inputs, and what the ranks compute is summed. `colwise_gather_output` and
`rowwise_split_input` do the same where the neighbours want whole vectors. Every rank has the rest as a whole,
embeddings and norms among it. The layers stay plain linear ones of a smaller size, so that whatever is done to those
afterwards is done to these, too: transformers' own way to apply the plan needs a package that pulls torch in, and wraps
every call.
"""

import os
import re
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from gpumeter_worker.engine.paged_attention import Heads
from gpumeter_worker.failure import MODEL_INVALID, LoadFailed

_GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
_SPLIT_INPUT = frozenset({"rowwise_split_input", "rowwise_rep"})
_WHOLE = frozenset({"embedding_rowwise", "embedding_colwise", "replicate", "replicated_with_grad_allreduce"})
"""What every rank may as well have as a whole: it changes no result."""

_KNOWN = _GATHERED | _SPLIT_INPUT | _WHOLE | {"colwise", "rowwise"}
_KEYS = frozenset({"k_proj", "qkv_proj", "query_key_value"})
"""Layers whose output holds the attention's keys; where they are split, so are its heads."""


class Seat(NamedTuple):
    """A rank's place among `size` of them. `store`: a file that all of them have open, through which they meet."""

    rank: int
    size: int
    store: int


def join(seat: Seat, device: str) -> None:
    """Meet the other ranks; returns when all are there. On a GPU this process computes on the one of its number."""
    if device != "cpu":
        torch.cuda.set_device(seat.rank)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # they are in one pod: what they say to each other never leaves it
    store = dist.FileStore(f"/proc/self/fd/{seat.store}", seat.size)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.size)


def smallest(count: int, ranks: int) -> int:
    """The least that any rank has; every rank must ask."""
    if ranks == 1:
        return count
    found = torch.tensor([count])
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def local_heads(heads: Heads, config: Any, ranks: int) -> Heads:
    """The attention's heads of one rank. Raises LoadFailed before a weight is read where a model cannot be split."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    kind = config.model_type
    alone = f"set spec.parallelism.tensor and spec.resources.gpu.count to 1{{}}, or serve another model than {kind}"
    if not plan:
        raise LoadFailed(
            MODEL_INVALID,
            f"transformers has no plan to split a model of the type {kind} over {ranks} GPUs; " + alone.format(""),
        )
    if unknown := sorted(set(plan.values()) - _KNOWN):
        raise LoadFailed(
            MODEL_INVALID,
            f"the plan to split a model of the type {kind} has layers of the kind {', '.join(unknown)}, "
            "which this engine does not split; " + alone.format(""),
        )
    if not any(style == "colwise" and name.rpartition(".")[2] in _KEYS for name, style in plan.items()):
        return heads
    if heads.query % ranks or heads.kv % ranks:
        fitting = [n for n in range(2, ranks) if not (heads.query % n or heads.kv % n)]
        raise LoadFailed(
            MODEL_INVALID,
            f"its {heads.query} attention heads and {heads.kv} heads of keys and values cannot be shared out evenly "
            f"among {ranks} GPUs; " + alone.format(f" or {fitting[-1]}" if fitting else ""),
        )
    return Heads(heads.query // ranks, heads.kv // ranks, heads.dim)


def split(model: Any, rank: int, ranks: int, device: str) -> None:
    """Keep this rank's part of a whole model that lies in files, and bring it to the device, a layer after the other.

    Raises LoadFailed, and leaves the model half split then.
    """
    plan = {**(model.tp_plan or {})}
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name))
        if style is None or style in _WHOLE:
            continue
        if style not in _KNOWN or type(module) is not nn.Linear:
            raise LoadFailed(
                MODEL_INVALID,
                f"{name} is {type(module).__name__} of the kind {style}, which this engine does not split; set "
                "spec.parallelism.tensor and spec.resources.gpu.count to 1",
            )
        if style in _GATHERED and module.out_features % ranks:
            continue  # whole on every rank, which comes to the same
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _part(module, name, style, (rank, ranks), device))


def _part(linear: nn.Linear, name: str, style: str, place: tuple[int, int], device: str) -> nn.Module:
    rank, ranks = place
    by_column = style == "colwise" or style in _GATHERED
    width = linear.out_features if by_column else linear.in_features
    if width % ranks:
        raise LoadFailed(
            MODEL_INVALID,
            f"{name} is {width} wide, which cannot be shared out evenly among {ranks} GPUs; set "
            "spec.parallelism.tensor and spec.resources.gpu.count to a number that divides it",
        )
    own = slice(rank * width // ranks, (rank + 1) * width // ranks)
    bias = linear.bias
    if by_column:
        part = _linear(linear.weight[own], None if bias is None else bias[own], device)
        return part if style == "colwise" else Gathered(part, ranks)
    return Summed(_linear(linear.weight[:, own], None, device), bias, own if style in _SPLIT_INPUT else None)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, device: str) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    # A copy: a view would keep the whole weight in memory.
    made.weight = nn.Parameter(weight.detach().to(device, copy=True).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(device, copy=True), requires_grad=False)
    return made


class Gathered(nn.Module):  # type: ignore[misc]
    """A rank computes some of the outputs and gets all of them."""

    def __init__(self, part: nn.Linear, ranks: int) -> None:
        super().__init__()
        self.part = part
        self._ranks = ranks

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        own = self.part(rows).contiguous()
        every = own.new_empty((self._ranks, *own.shape))
        dist.all_gather_into_tensor(every.view(-1, own.shape[-1]), own.view(-1, own.shape[-1]))
        return every.movedim(0, -2).reshape(*own.shape[:-1], -1)


class Summed(nn.Module):  # type: ignore[misc]
    """A rank has some of the inputs; the ranks' products are summed, and the bias is added once."""

    def __init__(self, part: nn.Linear, bias: torch.Tensor | None, inputs: slice | None) -> None:
        """`inputs`: which of them it takes where it is given all."""
        super().__init__()
        self.part = part
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._inputs = inputs

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., its inputs] -> [..., out_features]."""
        product: torch.Tensor = self.part(rows if self._inputs is None else rows[..., self._inputs])
        product = product.contiguous()
        dist.all_reduce(product)
        return product if self.bias is None else product + self.bias
