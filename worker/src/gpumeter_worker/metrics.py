"""What the worker counts, in Prometheus' format: its own names, and those that existing recipes read.

Owns names, units and buckets. Does not own the accounts: it reads them when it is scraped.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpumeter_usage.record import Status
from gpumeter_worker.engine.messages import StepReport
from gpumeter_worker.readiness import HUNG, RESTARTING
from gpumeter_worker.telemetry import exposition as gpu

if TYPE_CHECKING:
    from gpumeter_worker.worker import Worker

_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Observations:
    """Counters and histograms that are fed as things happen."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._step_s = Histogram(
            "gpumeter_step_duration_seconds", "Measured time of a step", registry=self.registry, buckets=_STEP_S
        )
        self._batch = Histogram(
            "gpumeter_step_sequences", "Sequences that shared a step", registry=self.registry, buckets=_BATCH
        )
        self._sessions = Counter("gpumeter_sessions", "Sessions that ended, by how", ["status"], registry=self.registry)
        model = ["model_name"]
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens processed", model, registry=self.registry).labels(
            model_name
        )
        self._generated = Counter("vllm:generation_tokens", "Tokens generated", model, registry=self.registry).labels(
            model_name
        )
        self._first_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "Admission to first token",
            model,
            registry=self.registry,
            buckets=_FIRST_S,
        ).labels(model_name)
        self._between_s = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens",
            model,
            registry=self.registry,
            buckets=_BETWEEN_S,
        ).labels(model_name)
        self._engines_lost = Counter(
            "gpumeter_engine_restarts", "Engines lost, by why", ["reason"], registry=self.registry
        )
        self.drift_ppm = Gauge(
            "gpumeter_step_clock_drift_ppm",
            "How much faster than the host's clock the one of the steps runs; 0 where they are one",
            registry=self.registry,
        )
        self.kv_tokens = Gauge("gpumeter_kv_tokens", "Tokens in the cache", registry=self.registry)
        for status in (Status.FINISHED, Status.CANCELLED, Status.FAILED):
            self._sessions.labels(status.value)
        for reason in (RESTARTING, HUNG):
            self._engines_lost.labels(reason)
        self.kv_tokens_now = 0

    def step(self, step: StepReport) -> None:
        """A step was reported."""
        self._step_s.observe(step.gpu_ns / 1e9)
        self._batch.observe(len(step.parts))
        self._prompt.inc(step.prompt_tokens)
        self._generated.inc(len(step.tokens))
        self.kv_tokens_now = step.kv_tokens
        self.kv_tokens.set(step.kv_tokens)
        if step.drift_ppb is not None:
            self.drift_ppm.set(step.drift_ppb / 1000)

    def token(self, begun_ns: int, last_token_ns: int, now_ns: int) -> None:
        """A session got a token."""
        if last_token_ns:
            self._between_s.observe((now_ns - last_token_ns) / 1e9)
        else:
            self._first_s.observe((now_ns - begun_ns) / 1e9)

    def session(self, status: Status) -> None:
        """A session ended."""
        self._sessions.labels(status.value).inc()

    def engine_lost(self, reason: str) -> None:
        """The cache went with the engine."""
        self._engines_lost.labels(reason).inc()
        self.kv_tokens_now = 0
        self.kv_tokens.set(0)


class WorkerState(Collector):
    """What is read from the worker at the moment of a scrape."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        """Prometheus' registry asks for this."""
        worker = self._worker
        seconds = CounterMetricFamily(
            "gpumeter_gpu_seconds", "GPU time by account, up to the frontier", labels=["account"]
        )
        for account, total_ns in worker.meter.accounts.totals_ns.items():
            seconds.add_metric([account.value], total_ns / 1e9)
        yield seconds
        yield CounterMetricFamily(
            "gpumeter_unmeasured_seconds",
            "GPU time of steps that were lost with their engine; in no account, and unaccounted in the ledger",
            value=worker.meter.accounts.unmeasured_ns / 1e9,
        )
        waiting = worker.sessions.waiting
        running = len(worker.sessions) - waiting
        engine = worker.engine
        capacity = engine.cache_tokens if engine else 0
        model = worker.settings.model_name
        for name, text, value in (
            ("vllm:num_requests_waiting", "Requests that no step has held yet", waiting),
            ("vllm:num_requests_running", "Requests in the running batch", running),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the cache that is in use, 0 to 1",
                worker.observed.kv_tokens_now / capacity if capacity and len(worker.sessions) else 0,
            ),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([model], value)
            yield family
        ready = worker.readiness()
        family = GaugeMetricFamily("gpumeter_ready", "1 while work is admitted", labels=["reason"])
        family.add_metric([ready.reason], int(ready.ready))
        yield family
        if (adopted := worker.attribution) is not None:
            family = GaugeMetricFamily(
                "gpumeter_attribution_as_asked",
                "1 while steps are split as the settings ask, 0 by proportions that stand in for a calibration",
                labels=["reason", "profile_hash"],
            )
            family.add_metric([adopted.reason, adopted.profile.hash], int(adopted.as_asked))
            yield family
        yield GaugeMetricFamily("gpumeter_queue_length", "Requests that wait", value=waiting)
        engines = worker.engines
        for name, text, value in (
            ("gpumeter_engine_load_seconds", "The last engine's start to its readiness", engines.load_ns / 1e9),
            ("gpumeter_engine_step_timeout_seconds", "When a silent engine hangs", engines.step_timeout_ns / 1e9),
            ("gpumeter_engine_events_unhandled", "Messages that wait for the event loop", engines.unhandled),
            ("gpumeter_engine_commands_unsent", "Commands that wait for the engine", engines.unsent),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        head = worker.journal.head
        if head is not None:
            yield GaugeMetricFamily("gpumeter_journal_head_seq", "The newest record on disk", value=head.seq)
            yield GaugeMetricFamily(
                "gpumeter_journal_acknowledged_seq",
                "The newest record that the ledger has",
                value=head.acknowledged_seq,
            )
            yield GaugeMetricFamily(
                "gpumeter_journal_watermark_seconds",
                "UTC up to which all usage is on disk",
                value=head.frontier_ns / 1e9,
            )
        yield GaugeMetricFamily(
            "gpumeter_journal_commit_seconds", "The last transaction", value=worker.journal.commit_ns_last / 1e9
        )
        yield from gpu.families(worker.gpu)


def exposition(worker: "Worker") -> bytes:
    """Everything, in Prometheus' text format."""
    state = CollectorRegistry()
    state.register(WorkerState(worker))
    return generate_latest(worker.observed.registry) + generate_latest(state)
