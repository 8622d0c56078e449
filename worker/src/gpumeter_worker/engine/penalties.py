"""What a request changes about single logits: bias, a minimum length, penalties for tokens that were there before.

Owns one table a sequence, of the tokens concerned alone, kept up to date by one entry a step: counting a long prompt
again at every step would cost more than the step. Lives on the host. Does not know the other rows of a batch.
"""

import math
from typing import NamedTuple

import torch

from gpumeter_worker.engine.sequence import Sampling, Sequence


class Entries(NamedTuple):
    """For each token [entries]: added first, then what a positive logit is divided by, then taken off."""

    tokens: torch.Tensor
    bias: torch.Tensor
    repetition: torch.Tensor
    minus: torch.Tensor


def edits(sequence: Sequence) -> bool:
    """Whether a sequence's next token needs a table at all."""
    return _penalises(sequence.sampling) or bool(sequence.sampling.logit_bias) or _held(sequence)


class PenaltyTable:
    """The entries of one sequence, up to the token that `advance` saw last."""

    def __init__(self, sequence: Sequence, eos_ids: frozenset[int], vocabulary: int) -> None:
        sampling = sequence.sampling
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._bias = dict(sampling.logit_bias)
        self._ends = tuple((frozenset() if sampling.ignore_eos else eos_ids) | frozenset(sampling.stop_ids))
        self._place: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._seen = sequence.prompt_length
        self._holding = _held(sequence)
        prompt = sequence.tokens[: sequence.prompt_length] if sampling.repetition_penalty != 1 else []
        answer = sampling.max_tokens if _penalises(sampling) else 0
        room = min(len(prompt) + answer + len(self._bias) + len(self._ends), vocabulary)
        self._entries = Entries(
            torch.zeros(room, dtype=torch.long), torch.zeros(room), torch.ones(room), torch.zeros(room)
        )
        for token, bias in self._bias.items():
            self._set(token, bias=bias)
        for token in self._ends if self._holding else ():
            self._set(token, bias=-math.inf)
        for token in dict.fromkeys(prompt):
            self._set(token, repetition=sampling.repetition_penalty)

    def advance(self, sequence: Sequence) -> None:
        """Take in the tokens that the sequence was given since."""
        sampling = self._sampling
        if _penalises(sampling):
            for token in sequence.tokens[self._seen :]:
                count = self._given[token] = self._given.get(token, 0) + 1
                minus = sampling.frequency_penalty * count + sampling.presence_penalty
                self._set(token, repetition=sampling.repetition_penalty, minus=minus)
            self._seen = len(sequence.tokens)
        if self._holding and not _held(sequence):
            self._holding = False
            for token in self._ends:
                self._set(token, bias=self._bias.get(token, 0.0))

    @property
    def entries(self) -> Entries:
        """As they are now; a view, which the next `advance` changes."""
        count = len(self._place)
        return Entries(*(column[:count] for column in self._entries))

    def _set(self, token: int, **values: float) -> None:
        if not 0 <= token < self._vocabulary:
            return  # admission refuses it; were it to come here, it must not end the step for its neighbours
        at = self._place.setdefault(token, len(self._place))
        self._entries.tokens[at] = token
        for column, value in values.items():
            getattr(self._entries, column)[at] = value


def _penalises(sampling: Sampling) -> bool:
    penalties = (sampling.repetition_penalty - 1, sampling.frequency_penalty, sampling.presence_penalty)
    return any(penalty != 0 for penalty in penalties)


def _held(sequence: Sequence) -> bool:
    return sequence.generated < sequence.sampling.min_tokens
