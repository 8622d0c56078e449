"""Prometheus metrics of the operator.

Owns names, labels and the registry. Does not know when they are counted.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class OperatorMetrics:
    """The operator's own metrics, in a registry of their own so that tests can make many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "gpumeter_operator_reconciles",
            "Times that a service was looked at, by result (settled, changed, failed).",
            ["result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "gpumeter_operator_reconcile_seconds",
            "Time that one look at a service took.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
            registry=self.registry,
        )
        self.scalings = Counter(
            "gpumeter_operator_scalings",
            "Decisions that changed a service's number of workers, by their reason.",
            ["reason"],
            registry=self.registry,
        )
        self.scaling_failures = Counter(
            "gpumeter_operator_scaling_failures",
            "Looks of the autoscaler at one service that failed for a reason that nobody thought of; the log tells it.",
            registry=self.registry,
        )
        self.writes = Counter(
            "gpumeter_operator_api_writes",
            "Writes to the API server, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.services = Gauge(
            "gpumeter_operator_services",
            "InferenceServices that the operator looks after, by the status of Ready.",
            ["ready"],
            registry=self.registry,
        )

        self.active = Gauge(
            "gpumeter_operator_active",
            "1 while this operator holds the lease and acts, 0 while it stands by.",
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
