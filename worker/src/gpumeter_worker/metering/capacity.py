"""What a worker can do, reckoned from the steps that it timed at its warm-up: tokens a second and GPU time by batch.

Owns the figures that users plan with (`status.capacity` of an InferenceService), and what keeps a larger batch from
being of use. Pure; whole numbers until they are written. Nothing is billed by it. Does not know how a step is timed.
"""

from decimal import Decimal
from typing import Any

from gpumeter_worker.metering.attribution import Costs, Load, cost_ps

CONTEXT_TOKENS = 512
"""Tokens that each sequence has in its cache in these figures: a question and half of its answer."""

_PS = 10**12


def capacity(
    costs: Costs, *, batch_most: int, sequence_most: int, cache_tokens: int, devices: int = 1
) -> dict[str, Any] | None:
    """Figures of decode steps by batch size, up to the largest batch that fits; None where none does.

    `batch_most` sequences compute together, each of `sequence_most` tokens at the most; the cache holds `cache_tokens`.
    A step takes its time on each of the worker's `devices`.
    """
    context = min(CONTEXT_TOKENS, max(sequence_most // 2, 1))
    fits = cache_tokens // (context + 1)
    largest = min(batch_most, fits)
    if largest < 1 or not any(costs):
        return None
    return {
        "boundBy": _bound_by(costs, context, largest, fits < batch_most),
        "contextTokens": context,
        "batches": [_figures(costs, context, size, devices) for size in _sizes(largest)],
    }


def _sizes(largest: int) -> list[int]:
    powers = [1 << bit for bit in range(largest.bit_length())]
    return sorted({*powers, largest})


def _figures(costs: Costs, context: int, size: int, devices: int) -> dict[str, Any]:
    step_ps = cost_ps([Load(1, context)] * size, costs)
    return {
        "batchSize": size,
        "tokensPerSecond": str((Decimal(size * _PS) / step_ps).quantize(Decimal("0.1"))),
        "gpuSecondsPerThousandTokens": str(
            (Decimal(step_ps * devices * 1_000) / size / _PS).quantize(Decimal("0.000001"))
        ),
    }


def _bound_by(costs: Costs, context: int, size: int, cache_is_full: bool) -> str:
    """Why a larger batch is not there, or of no use: what one more sequence adds costs as much as it gives."""
    if cache_is_full:
        return "Memory"
    attention_ps = cost_ps([Load(1, context)] * size, costs) - cost_ps([Load(1, 0)] * size, costs)
    arithmetic_ps = costs.lam_ps * size
    if arithmetic_ps > costs.phi_ps and arithmetic_ps >= attention_ps:
        return "Compute"
    if attention_ps > costs.t0_ps + max(costs.phi_ps, arithmetic_ps):
        return "MemoryBandwidth" if costs.kap_ps >= costs.alp_ps else "Compute"
    return "MaxBatchSize"
