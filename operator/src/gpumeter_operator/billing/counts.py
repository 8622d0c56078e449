"""How many tokens and steps a record can tell of: what no worker can have done in the time that it states.

Owns the bounds, for whoever takes a record and for whoever checks one that was taken. Pure. They are far from what
machines do, so that no honest record meets them, and where tokens are what is paid for they are all that stands between
a worker's word and a bill.
"""

from operator import attrgetter
from typing import NamedTuple

from gpumeter_operator.billing.reading import Row
from gpumeter_usage.record import Record

MAX_COUNT = 2**40
"""The most tokens or steps in one record: more than any slice can hold, and few enough to be added up."""

MAX_BATCH = 65_536
"""The most sequences that one step may move on, each by a token: sixteen times what a worker of ours can be set to."""

MAX_STEP_TOKENS = 2**20
"""The most tokens of prompts that one step computes, as GPUMETER_MAX_BATCH_TOKENS has it at most."""

MAX_FOUND_TOKENS = 2**32
"""The most tokens of prompts that are found in the cache as of one step: 4,096 sequences of a million."""

TOKEN_NS = 10
"""A token that is computed takes more GPU time than that: one of a model of 50 million parameters needs 10^8
operations, and no device does 10^16 a second."""

FREE_TOKENS = MAX_STEP_TOKENS
"""So many of a boot are believed whatever their time: a share is rounded, and a clock may stand for a step."""


class Counts(NamedTuple):
    """What a record says was done in its time."""

    gpu_ns: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    batch_ns: int


_VALUES = attrgetter(*Counts._fields)


def counts_of(record: Record | Row) -> Counts:
    """The counts of a record."""
    return Counts(*_VALUES(record))


def impossible(of: Counts) -> str:
    """What of it cannot be, to stand behind "claims"; "" where all of it can."""
    gpu_ns, prompt, cached, completion, steps, batch_ns = of
    if cached > prompt:
        return f"{cached} cached tokens of {prompt} of its prompt"
    computed = prompt - cached
    if max(prompt, completion, steps) > MAX_COUNT or batch_ns > gpu_ns * MAX_BATCH:
        return "counts that no step can reach"
    if completion > steps * MAX_BATCH or computed > steps * MAX_STEP_TOKENS or cached > steps * MAX_FOUND_TOKENS:
        return (
            f"{computed} tokens of prompts, {cached} cached and {completion} of answers, more than {steps} steps hold"
        )
    if computed + completion > FREE_TOKENS + gpu_ns // TOKEN_NS:
        return f"{computed + completion} computed tokens, more than any device computes in {gpu_ns} ns"
    return ""
