"""How many blocks of cache a GPU holds, from what a warm-up measured.

Owns the arithmetic and the sentence when it does not come out. Pure: the numbers are given, nothing is looked at.
"""

from dataclasses import dataclass

SHARE = 0.9
"""The share of the whole GPU that the worker may use. The rest is for what nobody measured: the driver's own needs,
fragments that no request of the warm-up made, and libraries that take work space late."""

GRAPH_BYTES = 24 * 2**20
"""What one captured graph takes outside of torch's allocator: its kernels' arguments, some hundred nodes a layer."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured on one GPU, in bytes, after a warm-up of the largest step with next to no cache.

    `total`: the GPU's memory. `free`: what the driver says is free of it. `held`: what torch's allocator holds now
    (reserved). `peak`: the most it held during the warm-up. `weights`: what the model alone takes. `graphs`: how many
    CUDA graphs will be captured. `block`: one block of the cache, all layers, keys and values. `needed`: the blocks of
    one sequence of `max_model_len` tokens.
    """

    total: int
    free: int
    held: int
    peak: int
    weights: int
    graphs: int
    block: int
    needed: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Sizing:
    """The cache's blocks; with 0 blocks, `problem` says why none and what to do."""

    blocks: int
    problem: str = ""


def size_cache(facts: Facts) -> Sizing:
    """Everything that the share leaves, and one block less: the spare one that padding writes to."""
    # Others' memory on this GPU, and this process's own context: what is neither free nor torch's.
    others = max(0, facts.total - facts.free - facts.held)
    left = int(facts.total * SHARE) - others - facts.peak - facts.graphs * GRAPH_BYTES
    blocks = left // facts.block - 1
    if blocks >= facts.needed:
        return Sizing(blocks)
    needed = (facts.needed + 1) * facts.block
    shared = f"; {_gb(others)} belong to other processes and the driver" if others else ""
    return Sizing(
        0,
        f"the weights take {_gb(facts.weights)} and a step up to {_gb(max(0, facts.peak - facts.weights))} more, one "
        f"sequence of {facts.max_model_len} tokens needs {_gb(needed)} of cache, and {_gb(max(0, left))} of the GPU's "
        f"{_gb(facts.total)} are left for it{shared}; lower maxModelLen{_fitting(blocks, facts)} or maxBatchTokens, or "
        "use a smaller model or a larger GPU",
    )


def _fitting(blocks: int, facts: Facts) -> str:
    """The maxModelLen that would fit, where one does."""
    tokens = blocks * facts.max_model_len // facts.needed // 256 * 256
    return f" to {tokens}" if tokens > 0 else ""


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
