"""The gateway's own metrics.

Owns names, labels and buckets. `code` is the HTTP status that describes the outcome: 499 when the client went away, and
502 for a stream that broke although its status line had said 200.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_ADDED_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5)


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
            "What the gateway itself adds: from the last byte of the request to sending it on, and on the way back.",
            registry=self.registry,
            buckets=_ADDED_BUCKETS_S,
        )
        self._in_flight = Gauge(
            "gpumeter_gateway_in_flight", "Requests that run now, by service.", ("service",), registry=self.registry
        )
        self._held = Gauge(
            "gpumeter_gateway_held_bytes", "Bytes of bodies of the requests that run now.", registry=self.registry
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

    def watch_held(self, read: Callable[[], int]) -> None:
        """Where the number of held bytes stands."""
        self._held.set_function(read)

    def retried(self, failure: str) -> None:
        """Count one second attempt."""
        self._retries.labels(failure).inc()
