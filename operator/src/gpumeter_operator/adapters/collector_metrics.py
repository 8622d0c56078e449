"""Prometheus metrics of the collector.

Owns names, labels and the registry. Reads what the rounds counted when it is scraped; counts nothing itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MAX_SILENT_TOLD = 50  # a zone that is lost must not become thousands of series


@dataclass(frozen=True, slots=True)
class Sample:
    """What the collector has done and where it stands; ages and lags in nanoseconds."""

    records: int
    pages: int
    pulls_failed: int
    alarms: Mapping[str, int]
    reports_written: int
    reports_refused: int
    lag_ns_max: int
    workers: int
    round_age_ns: Mapping[str, int]
    ledger_usable: bool
    collectors: int
    leads: bool
    silent_ns: Mapping[tuple[str, str], int]  # by (namespace, pod), how long a worker has not answered


class CollectorMetrics(Collector):
    """Turns a sample into metric families."""

    def __init__(self, sample: Callable[[], Sample]) -> None:
        self._sample = sample
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """One scrape."""
        now = self._sample()
        prefix = "gpumeter_collector_"
        counts = {
            "records_committed": ("Usage records committed to the ledger.", now.records),
            "pages": ("Pages of records committed to the ledger.", now.pages),
            "pulls_failed": ("Pulls of a worker that failed.", now.pulls_failed),
            "reports_written": ("Versions of UsageReports written to the API server.", now.reports_written),
            "reports_refused": ("UsageReports that the API server refused.", now.reports_refused),
        }
        for name, (told, count) in counts.items():
            yield CounterMetricFamily(prefix + name, told, value=count)
        alarms = CounterMetricFamily(prefix + "alarms", "Pages and workers that were refused.", labels=["reason"])
        for reason, count in sorted(now.alarms.items()):
            alarms.add_metric([reason], count)
        yield alarms
        yield GaugeMetricFamily(
            prefix + "lag_seconds_max",
            "Age of the newest settled usage of the slowest worker.",
            now.lag_ns_max / 1e9,
        )
        yield GaugeMetricFamily(prefix + "workers", "Workers that are collected from.", now.workers)
        yield GaugeMetricFamily(
            prefix + "ledger_usable", "1 while the ledger can be read and written.", int(now.ledger_usable)
        )
        yield GaugeMetricFamily(prefix + "members", "Collectors that work on this ledger.", now.collectors)
        yield GaugeMetricFamily(prefix + "leads", "1 where this collector closes and publishes.", int(now.leads))
        yield GaugeMetricFamily(prefix + "workers_silent", "Workers that do not answer.", len(now.silent_ns))
        silent = GaugeMetricFamily(
            prefix + "worker_silent_seconds",
            f"Time since a worker answered; the {MAX_SILENT_TOLD} longest.",
            labels=["namespace", "pod"],
        )
        longest = sorted(now.silent_ns.items(), key=lambda one: -one[1])[:MAX_SILENT_TOLD]
        for (namespace, pod), silent_ns in longest:
            silent.add_metric([namespace, pod], silent_ns / 1e9)
        yield silent
        ages = GaugeMetricFamily(prefix + "round_age_seconds", "Time since a round ended.", labels=["round"])
        for name, age_ns in sorted(now.round_age_ns.items()):
            ages.add_metric([name], age_ns / 1e9)
        yield ages
