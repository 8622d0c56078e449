"""A model's RMS normalisations on a CPU: one kernel where the model's own code needs seven.

Owns which normalisations may be computed so. Does not know where they stand in a model. A row beside its own negative
has the mean nought, so the layer normalisation of both together (for which torch has one kernel) scales the row by
1 / sqrt(mean of its squares + eps): that is its RMS normalisation. It rounds once, where the model's own code rounds
before it multiplies by the weight too.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

_TOLERANCE = 2**-6
"""Two roundings of bfloat16, as a share of what is rounded: what the two ways may differ by."""

_TRIED_ROWS = 4


class OneKernelRmsNorm(nn.Module):  # type: ignore[misc]
    """Stands where a model's own RMS normalisation stood, and hands a compiler that one, for it sees through it."""

    def __init__(self, own: nn.Module, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.own = own
        self._twice = torch.cat([weight, weight])
        self._features = weight.numel()
        self._shape = (2 * self._features,)
        self._eps = eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., features] -> [..., features]."""
        if torch.compiler.is_compiling():
            found: torch.Tensor = self.own(rows)
            return found
        both = torch.cat([rows, -rows], -1)
        return F.layer_norm(both, self._shape, self._twice, None, self._eps)[..., : self._features]


def quicken_norms(model: nn.Module) -> int:
    """Replace a model's normalisations of bfloat16 that come out the same; returns how many.

    Those of float32 stay: they would come out the same but for the last bit, and who asks for float32 wants that too.
    """
    found = list(_alike(model))
    for parent, name, faster in found:
        setattr(parent, name, faster)
    return len(found)


def _alike(model: nn.Module) -> Iterator[tuple[nn.Module, str, OneKernelRmsNorm]]:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            weight = getattr(child, "weight", None)
            eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
            if not type(child).__name__.endswith("RMSNorm") or not isinstance(eps, float):
                continue
            if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype is not torch.bfloat16:
                continue
            faster = OneKernelRmsNorm(child, weight.detach(), eps)
            if _same(child, faster, weight):
                yield parent, name, faster


def _same(own: nn.Module, faster: nn.Module, weight: torch.Tensor) -> bool:
    """Some models scale by 1 + weight, others cast elsewhere: what counts is what comes out."""
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(_TRIED_ROWS, weight.numel(), generator=made).to(weight.dtype)
    wanted, found = own(rows).float(), faster(rows).float()
    return bool(torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().mean())))
