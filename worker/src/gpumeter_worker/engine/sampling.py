"""Chooses the next token of every row of logits, as the row's own request asked.

Owns the order of things, which is vLLM's: bias and minimum length, penalties, temperature, min-p, top-k, top-p, one
draw. Nothing of a row's result depends on its neighbours, not in the last bit on a CPU: whatever reduces does so within
a row, ties go to the lower token id, and each draw takes one number of the sequence's own generator. Does not know how
logits come about, nor who asked.

The logits themselves depend on the neighbours a little: other kernels multiply other numbers of rows, and in fp32 a
logit moves by some 3e-5. So that the same seed gives the same tokens in any batch, a draw is a race in which every
candidate has noise of its own, hashed from the draw's number and the candidate's name: another token wins only where
the best two are as near to each other as that, in less than 1 of 20,000 draws. (In a walk along the sums of
probabilities every candidate's place moves with all those before it, which made another token of 1 draw in 200.)

`Sampler.prepare` does the host's part before a step's clock begins, `choose` the device's part (on CUDA without waiting
for the device), `read` fetches the result after the clock ended.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gpumeter_worker.engine.loop import INVALID_TOKEN, Sampled
from gpumeter_worker.engine.penalties import Entries, PenaltyTable, edits
from gpumeter_worker.engine.ranking import block_of, block_sums, likeliest, maxima
from gpumeter_worker.engine.sequence import Sampling, Sequence

_CANDIDATES = (64, 512)
"""How many of the likeliest tokens are looked at before the whole vocabulary is sorted, which costs 5 ms a row on a
CPU. They serve every top-k up to their number; a top-p only where their probabilities reach it, which is looked up."""

IN_ORDER = 0
"""Draws over the whole vocabulary need no order of likelihood."""

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""splitmix64's odd constants, as int64 holds them."""


