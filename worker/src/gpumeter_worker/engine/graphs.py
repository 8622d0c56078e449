"""CUDA graphs for decodes: one recording a bucket of batch sizes, replayed instead of launching every kernel.

Owns the buckets and how a step is recorded and replayed. Does not know what a step computes: it is a function over
static buffers, the same one that runs eagerly.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch


def buckets(max_batch_size: int) -> list[int]:
    """Powers of two up to the first that is large enough, which is cut to the largest batch itself."""
    sizes = [1]
    while sizes[-1] < max_batch_size:
        sizes.append(min(sizes[-1] * 2, max_batch_size))
    return sizes


def bucket_for(batch: int, available: Iterable[int]) -> int | None:
    """The smallest bucket that holds a batch, or None."""
    return min((size for size in available if size >= batch), default=None)


class Recorder(Protocol):
    """Makes a function over static buffers replayable."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Raises what the device raises when a function cannot be recorded."""


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory: largest first, so that smaller ones fit into its holes.

    Sharing is right because graphs are replayed one at a time on one stream, and nothing that a graph leaves in the
    pool is read after it: its result is copied into a static buffer as the graph's last node.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder. Runs once before on a side stream: what is compiled or set up lazily must not be recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay
