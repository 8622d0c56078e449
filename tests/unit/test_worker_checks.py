"""Start-up diagnosis on frozen facts: every wrong machine gets one sentence with its numbers and what to do."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumeter_operator.decide.spec import read
from gpumeter_worker import failure, machine
from gpumeter_worker.checks import Asked, Check, MachineFacts, Verdict, check_machine, check_model
from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.machine import Driver, Gpu, Others, read_probe
from gpumeter_worker.modelfiles import ModelFacts, read_model, served_dtype
from gpumeter_worker.telemetry.sample import Sample, gpu_class

GB = 10**9
NOBODY = Others()
H100 = Gpu("NVIDIA H100", (9, 0), 80 * GB, 79 * GB)
T4 = Gpu("Tesla T4", (7, 5), 15 * GB, 15 * GB)
GOOD = MachineFacts(
    gpus_wanted=1,
    device_files=("nvidia0",),
    driver=Driver((12, 8), (H100,), ""),
    torch_cuda="12.8",
    shared_memory=2**30,
    memory=32 * GB,
)
CPU = replace(GOOD, gpus_wanted=0, device_files=(), driver=None)
# Llama 3.1 8B: 32 layers, 8 heads of keys and values of 128.
LLAMA = ModelFacts("llama", False, "bfloat16", 8 * 10**9, 0, 2 * 32 * 8 * 128, 131072)
ASKED = Asked("auto", 8192, frozenset({"llama"}))


def failed(checks: tuple[Check, ...]) -> str:
    [one] = [check.failed for check in checks if check.verdict is Verdict.FAILED]
    assert one is not None
    return one.line


def test_a_machine_that_fits_passes_every_check() -> None:
    checks = check_machine(GOOD) + check_model(LLAMA, GOOD, ASKED)
    assert {check.verdict for check in checks} == {Verdict.OK}
    assert {check.name for check in checks} == {
        "device",
        "sharing",
        "toolkit",
        "shared memory",
        "architecture",
        "dtype",
        "memory",
    }


def test_the_cpu_needs_nothing_of_a_gpu() -> None:
    assert [check.found for check in check_machine(CPU)] == ["the CPU, as asked for"]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            replace(GOOD, device_files=(), driver=None),
            "GpuNotFound: 1 GPU was asked for and this container has none (no /dev/nvidia* device); schedule it on a "
            "node with the NVIDIA driver and container toolkit, or set resources.gpu.count to 0",
        ),
        (
            replace(GOOD, driver=Driver((12, 8), (), "the driver refuses to start (CUDA_ERROR_NO_DEVICE)")),
            "GpuNotFound: 1 GPU was asked for and cannot be used: the driver refuses to start (CUDA_ERROR_NO_DEVICE); "
            "check the node's driver with nvidia-smi, and that the container toolkit is configured for its runtime",
        ),
        (
            replace(GOOD, gpus_wanted=2),
            "GpuNotFound: 2 GPUs were asked for and the driver shows 1; check resources.gpu.resourceName, and the "
            "device plugin of the node",
        ),
        (
            replace(GOOD, driver=Driver((11, 4), (H100,), "")),
            "DriverTooOld: the node's driver supports CUDA 11.4 and this image's torch was built for CUDA 12.8; "
            "install a driver for CUDA 12 or newer, or set spec.engine.image to one for CUDA 11",
        ),
        (
            replace(GOOD, torch_cuda=""),
            "GpuNotFound: the installed torch was built for the CPU and cannot use a GPU; use a worker image whose "
            "torch has CUDA, or set resources.gpu.count to 0",
        ),
        (
            replace(GOOD, shared_memory=2**20),
            "SharedMemoryTooSmall: /dev/shm has 1 MiB and 1 GPU needs 64 MiB; set spec.resources.sharedMemory to "
            "64Mi or more",
        ),
    ],
)
def test_what_is_wrong_with_a_machine_is_one_sentence(facts: MachineFacts, sentence: str) -> None:
    assert failed(check_machine(facts)) == sentence


def test_a_split_model_needs_its_part_on_the_gpu_with_the_least_room_and_shared_memory_for_each() -> None:
    full = replace(H100, free=9 * GB)
    four = replace(GOOD, gpus_wanted=4, driver=Driver((12, 8), (H100, H100, H100, full), ""))
    checks = check_machine(four) + check_model(LLAMA, four, ASKED)
    assert {check.verdict for check in checks} == {Verdict.OK}
    assert checks[-1].found.startswith("the model needs 4.8 GB on each of 4 GPUs (weights 4.0 GB in bfloat16,")
    fuller = replace(four, driver=Driver((12, 8), (H100, H100, H100, replace(H100, free=4 * GB)), ""))
    assert failed(check_model(LLAMA, fuller, ASKED)).endswith(
        "and NVIDIA H100 has 4.0 GB free of 80.0 GB; use a larger GPU, a smaller model or dtype, or lower "
        "spec.model.maxModelLen"
    )
    assert failed(check_machine(replace(four, shared_memory=128 * 2**20))) == (
        "SharedMemoryTooSmall: /dev/shm has 128 MiB and 4 GPUs need 256 MiB; set spec.resources.sharedMemory to 256Mi "
        "or more"
    )


SLICE = replace(GOOD, driver=Driver((12, 8), (replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb+me"),), "", NOBODY))


@pytest.mark.parametrize("named", ["h100", "gpu", "h100.1g.10gb", "h100.2g.20gb"])
def test_a_slice_that_would_be_priced_as_a_whole_gpu_is_refused(named: str) -> None:
    assert failed(check_machine(replace(SLICE, gpu_class=named))) == (
        f"GpuClassWrong: this GPU is a MIG instance (1g.10gb+me) and the class {named} does not say so, so its time "
        f"would be priced as another GPU's; set spec.resources.gpu.class to {named.partition('.')[0]}.1g.10gb.me"
    )
    assert all(check.failed is None for check in check_machine(replace(SLICE, gpu_class=named, billed=False)))


@pytest.mark.parametrize("resource", ["nvidia.com/mig-1g.10gb.me", "nvidia.com/gpu"])
def test_a_slice_is_served_under_the_class_by_which_the_operator_prices_it(resource: str) -> None:
    named = "h100" if "mig-" in resource else "h100.1g.10gb.me"
    service = {
        "metadata": {"namespace": "team", "name": "one", "uid": "1"},
        "spec": {"resources": {"gpu": {"resourceName": resource, "class": named}}},
    }
    spec, _ = read(service)
    checks = check_machine(replace(SLICE, gpu_class=spec.gpu_class))
    assert {check.verdict for check in checks} == {Verdict.OK}
    assert gpu_class(spec.gpu_class, Sample(1, "MIG-1", "a slice", "1g.10gb+me")) == spec.gpu_class == "h100.1g.10gb.me"


def shared(others: Others = NOBODY, **facts: Any) -> MachineFacts:
    return replace(GOOD, driver=Driver((12, 8), (H100,), "", others), **facts)


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (
            shared(mps_pipe="/mps/nvidia.com/gpu/pipe"),
            "this GPU is shared by MPS (CUDA_MPS_PIPE_DIRECTORY is /mps/nvidia.com/gpu/pipe)",
        ),
        (shared(Others(0, 3, 0)), "this GPU is shared by MPS (3 MPS clients)"),
        (shared(Others(1, 0, 0)), "1 other process computes on this GPU"),
        (shared(Others(2, None, None)), "2 other processes compute on this GPU"),
        (shared(Others(0, 0, 600 * 10**6)), "0.6 GB of this GPU's memory are used, and not by this worker"),
    ],
)
def test_a_gpu_that_others_share_is_refused_for_measured_billing(facts: MachineFacts, found: str) -> None:
    assert failed(check_machine(facts)) == (
        f"GpuShared: {found}, so the time of a step holds others' work and cannot be billed as measured; give the "
        "worker a whole GPU or a MIG instance: name one by spec.resources.gpu.resourceName, or take time-slicing and "
        "MPS out of the device plugin's configuration of this node"
    )
    by_hand = check_machine(replace(facts, billed=False))
    assert [check.verdict for check in by_hand] == [Verdict.OK, Verdict.WARNING, Verdict.OK, Verdict.OK]


def test_every_gpu_that_the_worker_takes_is_looked_at_and_no_other() -> None:
    busy = Driver((12, 8), (H100, H100, H100), "", Others(0, 0, 0), (Others(0, 0, 0), Others(1, 0, 0)))
    two, three = (replace(GOOD, gpus_wanted=count, driver=busy) for count in (2, 3))
    assert check_machine(two)[1] == Check("sharing", "nobody else is seen on these 2 GPUs")
    assert failed(check_machine(three)).startswith("GpuShared: 1 other process computes on this GPU, so the time of")


@pytest.mark.parametrize("others", [Others(), Others(0, 0, 0), Others(None, 0, 20 * 10**6)])
def test_a_quiet_gpu_is_not_taken_for_a_shared_one(others: Others) -> None:
    assert {check.verdict for check in check_machine(shared(others))} == {Verdict.OK}


def test_mps_is_found_where_the_device_plugin_or_a_plain_machine_has_it(tmp_path: Path) -> None:
    assert machine.mps_pipe({}, tmp_path) == ""
    assert machine.mps_pipe({"CUDA_MPS_PIPE_DIRECTORY": "/mps/pipe"}, tmp_path) == "/mps/pipe"
    (tmp_path / "control").touch()
    assert machine.mps_pipe({}, tmp_path) == str(tmp_path)


def test_an_older_driver_of_the_same_major_version_is_only_remarked() -> None:
    toolkit = check_machine(replace(GOOD, driver=Driver((12, 2), (H100,), "")))[2]
    assert (toolkit.verdict, toolkit.found) == (Verdict.WARNING, "driver for CUDA 12.2, torch for CUDA 12.8")
    newer = check_machine(replace(GOOD, driver=Driver((13, 0), (H100,), "")))[2]
    assert newer.verdict is Verdict.OK


@pytest.mark.parametrize(
    ("model", "facts", "asked", "sentence"),
    [
        (
            replace(LLAMA, model_type="brandnew", own_code=True),
            GOOD,
            ASKED,
            "ArchitectureUnknown: the installed transformers does not know the model type brandnew; the code that it "
            "brings along is never run; use another model, or set spec.engine.image to an image with a transformers "
            "that knows it",
        ),
        (
            replace(LLAMA, floats=10**9),
            replace(GOOD, driver=Driver((12, 8), (T4,), "")),
            ASKED,
            "DtypeUnsupported: bfloat16 (the model is stored so) needs compute capability 8.0 and Tesla T4 has 7.5; "
            "set spec.model.dtype to float16 or float32",
        ),
        (
            LLAMA,
            replace(GOOD, driver=Driver((12, 8), (T4,), "")),
            Asked("float16", 8192, None),
            "OutOfMemory: the model needs 17.6 GB (weights 16.0 GB in float16, one sequence of 8192 tokens 1.1 GB, "
            "CUDA itself 0.5 GB) and Tesla T4 has 15.0 GB free of 15.0 GB; use a larger GPU, a smaller model or "
            "dtype, or lower spec.model.maxModelLen",
        ),
        (
            LLAMA,
            CPU,
            Asked("float32", 8192, None),
            "OutOfMemory: the model needs 34.1 GB (weights 32.0 GB in float32, one sequence of 8192 tokens 2.1 GB) "
            "and the worker may use 32.0 GB; raise spec.resources.memory, use a smaller model or dtype, or lower "
            "spec.model.maxModelLen",
        ),
    ],
)
def test_what_is_wrong_with_a_model_is_one_sentence(
    model: ModelFacts, facts: MachineFacts, asked: Asked, sentence: str
) -> None:
    assert failed(check_model(model, facts, asked)) == sentence


def test_a_shorter_sequence_may_be_what_makes_a_model_fit() -> None:
    tight = replace(CPU, memory=17 * GB)
    assert failed(check_model(LLAMA, tight, Asked("auto", 16384, None)))
    assert all(check.failed is None for check in check_model(LLAMA, tight, Asked("auto", 4096, None)))


def test_auto_is_the_models_own_dtype_except_for_float16_on_a_cpu() -> None:
    assert served_dtype("auto", "bfloat16", gpu=False) == "bfloat16"
    assert served_dtype("auto", "float16", gpu=True) == "float16"
    assert served_dtype("auto", "float16", gpu=False) == "float32"
    assert served_dtype("float16", "bfloat16", gpu=False) == "float16"


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, int]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder


def test_memory_is_read_from_the_headers_and_the_configuration(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3",
        "text_config": {
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 64,
            "max_position_embeddings": 100,
            "dtype": "bfloat16",
        },
    }
    model = read_model(write_model(tmp_path / "m", config, {"a": ("BF16", 200), "b": ("F32", 40), "c": ("I8", 7)}))
    assert (model.model_type, model.dtype, model.length(4096), model.length(0), model.length(50)) == (
        "gemma3",
        "bfloat16",
        100,
        100,
        50,
    )
    assert model.weight_bytes("float32") == (100 + 10) * 4 + 7
    assert model.weight_bytes("bfloat16") == (100 + 10) * 2 + 7
    assert model.sequence_bytes("bfloat16", 10) == 2 * 3 * 2 * 16 * 2 * 10


def test_the_dtype_of_the_weights_holds_where_the_configuration_tells_none(tmp_path: Path) -> None:
    model = read_model(write_model(tmp_path / "m", {"model_type": "llama"}, {"a": ("F16", 200), "b": ("F32", 4)}))
    assert model.dtype == "float16"
    assert model.sequence_bytes("float16", 10) == 0  # the configuration does not say


def test_pickled_weights_are_refused_with_the_way_to_allow_them(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"model_type": "llama"}, {"a": ("F16", 200)})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(StartupFailed, match=r"pytorch_model\.bin is a pickle, .* set GPUMETER_ALLOW_PICKLE to 1"):
        read_model(folder)
    assert read_model(folder, allow_pickle=True).weight_bytes("float16") > 200


def test_the_installed_torch_and_transformers_are_read_without_importing_them() -> None:
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert machine.torch_cuda() == (torch.version.cuda or "")
    known = machine.model_types()
    assert known is not None
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma3_text"} <= known <= set(CONFIG_MAPPING_NAMES)


def test_the_driver_is_asked_in_a_process_of_its_own_and_its_answer_read() -> None:
    found = machine.driver()  # on a machine without one this is a problem in words, never an exception
    assert found.problem or found.gpus
    device = {"name": "NVIDIA H100", "capability": [9, 0], "total": 80 * GB, "free": 79 * GB}
    assert read_probe(json.dumps({"cuda": 12080, "devices": [device], "problem": ""})) == GOOD.driver


def test_device_files_are_found_where_the_container_has_them(tmp_path: Path) -> None:
    assert machine.device_files(tmp_path) == ()
    for name in ("nvidia0", "nvidiactl", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    assert machine.device_files(tmp_path) == ("nvidia-caps", "nvidia0")


def test_shared_memory_is_measured_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    assert machine.shared_memory_bytes(tmp_path) > 0
    assert machine.shared_memory_bytes(tmp_path / "absent") == 0


def test_a_reason_and_the_way_to_quote_an_error_are_written_once() -> None:
    root = Path(failure.__file__).parent
    reasons = {value for name, value in vars(failure).items() if name.isupper() and isinstance(value, str)}
    assert "OutOfMemory" in reasons
    for file in root.rglob("*.py"):
        if file.name == "failure.py":
            continue
        text = file.read_text()
        assert not [reason for reason in reasons if f'"{reason}"' in text], file
        assert ".strip().splitlines()" not in text, file


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        (
            "Max retries exceeded with url: /blob?X-Amz-Signature=abc&X-Amz-Date=1 (Caused by x)",
            "/blob?... (Caused by x)",
        ),
        ("403 for url 'https://store/a?sig=abc'", "for url 'https://store/a?...'"),
        ("cannot reach https://name:secret@hub/api", "reach https://hub/api"),
        ("is it there? yes", "is it there? yes"),
    ],
)
def test_an_error_is_quoted_without_what_may_open_something(said: str, quoted: str) -> None:
    line = failure.first_line(ValueError(said))
    assert line.endswith(quoted)
    assert "abc" not in line
    assert "secret" not in line


def test_a_worker_that_serves_here_is_not_taken_for_somebody_else_by_whoever_diagnoses_beside_it(
    tmp_path: Path,
) -> None:
    for pid, command in (("7", b"bash\0"), ("12", b"python\0-m\0gpumeter_worker.engine.process\0005\0")):
        assert not machine.engine_runs(tmp_path)
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(command)
    assert machine.engine_runs(tmp_path)
    driver = replace(GOOD.driver, others=Others(processes=1, used=60 * GB), gpus=(replace(H100, free=GB),))
    for serving, verdict in ((True, Verdict.LATER), (False, Verdict.FAILED)):
        checks = check_machine(replace(GOOD, driver=driver, serving=serving))
        assert {check.name: check.verdict for check in checks}["sharing"] is verdict