class Sampler:
    """Keeps from step to step what penalties need to know of the sequences that ask for them."""

    def __init__(self, vocabulary: int, eos_ids: frozenset[int], device: str) -> None:
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._device = device
        self._tables: dict[Sequence, PenaltyTable] = {}

    def prepare(self, sequences: Row[Sequence]) -> "SamplingBatch":
        """What the next logits' rows need, one row a sequence, on the device. Takes each draw's random number.

        A table is kept while its sequence is in every batch; one that was away is counted anew.
        """
        self._tables = {one: self._table(one) for one in sequences if edits(one)}
        worked = [row for row, one in enumerate(sequences) if one in self._tables or one.sampling.temperature > 0]
        by_size: dict[int, list[int]] = {}
        for place, row in enumerate(worked):
            if sequences[row].sampling.temperature > 0:
                by_size.setdefault(self._candidates(sequences[row].sampling), []).append(place)
        own = [sequences[row] for row in worked]
        logged = tuple(row for row, one in enumerate(sequences) if one.sampling.logprobs is not None)
        return SamplingBatch(
            worked=self._index(worked) if worked else None,
            edits=self._edits(own) if self._tables else None,
            draws=tuple(self._draw(size, places, [own[at] for at in places]) for size, places in by_size.items()),
            logged=self._index(logged) if logged else None,
            logged_rows=logged,
            logged_counts=tuple(sequences[row].sampling.logprobs or 0 for row in logged),
        )

    def _table(self, sequence: Sequence) -> PenaltyTable:
        table = self._tables.get(sequence) or PenaltyTable(sequence, self._eos_ids, self._vocabulary)
        table.advance(sequence)
        return table

    def _candidates(self, sampling: Sampling) -> int:
        """How many of the likeliest tokens a draw looks at first."""
        top_k = sampling.top_k or self._vocabulary
        if top_k >= self._vocabulary and sampling.top_p >= 1:
            return IN_ORDER
        if top_k >= self._vocabulary:
            # Whether a few are enough for the top-p only the device knows, and asking a GPU would mean to wait for it.
            return _CANDIDATES[0] if self._device == "cpu" else self._vocabulary
        return next((size for size in _CANDIDATES if top_k <= size), self._vocabulary)

    def _edits(self, sequences: Row[Sequence]) -> "Edits":
        found = [(place, self._tables[one].entries) for place, one in enumerate(sequences) if one in self._tables]
        places = torch.cat([torch.full((len(entries.tokens),), place) for place, entries in found])
        columns = zip(*(entries for _, entries in found), strict=True)
        return Edits(places.to(self._device), Entries(*(torch.cat(column).to(self._device) for column in columns)))

    def _draw(self, size: int, places: Row[int], sequences: Row[Sequence]) -> "Draw":
        def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self._device)[:, None]

        samplings = [one.sampling for one in sequences]
        return Draw(
            size=size,
            at=self._index(places),
            temperature=column(one.temperature for one in samplings),
            least=column(_least(one) for one in samplings) if any(one.min_p > 0 for one in samplings) else None,
            top_k=column((one.top_k or self._vocabulary for one in samplings), torch.long),
            top_p=column((one.top_p for one in samplings), torch.float64),
            # random() gives multiples of 2**-53, so these are all of its bits; engine.loop counts one call a draw.
            key=column((int(one.random.random() * 2**53) for one in sequences), torch.long),
        )

    def _index(self, values: Row[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class Edits(NamedTuple):
    """Changes of single logits. `places` [entries]: which of the worked rows; no row has a token twice."""

    places: torch.Tensor
    entries: Entries


class Draw(NamedTuple):
    """Rows that are drawn in one way. `at` [n]: which of the worked rows, ascending; the other tensors are [n, 1].

    `least` is min-p on the scale of logits whose maximum is 0; None where no row asks for it. `key` is the draw's own
    number, from which the noise of its candidates is hashed.
    """

    size: int
    at: torch.Tensor
    temperature: torch.Tensor
    least: torch.Tensor | None
    top_k: torch.Tensor
    top_p: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the rows of one step are sampled. `worked` [n] are those that are edited or drawn; the others are greedy."""

    worked: torch.Tensor | None
    edits: Edits | None
    draws: tuple[Draw, ...]
    logged: torch.Tensor | None
    logged_rows: tuple[int, ...]
    logged_counts: tuple[int, ...]


class Chosen(NamedTuple):
    """On the device: tokens [rows]; for the rows with log probabilities those [n], and the likeliest ones' [n, k]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def choose(logits: torch.Tensor, batch: SamplingBatch) -> Chosen:
    """logits [rows, vocabulary] of any float type, not changed -> a token a row; -1 where a row's logits are invalid.

    Invalid is a row that holds a NaN or an infinite maximum. Only that row fails.
    """
    logits = logits.float()
    best, tokens = maxima(logits)
    valid = torch.isfinite(best)
    if batch.worked is not None:
        worked = _rows(logits, batch.worked)
        if batch.edits is not None:
            worked = _edited(worked, batch.edits)
            best, tokens_of_worked = maxima(worked)
            valid = valid.index_copy(0, batch.worked, torch.isfinite(best) & _rows(valid, batch.worked))
        else:
            best, tokens_of_worked = _rows(best, batch.worked), _rows(tokens, batch.worked)
        for draw in batch.draws:
            drawn = _drawn(_rows(worked, draw.at), _rows(best, draw.at), draw)
            tokens_of_worked = tokens_of_worked.index_copy(0, draw.at, drawn)
        tokens = tokens.index_copy(0, batch.worked, tokens_of_worked)
    tokens = torch.where(valid, tokens, INVALID_TOKEN)
    if batch.logged is None:
        return Chosen(tokens)
    logprobs = _rows(logits, batch.logged).log_softmax(-1)
    own = logprobs.gather(1, _rows(tokens, batch.logged).clamp(min=0)[:, None])[:, 0]
    most = min(max(batch.logged_counts), logits.shape[1])
    if most == 0:
        return Chosen(tokens, own)
    top = likeliest(logprobs, most)
    return Chosen(tokens, own, top, logprobs.gather(1, top))


def read(chosen: Chosen, batch: SamplingBatch) -> list[Sampled]:
    """Waits for the device; one result a row."""
    sampled = [Sampled(token) for token in chosen.tokens.tolist()]
    if chosen.logprobs is None:
        return sampled
    nothing: list[list[float]] = [[]] * len(batch.logged_rows)
    ids = nothing if chosen.top_tokens is None else chosen.top_tokens.tolist()
    values = nothing if chosen.top_logprobs is None else chosen.top_logprobs.tolist()
    for at, (row, own) in enumerate(zip(batch.logged_rows, chosen.logprobs.tolist(), strict=True)):
        count = batch.logged_counts[at]
        if sampled[row].token != INVALID_TOKEN:
            top = tuple(zip(ids[at][:count], values[at][:count], strict=True))
            sampled[row] = Sampled(sampled[row].token, own, top)
    return sampled


def _least(sampling: Sampling) -> float:
    return math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf


def _rows(matrix: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Some rows, ascending; all of them without a copy."""
    return matrix if len(at) == len(matrix) else matrix[at]


def _edited(logits: torch.Tensor, edits: Edits) -> torch.Tensor:
    """The repetition penalty is transformers' (a positive logit is divided by it, a negative one multiplied);
    frequency and presence penalties are OpenAI's and vLLM's, and so is the order."""
    entries = edits.entries
    place = (edits.places, entries.tokens)
    value = logits[place] + entries.bias
    value = torch.where(value > 0, value / entries.repetition, value * entries.repetition)
    return logits.index_put(place, value - entries.minus)


def _drawn(logits: torch.Tensor, best: torch.Tensor, draw: Draw) -> torch.Tensor:
    """One token a row, each kept token with its share of the kept probability.

    logits [n, vocabulary], their maxima [n] -> tokens [n].
    """
    scaled = (logits - best[:, None]).div_(draw.temperature)
    weights = scaled.softmax(-1)
    if draw.least is not None:
        weights.masked_fill_(scaled < draw.least, 0)
    if draw.size != IN_ORDER:
        return _ranked(scaled, weights, draw)
    # The whole vocabulary: first among the blocks, then among the winner's tokens. Their names do not meet.
    sums = block_sums(weights)
    names = torch.arange(sums.shape[1], device=sums.device) + weights.shape[1]
    inside, tokens = block_of(weights, _race(sums, names, draw.key))
    return tokens.gather(1, _race(inside.double(), tokens, draw.key))[:, 0]


def _ranked(scaled: torch.Tensor, weights: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The draw from the likeliest, from as many candidates as it turns out to take.

    How many were looked at and in which order does not matter to the race: only which are kept.
    """
    vocabulary = scaled.shape[1]
    ids = likeliest(scaled, draw.size)
    ranks = torch.arange(ids.shape[1], device=ids.device)[None]
    candidates = weights.gather(1, ids).double().masked_fill_(ranks >= draw.top_k, 0)
    sums = candidates.cumsum(-1)
    complete = draw.top_k <= ids.shape[1]
    total = torch.where(complete, sums[:, -1:], block_sums(weights).cumsum(-1)[:, -1:])
    kept = (sums - candidates < draw.top_p * total) | (draw.top_p >= 1) | (ranks == 0)
    tokens = ids.gather(1, _race(candidates.masked_fill(~kept, 0), ids, draw.key))[:, 0]
    if draw.size < vocabulary and tokens.device.type == "cpu":  # see Sampler._candidates
        short = (~complete & (sums[:, -1:] < draw.top_p * total))[:, 0].nonzero()[:, 0]
        if len(short):
            size = next((size for size in _CANDIDATES if draw.size < size < vocabulary), vocabulary)
            wider = Draw(size, *(None if column is None else column[short] for column in draw[1:]))
            tokens = tokens.index_copy(0, short, _ranked(scaled[short], weights[short], wider))
    return tokens


def _race(weights: torch.Tensor, names: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The exponential race: whoever has the least -log(u) / weight wins, with the probability weight / sum of weights.

    It is the Gumbel-max trick, arg-max of log(weight) - log(-log(u)), with one logarithm instead of three. weights
    [n, k] float64, not all 0 in a row, names [n, k] or [k] and key [n, 1] of int64 -> the winner's index [n, 1]. What
    has no weight never wins: the noise is finite, and some weight is above 0.
    """
    return (weights / noise(key, names).log_().neg_()).argmax(-1, keepdim=True)


def noise(key: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """key [n, 1] and names [n, k] or [k] of int64 -> uniform numbers [n, k] float64, above 0 and below 1.

    A number is a function of its own key and name alone, and the same on every device: 52 bits of splitmix64 (Steele,
    Lea and Flood 2014), whose state starts at the mixed key and whose steps are counted by the name.
    """
    state = _mixed(_mixed(key.clone()) + names * _GOLDEN)
    return (state >> 12).bitwise_and_(2**52 - 1).double().add_(0.5).mul_(2.0**-52)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer, in place. int64 wraps as uint64 does; a mask makes its right shift a logical one."""
    bits.bitwise_xor_((bits >> 30).bitwise_and_(2**34 - 1)).mul_(_MIX[0])
    bits.bitwise_xor_((bits >> 27).bitwise_and_(2**37 - 1)).mul_(_MIX[1])
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(2**33 - 1))
