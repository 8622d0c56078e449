"""Facts -> checks: whether a worker can serve here, each with what was found and what to do about it.

Pure. Owns every judgement of start-up diagnosis and its sentence; the same sentence goes to log, termination message,
condition and `gpumeter-worker diagnose`. Looks at nothing: machine.py and modelfiles.py do.
"""

from dataclasses import dataclass
from enum import StrEnum

from gpumeter_worker import failure
from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.machine import Driver, Others
from gpumeter_worker.modelfiles import ModelFacts, served_dtype
from gpumeter_worker.telemetry.sample import mig_profile, names_profile, priced_profile

SHARED_MEMORY_BYTES = 64 * 2**20
"""What each GPU of a worker needs of /dev/shm: the size that container runtimes give where nobody says more."""

CONTEXT_BYTES = 512 * 10**6
"""What CUDA itself takes of a GPU before a weight is on it: context, kernels, libraries' work space."""

FOREIGN_BYTES = 256 * 2**20
"""More of a GPU's memory than the driver leaves behind, and less than one CUDA context of somebody else's takes."""

_BF16_CAPABILITY = (8, 0)


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    LATER = "later"  # told when the worker serves


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `reason` is one of the worker's fatal reasons where the verdict is failed."""

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    advice: str = ""
    reason: str = ""

    @property
    def failed(self) -> StartupFailed | None:
        """What ends the worker, where this does."""
        return StartupFailed(self.reason, f"{self.found}; {self.advice}") if self.verdict is Verdict.FAILED else None


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The machine, as far as it matters for what was asked for. Memory in bytes."""

    gpus_wanted: int
    device_files: tuple[str, ...]
    driver: Driver | None  # None: not asked, because no GPU is wanted or none is there
    torch_cuda: str | None  # "" for a CPU build; None: unknown
    shared_memory: int
    memory: int
    mps_pipe: str = ""  # the directory of an MPS daemon's pipes
    billed: bool = True  # by the measured time of its steps; a worker run by hand bills nobody
    serving: bool = False  # a worker of this container has an engine already
    gpu_class: str = "gpu"  # by which its time is priced


@dataclass(frozen=True, slots=True)
class Asked:
    """How a model shall be served."""

    dtype: str  # auto, or one of modelfiles.ITEM_BYTES
    max_model_len: int  # 0: what the model says, bounded
    known_types: frozenset[str] | None  # model types that transformers knows; None: it does not tell


def check_machine(facts: MachineFacts) -> tuple[Check, ...]:
    """Device, driver and shared memory; on a CPU nothing can be wrong with them."""
    if facts.gpus_wanted == 0:
        return (Check("device", "the CPU, as asked for"),)
    device = _device(facts)
    if device.verdict is Verdict.FAILED:
        return (device,)
    return (device, *_slice(facts), _sharing(facts), _toolkit(facts), _shared_memory(facts))


def check_model(model: ModelFacts, facts: MachineFacts, asked: Asked) -> tuple[Check, ...]:
    """Architecture, dtype and memory of a model on a machine."""
    dtype = served_dtype(asked.dtype, model.dtype, gpu=bool(facts.gpus_wanted))
    return (
        _architecture(model, asked.known_types),
        _dtype(dtype, asked.dtype, facts),
        _memory(model, facts, dtype, model.length(asked.max_model_len)),
    )


def _device(facts: MachineFacts) -> Check:
    def failed(found: str, advice: str) -> Check:
        return Check("device", found, Verdict.FAILED, advice, failure.GPU_NOT_FOUND)

    wanted = f"{facts.gpus_wanted} GPU{'s' if facts.gpus_wanted > 1 else ''}"
    asked = f"{wanted} {'were' if facts.gpus_wanted > 1 else 'was'} asked for"
    if not facts.device_files:
        return failed(
            f"{asked} and this container has none (no /dev/nvidia* device)",
            "schedule it on a node with the NVIDIA driver and container toolkit, or set resources.gpu.count to 0",
        )
    driver = facts.driver
    if driver is None or driver.problem:
        return failed(
            f"{asked} and cannot be used: {driver.problem if driver else 'the driver was not asked'}",
            "check the node's driver with nvidia-smi, and that the container toolkit is configured for its runtime",
        )
    if len(driver.gpus) < facts.gpus_wanted:
        return failed(
            f"{asked} and the driver shows {len(driver.gpus)}",
            "check resources.gpu.resourceName, and the device plugin of the node",
        )
    return Check("device", ", ".join(gpu.name for gpu in driver.gpus))


def _slice(facts: MachineFacts) -> tuple[Check, ...]:
    """A device plugin may call slices by the name of whole GPUs (`migStrategy: single`); then only the class that a
    service names tells the price of a slice from that of all its GPU."""
    profile = mig_profile(facts.driver.gpus[0].name) if facts.driver and facts.driver.gpus else ""
    if not profile:
        return ()
    if names_profile(facts.gpu_class, profile):
        return (Check("slice", f"{profile}, priced as {facts.gpu_class}"),)
    return (
        Check(
            "slice",
            f"this GPU is a MIG instance ({profile}) and the class {facts.gpu_class} does not say so, so its time "
            "would be priced as another GPU's",
            Verdict.FAILED if facts.billed else Verdict.WARNING,
            f"set spec.resources.gpu.class to {facts.gpu_class.partition('.')[0]}.{priced_profile(profile)}",
            failure.GPU_CLASS_WRONG,
        ),
    )


def _sharing(facts: MachineFacts) -> Check:
    """A GPU that containers take turns on, or share by MPS, lets a step last as long as the others' work says."""
    if facts.serving:
        return Check(
            "sharing", "a worker serves here already, and its engine is what is seen on the GPU", Verdict.LATER
        )
    seen = (facts.driver.others, *facts.driver.further)[: facts.gpus_wanted] if facts.driver else (Others(),)
    found = next(filter(None, (_shared_by(others, facts.mps_pipe) for others in seen)), "")
    if not found:
        return Check("sharing", f"nobody else is seen on {'this GPU' if len(seen) == 1 else f'these {len(seen)} GPUs'}")
    return Check(
        "sharing",
        f"{found}, so the time of a step holds others' work and cannot be billed as measured",
        Verdict.FAILED if facts.billed else Verdict.WARNING,
        "give the worker a whole GPU or a MIG instance: name one by spec.resources.gpu.resourceName, or take "
        "time-slicing and MPS out of the device plugin's configuration of this node",
        failure.GPU_SHARED,
    )


