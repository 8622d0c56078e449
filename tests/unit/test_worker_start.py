"""Settings, start-up checks, readiness and lease: every refusal is a sentence that says what to do."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from gpumeter_worker.diagnosis import use_writable_places
from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.launch import engine_options
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.lease import Lease, lease
from gpumeter_worker.modelfiles import read_model
from gpumeter_worker.readiness import Condition, Loss, Readiness, readiness
from gpumeter_worker.settings import SettingsInvalid, from_environment

SECOND = 10**9


def environment(folder: Path, **changes: str) -> dict[str, str]:
    for name in ("usage-token", "hop-key"):
        (folder / name).write_text(f"{name}-{'0' * 32}\n")
    return {
        "GPUMETER_SERVICE": "team-a/smollm2",
        "GPUMETER_SERVICE_UID": "uid",
        "GPUMETER_WORKER_UID": "pod",
        "GPUMETER_MODEL_URI": "file:///models/smollm2",
        "GPUMETER_CREDENTIALS_DIR": str(folder),
    } | changes


def test_settings_have_the_defaults_of_the_resource(tmp_path: Path) -> None:
    settings = from_environment(environment(tmp_path))
    assert settings.model_name == "smollm2"
    assert (settings.max_batch_size, settings.max_batch_tokens, settings.max_queue_length) == (64, 2048, 256)
    assert (settings.device, settings.clock, settings.gpu_class) == ("cpu", "host", "cpu")
    assert settings.credentials is not None
    assert settings.credentials.hop_key == "hop-key-" + "0" * 32


def test_a_gpu_that_is_asked_for_is_the_device(tmp_path: Path) -> None:
    settings = from_environment(environment(tmp_path, GPUMETER_GPU_COUNT="1", GPUMETER_GPU_CLASS="h100"))
    assert (settings.device, settings.clock, settings.gpu_class) == ("cuda", "cuda", "h100")


def test_a_model_is_split_over_all_gpus_of_the_worker_and_over_no_other_number(tmp_path: Path) -> None:
    assert from_environment(environment(tmp_path)).ranks == 1
    assert from_environment(environment(tmp_path, GPUMETER_GPU_COUNT="4")).ranks == 4
    assert from_environment(environment(tmp_path, GPUMETER_TENSOR_PARALLEL="2")).ranks == 2
    with pytest.raises(SettingsInvalid, match=r"TENSOR_PARALLEL is 2 and GPUMETER_GPU_COUNT is 4; .* make them equal"):
        from_environment(environment(tmp_path, GPUMETER_GPU_COUNT="4", GPUMETER_TENSOR_PARALLEL="2"))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    wrong = environment(tmp_path, GPUMETER_SERVICE="no-slash", GPUMETER_MAX_BATCH_SIZE="-1", GPUMETER_DTYPE="int4")
    (tmp_path / "hop-key").write_text("short")
    (tmp_path / "usage-token").unlink()
    del wrong["GPUMETER_WORKER_UID"]
    with pytest.raises(SettingsInvalid) as refused:
        from_environment(wrong)
    text = str(refused.value)
    for part in ("namespace/name", "MAX_BATCH_SIZE", "DTYPE", "hop-key", "usage-token", "WORKER_UID is not set"):
        assert part in text
    assert len(refused.value.problems) == 6


def test_who_runs_a_worker_by_hand_is_told_how_to_name_a_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="GPUMETER_MODEL_URI is not set; name the model with --model URI"):
        from_environment({"XDG_STATE_HOME": str(tmp_path)}, dev=True)


def test_the_engine_lets_as_many_wait_as_admission_lets_in(tmp_path: Path) -> None:
    settings = from_environment(environment(tmp_path, GPUMETER_MAX_QUEUE_LENGTH="100000"))
    assert engine_options(settings, tmp_path).sequences_max == 100_000 + 64


def test_ranks_share_cores_and_memory_and_no_rank_is_without_a_core(tmp_path: Path) -> None:
    alone = engine_options(from_environment(environment(tmp_path)), tmp_path)
    split = engine_options(from_environment(environment(tmp_path, GPUMETER_TENSOR_PARALLEL="2")), tmp_path)
    many = engine_options(from_environment(environment(tmp_path, GPUMETER_TENSOR_PARALLEL="64")), tmp_path)
    assert (alone.ranks, split.ranks, many.threads) == (1, 2, max(1, alone.threads // 64))
    assert (split.threads, split.memory_bytes) == (max(1, alone.threads // 2), alone.memory_bytes // 2)


def test_a_step_must_hold_one_token_of_every_request(tmp_path: Path) -> None:
    small = environment(tmp_path, GPUMETER_MAX_BATCH_TOKENS="32")
    with pytest.raises(SettingsInvalid, match="at least GPUMETER_MAX_BATCH_SIZE"):
        from_environment(small)


def test_switches_are_read_and_what_is_no_switch_is_refused(tmp_path: Path) -> None:
    settings = from_environment(environment(tmp_path))
    assert (settings.cuda_graphs, settings.compile, settings.prefix_cache, settings.allow_pickle) == (
        True,
        False,
        True,
        False,
    )
    switched = {"GPUMETER_CUDA_GRAPHS": "false", "GPUMETER_COMPILE": "true", "GPUMETER_PREFIX_CACHE": "0"}
    settings = from_environment(environment(tmp_path, **switched, GPUMETER_ALLOW_PICKLE="1"))
    assert (settings.cuda_graphs, settings.compile, settings.prefix_cache, settings.allow_pickle) == (
        False,
        True,
        False,
        True,
    )
    with pytest.raises(SettingsInvalid, match="GPUMETER_COMPILE is 'maybe'; it must be 1 or 0"):
        from_environment(environment(tmp_path, GPUMETER_COMPILE="maybe"))


def test_dev_needs_nothing_but_a_model_and_is_refused_to_the_operator() -> None:
    settings = from_environment({"HOME": "/tmp"}, dev=True, model="file:///models/smollm2")
    assert (settings.credentials, settings.lease_timeout_ms, settings.http_host) == (None, 0, "127.0.0.1")
    with pytest.raises(SettingsInvalid, match="the operator started this worker"):
        from_environment({"GPUMETER_SERVICE_UID": "uid"}, dev=True, model="file:///models/smollm2")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    read_model(folder)
    return folder


def told(folder: Path) -> str:
    with pytest.raises(StartupFailed) as failed:
        read_model(folder)
    return failed.value.line


def test_each_missing_or_damaged_file_is_named(model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert told(model).startswith(f"ModelInvalid: {weights} is cut short ({len(whole) - 1} of {len(whole)} bytes)")
    weights.write_bytes(b"\xff" * 40)
    assert told(model).startswith(f"ModelInvalid: {weights} is damaged")
    weights.rename(model / "model.gguf")
    assert "holds no *.safetensors weights (model.gguf is of a kind that is not loaded)" in told(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-2.safetensors"}}))
    assert "lacks the weights model-2.safetensors" in told(model)
    (model / "tokenizer.json").unlink()
    assert f"{model / 'tokenizer.json'} is missing" in told(model)
    (model / "config.json").write_text("{")
    assert f"{model / 'config.json'} cannot be read" in told(model)
    (model / "config.json").unlink()
    assert f"{model / 'config.json'} is missing" in told(model)


def test_libraries_are_sent_to_places_that_a_read_only_container_can_write(tmp_path: Path) -> None:
    settings = from_environment(environment(tmp_path, GPUMETER_MODEL_CACHE="/var/cache/gpumeter"))
    missing = use_writable_places(settings, {"HOME": "/nonexistent"})
    assert (missing["HOME"], missing["HF_HOME"]) == ("/tmp", "/var/cache/gpumeter/huggingface")
    assert "HF_HOME" not in use_writable_places(settings, {"HOME": str(tmp_path), "HF_HOME": "/mine"})


def test_the_lease_holds_until_nobody_acknowledges_for_too_long() -> None:
    assert lease(60 * SECOND, 0, 60 * SECOND) == Lease(held=True)
    expired = lease(61 * SECOND, 0, 60 * SECOND)
    assert not expired.held
    assert "no usage was acknowledged for 61 s (at most 60 s are allowed)" in expired.message
    assert lease(10**18, 0, 0).held


def test_readiness_tells_how_far_loading_is_while_it_loads() -> None:
    waiting = Condition(Phase.LOAD, False, "", False, None, True, "", "", Lease(held=True), loading="9 of 10 MB")
    assert readiness(waiting) == Readiness(False, "Loading", "9 of 10 MB")
    assert "9 of 10 MB" not in readiness(replace(waiting, phase=Phase.WARMUP)).message


def test_readiness_tells_the_first_reason_that_stands_against_serving() -> None:
    good = {
        "phase": Phase.SERVING,
        "draining": False,
        "clock_problem": "",
        "engine_ready": True,
        "engine_loss": None,
        "journal_open": True,
        "journal_problem": "",
        "journal_full": "",
        "lease": Lease(held=True),
    }
    assert readiness(Condition(**good)).ready  # type: ignore[arg-type]
    against = [
        ({"lease": Lease(held=False, message="m")}, "LeaseExpired"),
        ({"journal_full": "m"}, "JournalFull"),
        ({"engine_ready": False, "phase": Phase.WARMUP}, "WarmingUp"),
        ({"engine_ready": False, "phase": Phase.LOAD}, "Loading"),
        ({"engine_loss": Loss("EngineHung", "the engine process hung")}, "EngineHung"),
        ({"journal_open": False}, "Starting"),
        ({"journal_problem": "m"}, "JournalUnusable"),
        ({"draining": True}, "Draining"),
        ({"clock_problem": "m"}, "ClockJumped"),
    ]
    so_far = good
    for change, reason in against:
        so_far = so_far | change
        state = readiness(Condition(**so_far))  # type: ignore[arg-type]
        assert (state.ready, state.reason) == (False, reason)
        assert state.message
