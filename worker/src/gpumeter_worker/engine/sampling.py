"""Chooses the next token of every row: greedy, temperature, top-k, top-p.

Owns the arithmetic on logits. Takes one uniform number in [0, 1) per row that draws, so that the same seed gives the
same tokens whatever else is in the batch and on whatever device. Does not know where the numbers come from.
"""

from collections.abc import Sequence

import torch

from gpumeter_worker.engine.sequence import Sampling


def choose(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> torch.Tensor:
    """logits [rows, vocabulary] -> tokens [rows]; -1 in a row whose logits are no numbers: only that row fails."""
    best, tokens = logits.max(-1)  # a NaN anywhere in the row is its maximum
    # Rows that keep the whole vocabulary are drawn in its own order, the others in the order of likelihood: which one
    # is a row's own matter, so that its neighbours cannot change its token.
    for cut in (False, True):
        drawing = [row for row, one in enumerate(samplings) if one.temperature > 0 and _is_cut(one) is cut]
        if drawing:
            rows = torch.tensor(drawing, device=logits.device)
            own = [samplings[row] for row in drawing]
            drawn = _draw(logits[rows].float(), own, [uniforms[row] for row in drawing], cut=cut)
            tokens = tokens.index_copy(0, rows, drawn)
    return torch.where(torch.isfinite(best), tokens, -1)


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0


def _draw(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], *, cut: bool) -> torch.Tensor:
    """Inverse transform: the first token at which the sum of kept probabilities passes the uniform number."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = (logits - logits.max(-1, keepdim=True).values) / column([one.temperature for one in samplings])
    if not cut:
        probabilities = scaled.softmax(-1)
        order = None
    else:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(scaled.shape[-1], device=logits.device)[None]
        kept = ranks < column([float(one.top_k or scaled.shape[-1]) for one in samplings])
        probabilities = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= column([one.top_p for one in samplings])) & (ranks > 0), 0)
    sums = probabilities.double().cumsum(-1)
    thresholds = column(uniforms).double() * sums[:, -1:]
    index = torch.searchsorted(sums, thresholds, right=True)
    # Rounding may point past the last token that has a probability at all.
    index = index.clamp(max=sums.shape[-1] - 1)
    last = sums.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return (index if order is None else order.gather(-1, index))[:, 0]