def _shared_by(others: Others, mps_pipe: str) -> str:
    """Who else is on a GPU; empty where nobody is seen."""
    if mps_pipe or others.mps_clients:
        clients = f"{others.mps_clients} MPS client{'s' if others.mps_clients != 1 else ''}"
        return f"this GPU is shared by MPS ({f'CUDA_MPS_PIPE_DIRECTORY is {mps_pipe}' if mps_pipe else clients})"
    if others.processes:
        return f"{others.processes} other process{'es compute' if others.processes > 1 else ' computes'} on this GPU"
    if (others.used or 0) >= FOREIGN_BYTES:
        return f"{_gb(others.used or 0)} of this GPU's memory are used, and not by this worker"
    return ""


def _toolkit(facts: MachineFacts) -> Check:
    """A driver serves every toolkit of its own major version and of older ones; CUDA calls it minor version
    compatibility."""
    supported = facts.driver.cuda if facts.driver else None
    if facts.torch_cuda == "":
        return Check(
            "toolkit",
            "the installed torch was built for the CPU and cannot use a GPU",
            Verdict.FAILED,
            "use a worker image whose torch has CUDA, or set resources.gpu.count to 0",
            failure.GPU_NOT_FOUND,
        )
    built = _version(facts.torch_cuda or "")
    if supported is None or built is None:
        return Check("toolkit", f"torch for CUDA {facts.torch_cuda or 'unknown'}; the driver tells no version")
    drivers = f"{supported[0]}.{supported[1]}"
    if supported[0] < built[0]:
        return Check(
            "toolkit",
            f"the node's driver supports CUDA {drivers} and this image's torch was built for CUDA {facts.torch_cuda}",
            Verdict.FAILED,
            f"install a driver for CUDA {built[0]} or newer, or set spec.engine.image to one for CUDA {supported[0]}",
            failure.DRIVER_TOO_OLD,
        )
    if supported < built:
        return Check(
            "toolkit",
            f"driver for CUDA {drivers}, torch for CUDA {facts.torch_cuda}",
            Verdict.WARNING,
            "it works by minor version compatibility; a newer driver is better",
        )
    return Check("toolkit", f"driver for CUDA {drivers}, torch for CUDA {facts.torch_cuda}")


