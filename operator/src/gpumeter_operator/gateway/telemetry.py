"""The gateway's own metrics.

Owns names, labels and buckets. `code` is the HTTP status that describes the outcome: 499 when the client went away, and
502 for a stream that broke although its status line had said 200.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_ADDED_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5)
_WAITED_BUCKETS_S = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Telemetry:
    """One registry of its own, so that several gateways can live in one process (tests do)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gpumeter_gateway_requests",
            "Requests that ended, by tenant, service (namespace/name) and outcome.",
            ("tenant", "service", "code"),
            registry=self.registry,
        )
        self._added = Histogram(
            "gpumeter_gateway_added_seconds",
            "What the gateway adds: from a request's last byte to sending it on, less the wait for a worker.",
            registry=self.registry,
            buckets=_ADDED_BUCKETS_S,
        )
        self._in_flight = Gauge(
            "gpumeter_gateway_in_flight",
            "Requests that a worker has now, by service.",
            ("service",),
            registry=self.registry,
        )
        self._waiting = Gauge(
            "gpumeter_gateway_waiting",
            "Requests that wait for a worker now, by service.",
            ("service",),
            registry=self.registry,
        )
        self._waited = Histogram(
            "gpumeter_gateway_waited_seconds",
            "How long requests waited for a worker, of those that had to, by how the wait ended: seated (a worker took "
            "it), refused, expired (the limit of waiting time) or left (the client went away).",
            ("outcome",),
            registry=self.registry,
            buckets=_WAITED_BUCKETS_S,
        )
        self._turned_away = Counter(
            "gpumeter_gateway_turned_away",
            "Requests that no worker took, by the code of the error that they were answered with.",
            ("reason",),
            registry=self.registry,
        )
        self._held = Gauge(
            "gpumeter_gateway_held_bytes", "Bytes of bodies of the requests that run now.", registry=self.registry
        )
        self._ignored_keys = Gauge(
            "gpumeter_gateway_ignored_keys",
            "Secrets of API keys that are left out now; the log and an event at each of them say why.",
            registry=self.registry,
        )
        self._retries = Counter(
            "gpumeter_gateway_retries", "Second attempts, by the failure before.", ("failure",), registry=self.registry
        )

    def ended(self, tenant: str, service: str, code: int) -> None:
        """Count one request."""
        self._requests.labels(tenant, service, str(code)).inc()

    def added(self, seconds: float) -> None:
        """Note what the gateway added to one request that a worker answered."""
        self._added.observe(seconds)

    def in_flight(self, service: str, change: int) -> None:
        """One more or one less."""
        self._in_flight.labels(service).inc(change)

    def waiting(self, service: str, change: int) -> None:
        """One more or one less who waits."""
        self._waiting.labels(service).inc(change)

    def waited(self, seconds: float, outcome: str) -> None:
        """Note how long one waited, and how the wait ended."""
        self._waited.labels(outcome).observe(seconds)

    def turned_away(self, reason: str) -> None:
        """Count one that no worker took."""
        self._turned_away.labels(reason).inc()

    def watch_held(self, read: Callable[[], int]) -> None:
        """Where the number of held bytes stands."""
        self._held.set_function(read)

    def watch_ignored_keys(self, read: Callable[[], int]) -> None:
        """Where the number of API keys' Secrets that are left out stands."""
        self._ignored_keys.set_function(read)

    def retried(self, failure: str) -> None:
        """Count one second attempt."""
        self._retries.labels(failure).inc()
