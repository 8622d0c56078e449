"""NVML's figures beside the meter's: who is named in records, and when both disagree."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from gpumeter_usage.page import JournalStatus, decode_status, encode_status
from gpumeter_worker.telemetry.exposition import families
from gpumeter_worker.telemetry.sample import Absence, Sample, decode, encode, gpu_class
from gpumeter_worker.telemetry.sampler import Sampler
from gpumeter_worker.telemetry.watch import GpuWatch, Metered

S = 10**9
A100 = Sample(10 * S, "GPU-1", "NVIDIA A100-SXM4-40GB", "", gpu_percent=50, energy_mj=10**9, power_mw=60_000)
INSTANCE = Sample(10 * S, "MIG-1", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "1g.5gb")
RUNNING = Metered(0, 0, serving=True, busy=True)


class Told(Sampler):
    """A sampler that a test speaks for."""

    def __init__(self, on_sample: Callable[[Sample], None]) -> None:
        super().__init__(on_sample)
        self.hear = self._keep
        self.lose = self._lose


class Rig:
    def __init__(self, gpus: int = 1) -> None:
        self.metered = RUNNING
        self.devices: list[Sample] = []
        self.sampler: Told | None = None
        self.watch = GpuWatch(gpus, lambda: self.metered, self.devices.append, self._make)

    def _make(self, on_sample: Callable[[Sample], None]) -> Told:
        self.sampler = Told(on_sample)
        return self.sampler

    def hear(self, sample: Sample) -> None:
        assert self.sampler is not None
        self.sampler.hear(sample)

    def pass_time(self, seconds: int, percent: int, measured_share: float) -> None:
        for _ in range(seconds):
            last = self.watch.sample or A100
            self.metered = replace(self.metered, attributed_ns=self.metered.attributed_ns + int(measured_share * S))
            self.hear(replace(last, at_ns=last.at_ns + S, gpu_percent=percent))

    def metrics(self) -> dict[str, float]:
        registry = CollectorRegistry()
        registry.register(_Families(self.watch))  # type: ignore[arg-type]
        lines = generate_latest(registry).decode().splitlines()
        found = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in found}


class _Families:
    def __init__(self, watch: GpuWatch) -> None:
        self._watch = watch

    def collect(self) -> list[Metric]:
        return list(families(self._watch))


@pytest.mark.parametrize("told", [A100, INSTANCE, Absence("NvmlGpuLost", "it is gone")])
def test_a_line_of_the_sampling_process_comes_back_as_it_was(told: Sample | Absence) -> None:
    assert decode(encode(told).encode()) == told


@pytest.mark.parametrize(
    "line", [b"", b"x", b"[]", b"{}", b'{"sample": {}}', b'{"other": {"reason": 1}}', b'{"sample": 3}']
)
def test_any_other_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


def test_records_name_the_class_that_the_operator_named_with_the_profile_of_a_mig_instance() -> None:
    assert gpu_class("gpu", A100) == "NVIDIA A100-SXM4-40GB"
    assert gpu_class("a100", A100) == "a100"
    assert gpu_class("gpu", INSTANCE) == "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert gpu_class("a100", INSTANCE) == "a100.1g.5gb"
    assert gpu_class("a100.1g.5gb", INSTANCE) == "a100.1g.5gb"
    assert gpu_class("a100", replace(INSTANCE, mig_profile="1g.5gb+me")) == "a100.1g.5gb.me"
    assert gpu_class("a100-1g.5gb", INSTANCE) == "a100-1g.5gb"


def test_a_worker_on_the_cpu_has_nothing_to_ask_and_says_so() -> None:
    watch = GpuWatch(0, lambda: RUNNING, lambda _: None)
    assert watch.facts()["absence"]["reason"] == "NoGpu"
    rig = Rig()
    rig.watch = watch
    assert rig.metrics() == {'gpumeter_nvml_up{reason="NoGpu"}': 0}


def test_a_device_is_told_once_and_again_when_it_is_another() -> None:
    rig = Rig()
    rig.hear(A100)
    rig.hear(replace(A100, at_ns=11 * S))
    rig.hear(INSTANCE)
    assert [one.uuid for one in rig.devices] == ["GPU-1", "MIG-1"]


def test_a_figure_that_nobody_tells_has_no_sample_and_is_not_zero() -> None:
    rig = Rig()
    rig.hear(INSTANCE)
    found = rig.metrics()
    assert found['gpumeter_nvml_up{reason=""}'] == 1
    assert not any("power" in name or "energy" in name or "utilization" in name for name in found)
    rig.hear(replace(A100, temperature_c=0, nvlink_sent_bytes=2048))
    found = rig.metrics()
    assert found['gpumeter_gpu_utilization_ratio{gpu="GPU-1"}'] == 0.5
    assert found['gpumeter_gpu_temperature_celsius{gpu="GPU-1"}'] == 0
    assert found['gpumeter_gpu_energy_joules_total{gpu="GPU-1"}'] == 10**6
    assert found['gpumeter_gpu_nvlink_transmit_bytes_total{gpu="GPU-1"}'] == 2048
    assert not any("receive" in name for name in found)


def test_a_gpu_that_is_lost_takes_its_figures_along() -> None:
    rig = Rig()
    rig.hear(A100)
    assert rig.sampler is not None
    rig.sampler.lose(Absence("NvmlGpuLost", "the GPU does not answer any more"))
    assert rig.metrics() == {'gpumeter_nvml_up{reason="NvmlGpuLost"}': 0}
    assert rig.watch.facts()["sample"] is None


def test_measured_time_and_nvmls_are_compared_over_ten_seconds() -> None:
    rig = Rig()
    rig.hear(A100)
    rig.pass_time(9, 80, 0.75)
    assert rig.watch.comparison is None
    rig.pass_time(1, 80, 0.75)
    assert rig.metrics()['gpumeter_gpu_busy_ratio{source="steps"}'] == 0.75
    assert rig.metrics()['gpumeter_gpu_busy_ratio{source="nvml"}'] == pytest.approx(0.8)
    assert not rig.watch.foreign


def test_of_several_gpus_the_first_is_compared_and_its_energy_is_not_taken_for_that_of_all() -> None:
    rig = Rig(gpus=4)
    rig.hear(A100)
    rig.pass_time(10, 80, 4 * 0.75)  # every second of steps counts on all of them
    assert rig.metrics()['gpumeter_gpu_busy_ratio{source="steps"}'] == 0.75
    assert rig.watch.facts()["energy_estimate"] is None
    assert rig.metrics()['gpumeter_gpu_energy_joules_total{gpu="GPU-1"}'] == 10**6


def test_a_gpu_that_is_busier_than_our_steps_for_half_a_minute_is_somebody_elses_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    rig.hear(A100)
    rig.pass_time(29, 95, 0.2)
    assert not rig.watch.foreign
    rig.pass_time(30, 95, 0.2)
    assert rig.watch.foreign
    assert rig.metrics()["gpumeter_gpu_foreign_work"] == 1
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "NVML shows the GPU busy for 95 % of the time and this worker's steps took 20 %: somebody else computes on it, "
        "and measured steps hold their work, too; give the worker a GPU of its own"
    ]
    rig.pass_time(11, 25, 0.2)
    assert not rig.watch.foreign


def test_what_loads_and_warms_up_is_compared_with_nothing() -> None:
    rig = Rig()
    rig.metered = replace(RUNNING, serving=False)
    rig.hear(A100)
    rig.pass_time(60, 100, 0)
    assert rig.watch.comparison is None
    assert not rig.watch.foreign


def test_energy_is_estimated_as_samples_come() -> None:
    rig = Rig()
    rig.metered = Metered(0, 0, serving=False, busy=False)
    rig.hear(A100)
    rig.metered = Metered(4 * S, 0, serving=True, busy=True)
    rig.hear(replace(A100, at_ns=20 * S, energy_mj=10**9 + 3_000_000))
    assert rig.watch.facts()["energy_estimate"] == {
        "attributed_mj": 2_400_000,
        "platform_mj": 600_000,
        "idle_mw": 60_000,
        "windows": 1,
    }
    assert rig.metrics()['gpumeter_energy_estimate_joules_total{owner="attributed"}'] == 2400


def test_what_stands_beside_the_journals_status_changes_nothing_for_its_readers() -> None:
    rig = Rig()
    rig.hear(A100)
    status = JournalStatus("pod", "team/model", 7, ())
    data = encode_status(status, {"gpu": rig.watch.facts(), "service": "another"})
    assert decode_status(data) == status
    assert json.loads(data)["gpu"]["sample"]["name"] == "NVIDIA A100-SXM4-40GB"