def _shared_memory(facts: MachineFacts) -> Check:
    needed = SHARED_MEMORY_BYTES * facts.gpus_wanted
    gpus = f"{facts.gpus_wanted} GPU{' needs' if facts.gpus_wanted == 1 else 's need'}"
    found = f"/dev/shm has {_mib(facts.shared_memory)} and {gpus} {_mib(needed)}"  # noqa: S108 - told, not used
    if facts.shared_memory < needed:
        return Check(
            "shared memory",
            found,
            Verdict.FAILED,
            f"set spec.resources.sharedMemory to {_mib(needed).replace(' MiB', 'Mi')} or more",
            failure.SHARED_MEMORY_TOO_SMALL,
        )
    return Check("shared memory", found)


def _architecture(model: ModelFacts, types: frozenset[str] | None) -> Check:
    if types is None or model.model_type in types:
        return Check("architecture", model.model_type)
    brings = "; the code that it brings along is never run" if model.own_code else ""
    return Check(
        "architecture",
        f"the installed transformers does not know the model type {model.model_type}{brings}",
        Verdict.FAILED,
        "use another model, or set spec.engine.image to an image with a transformers that knows it",
        failure.ARCHITECTURE_UNKNOWN,
    )


def _dtype(dtype: str, asked: str, facts: MachineFacts) -> Check:
    old = [gpu for gpu in (facts.driver.gpus if facts.driver else ()) if gpu.capability < _BF16_CAPABILITY]
    if facts.gpus_wanted and dtype == "bfloat16" and old:
        capability = ".".join(map(str, old[0].capability))
        return Check(
            "dtype",
            f"bfloat16{' (the model is stored so)' if asked == 'auto' else ''} needs compute capability 8.0 and "
            f"{old[0].name} has {capability}",
            Verdict.FAILED,
            "set spec.model.dtype to float16 or float32",
            failure.DTYPE_UNSUPPORTED,
        )
    return Check("dtype", f"{dtype}{' (auto)' if asked == 'auto' else ''}")


def _memory(model: ModelFacts, facts: MachineFacts, dtype: str, length: int) -> Check:
    """Refuses what cannot be; what fits narrowly is sized by the engine, which measures. Of a model that is split each
    GPU has at least its part."""
    parts = max(facts.gpus_wanted, 1)
    weights, sequence = -(-model.weight_bytes(dtype) // parts), -(-model.sequence_bytes(dtype, length) // parts)
    if facts.gpus_wanted:
        gpus = facts.driver.gpus if facts.driver else ()
        if not gpus:
            return Check("memory", f"weights {_gb(weights)}, one sequence {_gb(sequence)}", Verdict.LATER)
        if facts.serving:
            needs = f"weights {_gb(weights)}, one sequence {_gb(sequence)}"
            return Check("memory", f"{needs}; a worker serves here already and has taken its share", Verdict.LATER)
        least = min(gpus[:parts], key=lambda gpu: gpu.free)
        where, free, extra = (
            f"{least.name} has {_gb(least.free)} free of {_gb(least.total)}",
            least.free,
            CONTEXT_BYTES,
        )
        advice = "use a larger GPU, a smaller model or dtype, or lower spec.model.maxModelLen"
        beside = f", CUDA itself {_gb(extra)}"
    else:
        free, extra = facts.memory, 0
        where = f"the worker may use {_gb(free)}"
        advice = "raise spec.resources.memory, use a smaller model or dtype, or lower spec.model.maxModelLen"
        beside = ""
    needed = weights + sequence + extra
    each = f" on each of {parts} GPUs" if parts > 1 else ""
    found = (
        f"the model needs {_gb(needed)}{each} (weights {_gb(weights)} in {dtype}, one sequence of {length} tokens "
        f"{_gb(sequence)}{beside}) and {where}"
    )
    if needed > free:
        return Check("memory", found, Verdict.FAILED, advice, failure.OUT_OF_MEMORY)
    return Check("memory", found)


def _version(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _mib(count: int) -> str:
    return f"{count // 2**20} MiB"
