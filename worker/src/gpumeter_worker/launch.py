"""What a worker's engine is started with.

Owns how settings and the machine become an engine's options, of a split model those of each rank alike. Does not know
how an engine is started, nor how the settings were read.
"""

from pathlib import Path

from gpumeter_worker import machine
from gpumeter_worker.engine.messages import EngineOptions
from gpumeter_worker.metering.attribution import Rule
from gpumeter_worker.settings import Settings


def engine_options(settings: Settings, path: Path) -> EngineOptions:
    """For the model at `path`. Ranks share the container's cores and its memory evenly."""
    return EngineOptions(
        model_path=path,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_wait_ms=settings.max_wait_ms,
        threads=max(1, machine.threads() // settings.ranks),
        memory_bytes=machine.memory_bytes() // settings.ranks,
        sequences_max=settings.max_batch_size + settings.max_queue_length,
        cuda_graphs=settings.cuda_graphs,
        compile=settings.compile,
        prefix_cache=settings.prefix_cache,
        allow_pickle=settings.allow_pickle,
        calibration_ms=settings.calibration_ms if settings.attribution is Rule.KNEE else 0,
        ranks=settings.ranks,
        profiles_dir=settings.journal_dir,
    )
