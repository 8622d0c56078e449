"""A model's matrix products on a CPU: weights packed once, for the kernels that are fastest on this processor.

Owns which kernel multiplies how many rows. Does not know what a product is for. Three things are gained over torch's
own linear layers: oneDNN gets the weights in its own layout, which saves rearranging them in every step; layers that
are given the same rows (queries, keys and values; gate and up) are one product; and where products of bfloat16 are
slower than those of float32 (measured here, at start-up: processors without matrix units multiply bfloat16 at half the
rate), many rows are multiplied in float32. What comes out is rounded to the model's type either way, and no less
precise.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

log = logging.getLogger("gpumeter_worker.engine.linear")

_TYPES = (torch.bfloat16, torch.float32)
_ROWS = (16, 32, 64, 128, 256)
"""How many rows the two kernels are compared for. Fewer are bound by reading the weights: the smaller type wins."""

_WORTH = 0.95
"""A wide product must take at most this share of a narrow one's time to be worth its memory."""

_LAYOUT_ROWS = 64
"""The number of rows that oneDNN is told to lay weights out for; others run on the same layout."""

_TRIALS = 7
NEVER = 1 << 62

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that every known decoder gives the same rows. A decoder that does not only loses time."""

_products: list["Product"] = []
"""Every product of this process's model by number, because an opaque operation takes no modules."""


class Product:
    """Packed weights of one linear layer or of several, side by side: [..., in_features] -> [..., out_features].

    From `wide_from` rows on it is computed in float32.
    """

    def __init__(self, linears: Sequence[nn.Linear], wide_from: int) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.out_features, self._in_features = weight.shape
        self._widths = [linear.out_features for linear in linears]
        self._wide_from = wide_from
        self._plain_below = min(wide_from, _ROWS[0] + 1)
        self._narrow = _pack(weight)
        self._wide = _pack(weight.float()) if wide_from < NEVER else None
        biased = linears[0].bias is not None
        self._bias = torch.cat([linear.bias.detach() for linear in linears]) if biased else None
        self._wide_bias = None if self._bias is None else self._bias.float()
        self._rows: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()
        self._number = len(_products)
        _products.append(self)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The product. A compiler sees one operation that it cannot look into."""
        if torch.compiler.is_compiling():
            found: torch.Tensor = torch.ops.gpumeter.product(rows, self._number, self.out_features)
            return found
        return self.compute(rows)

    def part(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """One layer's part of the product, which is computed once for all who share it and ask with the same tensor.

        Nobody may change the rows in place between two siblings, and no decoder of transformers does. Where the last of
        them is not asked, rows and product are kept until the next step.
        """
        parts = self._parts if rows is self._rows else self.of(rows).split(self._widths, -1)
        last = index == len(parts) - 1
        self._rows, self._parts = (None, ()) if last else (rows, parts)
        return parts[index]

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """The product itself."""
        count = rows.numel() // self._in_features
        if count < self._plain_below:  # by far the most steps, and those in which microseconds count
            return _multiply(rows, self._narrow, self._bias)
        padded = padded_rows(count)
        wide = self._wide is not None and count >= self._wide_from
        if padded == count:
            given = rows.float() if wide else rows
        else:
            given = rows.new_zeros((padded, self._in_features), dtype=torch.float32 if wide else rows.dtype)
            given[:count] = rows.reshape(count, self._in_features)
        if wide:
            found = _multiply(given, self._wide, self._wide_bias).to(rows.dtype)
        else:
            found = _multiply(given, self._narrow, self._bias)
        return found if padded == count else found[:count].view(*rows.shape[:-1], self.out_features)


def padded_rows(count: int) -> int:
    """How many rows are multiplied where so many are there: one of 16 numbers an octave, none below 16.

    oneDNN makes a kernel for each number of rows, and keeps about a thousand. Steps that mix prompts and decodes have
    any number of rows: without padding each makes kernels anew, and they fill memory by tens of megabytes.
    """
    if count <= _ROWS[0]:
        return count
    grain = max(8, 1 << (count.bit_length() - 5))
    return -(-count // grain) * grain


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Stands where an nn.Linear stood: the whole of a product of its own."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = product

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._product.of(rows)


class SharedLinear(nn.Module):  # type: ignore[misc]
    """Stands where an nn.Linear stood: the part numbered `index` of a product that it shares with its siblings."""

    def __init__(self, product: Product, index: int) -> None:
        super().__init__()
        self._product, self._index = product, index

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._product.part(rows, self._index)


def pack_linears(model: nn.Module, spare_bytes: int | None) -> int:
    """Replace a model's linear layers; returns the rows from which they multiply in float32 (NEVER: not at all).

    `spare_bytes` is what copies in float32 may take; None: nobody knows, so take none. Where torch was built without
    oneDNN or the type is another one, nothing is replaced and 0 is returned.
    """
    found = list(_groups(model))
    if not found or not _available(found[0].dtype):
        return 0
    shapes = Counter(group.shape for group in found)
    weights = sum(rows * columns * count for (rows, columns), count in shapes.items())
    wide_from = NEVER
    if found[0].dtype is torch.bfloat16 and spare_bytes is not None and 4 * weights <= spare_bytes:
        wide_from = _faster_from(max(shapes, key=lambda shape: shapes[shape] * shape[0] * shape[1]))
    packed: dict[tuple[nn.Linear, ...], Product] = {}  # two modules may have layers in common
    for group in found:
        linears = tuple(group.layers.values())
        product = packed[linears] = packed.get(linears) or Product(linears, wide_from)
        for index, name in enumerate(group.layers):
            setattr(group.parent, name, PackedLinear(product) if len(linears) == 1 else SharedLinear(product, index))
    return wide_from


class _Group(NamedTuple):
    """Linear layers of one module that make one product, by name."""

    parent: nn.Module
    layers: dict[str, nn.Linear]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.layers.values())).weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features of the product."""
        linears = self.layers.values()
        return sum(linear.out_features for linear in linears), next(iter(linears)).in_features


def _groups(model: nn.Module) -> Iterator[_Group]:
    for parent in model.modules():
        left = {
            name: child
            for name, child in parent.named_children()
            if type(child) is nn.Linear and child.weight.dtype in _TYPES and child.weight.device.type == "cpu"
        }
        for names in _SIBLINGS:
            alike = [left[name] for name in names if name in left]
            kinds = {(linear.in_features, linear.bias is None, linear.weight.dtype) for linear in alike}
            if len(kinds) == 1 and left.keys() >= set(names):
                yield _Group(parent, {name: left.pop(name) for name in names})
        for name, child in left.items():
            yield _Group(parent, {name: child})


def _available(dtype: torch.dtype) -> bool:
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    ):
        return False
    return dtype is not torch.bfloat16 or bool(mkldnn._is_mkldnn_bf16_supported())


def _faster_from(shape: tuple[int, int]) -> int:
    """The number of rows from which float32 is worth its memory on this machine, for weights of this shape."""
    weights = [torch.randn(shape).bfloat16() for _ in range(4)]  # more than one, so that they are not all in a cache
    narrow, wide = [_pack(one) for one in weights], [_pack(one.float()) for one in weights]
    found = NEVER
    for rows in reversed(_ROWS):
        given = torch.randn(rows, shape[1]).bfloat16()
        narrow_s = _fastest_s(given, narrow, wide=False)
        wide_s = _fastest_s(given, wide, wide=True)
        log.debug("%d rows: %.0f us in bfloat16, %.0f us in float32", rows, narrow_s * 1e6, wide_s * 1e6)
        if wide_s > _WORTH * narrow_s:
            break
        found = rows
    return found


def _fastest_s(rows: torch.Tensor, weights: list[torch.Tensor], *, wide: bool) -> float:
    """The least of a few trials: what else runs on the machine only ever adds."""
    times = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        for weight in weights:
            _multiply(rows.float(), weight, None).to(rows.dtype) if wide else _multiply(rows, weight, None)
        times.append(time.perf_counter() - began)
    return min(times) / len(weights)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)
    return packed


def _multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Its one overload by name: to look for the right one takes as long as starting the kernel.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")
    return product


def _product_of(rows: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return _products[number].compute(rows)


def _product_shape(rows: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], out_features))


_library = torch.library.Library("gpumeter", "FRAGMENT")
_library.define("product(Tensor rows, int number, int out_features) -> Tensor")
_library.impl("product", _product_of, "CPU")
torch.library.register_fake("gpumeter::product", _product_shape, lib=_library)
