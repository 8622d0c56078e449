"""The GPU's figures in Prometheus' format, in base units, labelled with its UUID as DCGM's exporter does.

Owns names and texts. A figure that nobody tells has no sample: absent is not zero.
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gpumeter_worker.telemetry.sample import Sample
from gpumeter_worker.telemetry.watch import GpuWatch

_PREFIX = "gpumeter_gpu_"


def families(watch: GpuWatch) -> Iterable[Metric]:
    """Everything that is known at the moment of a scrape."""
    sample, absence = watch.sample, watch.absence
    up = GaugeMetricFamily("gpumeter_nvml_up", "1 while NVML answers; else why it does not", labels=["reason"])
    up.add_metric([absence.reason if absence else ""], 0 if absence else 1)
    yield up
    if sample is not None:
        yield from _sampled(sample)
    yield from _joined(watch)


def _sampled(sample: Sample) -> Iterable[Metric]:
    info = GaugeMetricFamily(
        "gpumeter_gpu_info", "Which GPU or MIG instance this is", labels=["gpu", "name", "mig_profile", "driver"]
    )
    info.add_metric([sample.uuid, sample.name, sample.mig_profile, sample.driver or ""], 1)
    yield info
    gauges = (
        ("utilization_ratio", "Share of time in which any kernel ran (NVML)", _share(sample.gpu_percent)),
        (
            "memory_utilization_ratio",
            "Share of time in which memory was read or written (NVML)",
            _share(sample.memory_percent),
        ),
        ("memory_used_bytes", "Memory in use, the driver's own included", sample.memory_used_bytes),
        ("memory_bytes", "Memory that there is", sample.memory_total_bytes),
        ("power_watts", "Power of the whole board", _divided(sample.power_mw, 1000)),
        ("temperature_celsius", "Temperature of the GPU", sample.temperature_c),
        ("sm_clock_hertz", "Clock of the multiprocessors", _times(sample.sm_mhz, 10**6)),
        ("memory_clock_hertz", "Clock of the memory", _times(sample.memory_mhz, 10**6)),
        ("processes", "Processes that compute on it, as far as this container may see them", sample.processes),
        ("mps_clients", "Clients of an MPS server on it", sample.mps_clients),
    )
    counters = (
        ("energy_joules", "Energy of the whole board since its driver was loaded", _divided(sample.energy_mj, 1000)),
        ("nvlink_transmit_bytes", "Sent over all NVLinks", sample.nvlink_sent_bytes),
        ("nvlink_receive_bytes", "Received over all NVLinks", sample.nvlink_received_bytes),
    )
    for kind, figures in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, text, value in figures:
            if value is not None:
                family = kind(_PREFIX + name, text, labels=["gpu"])
                family.add_metric([sample.uuid], value)
                yield family


def _joined(watch: GpuWatch) -> Iterable[Metric]:
    """What comes of NVML's figures beside the meter's."""
    if watch.comparison is not None:
        family = GaugeMetricFamily(
            "gpumeter_gpu_busy_ratio",
            "How busy the GPU was over the last 10 s or more: time inside measured steps, and NVML's utilisation",
            labels=["source"],
        )
        family.add_metric(["steps"], watch.comparison.measured)
        family.add_metric(["nvml"], watch.comparison.nvml)
        yield family
        yield GaugeMetricFamily(
            "gpumeter_gpu_foreign_work",
            "1 while NVML sees the GPU busier than this worker's steps make it",
            value=int(watch.foreign),
        )
    spent = watch.energy
    if spent.windows:
        counter = CounterMetricFamily(
            "gpumeter_energy_estimate_joules",
            "Estimate: energy by measured time beyond the idle power (attributed), and the rest (platform)",
            labels=["owner"],
        )
        counter.add_metric(["attributed"], spent.attributed_mj / 1000)
        counter.add_metric(["platform"], spent.platform_mj / 1000)
        yield counter
    if spent.idle_mw is not None:
        yield GaugeMetricFamily(
            "gpumeter_gpu_idle_power_watts", "Power that the estimate takes for idle", value=spent.idle_mw / 1000
        )


def _share(percent: int | None) -> float | None:
    return _divided(percent, 100)


def _divided(value: int | None, by: int) -> float | None:
    return None if value is None else value / by


def _times(value: int | None, by: int) -> int | None:
    return None if value is None else value * by
