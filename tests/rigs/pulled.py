"""One worker whose journal a collector pulls into a real ledger: what tests of that way begin with.

Owns the joining of the three, and how its periods are closed. What the worker does, and what goes wrong on the way, is
the test's.
"""

from pathlib import Path

from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.report import Manifest
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.collect import Collector
from gpumeter_usage.period import SECOND_NS
from rigs.ledger import Clock, FakeNetwork, FakeWorker, inline, open_ledger


class Pulled:
    """Anything of it may be exchanged in the middle: the ledger for a copy that was restored, the time for a later."""

    def __init__(
        self, where: Ledger | Path | str, fake: FakeWorker, now_ns: int, network: FakeNetwork | None = None
    ) -> None:
        self.ledger = where if isinstance(where, Ledger) else open_ledger(where)
        self.fake = fake
        self.clock = Clock(now_ns)
        self.network = network or FakeNetwork()
        self.target = self.network.add("10.0.0.1", fake)

    def observe(self, *events: ContainerEvent) -> None:
        """Kubernetes says this of the worker's pod, now."""
        self.ledger.observe(self.fake.identity, events, self.clock())

    async def pull(self) -> bool:
        """One look of a collector that knows nothing but the ledger."""
        return await Collector(self.ledger, self.network, inline, self.clock).pull(self.fake.identity, self.target)

    def close_periods(self, now_ns: int, grace_ns: int = SECOND_NS) -> list[Manifest]:
        """One closing round, without a price plan."""
        return Closer(self.ledger, grace_ns).close_all(Pricing({}, {}), now_ns)
