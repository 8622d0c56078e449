"""The figures of usage: what one key used and what it costs, added up, and what one kept report says of both.

Owns the sums and how a report is read back into them. Reads no ledger and decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from gpumeter_operator.adapters.ledger.usage import Sum
from gpumeter_operator.billing.facts import COUNTED, USED, sum_of_stated
from gpumeter_operator.billing.tariff import sum_of_amounts


@dataclass(slots=True)
class Cost:
    """What something costs: `amounts` by currency, `unpriced_ns` of GPU time without a price, `idle_ns` of idle time
    that is charged beside what was used, and `adjusted_ns` by which closed periods are corrected."""

    amounts: dict[str, Decimal] = field(default_factory=dict)
    unpriced_ns: int = 0
    idle_ns: int = 0
    adjusted_ns: int = 0

    def add(self, other: "Cost") -> None:
        """Both together, exactly."""
        self.unpriced_ns += other.unpriced_ns
        self.idle_ns += other.idle_ns
        self.adjusted_ns += other.adjusted_ns
        for currency, amount in other.amounts.items():
            self.amounts[currency] = sum_of_amounts((self.amounts.get(currency, Decimal(0)), amount))


@dataclass(slots=True)
class Total:
    """What one key used over the whole span, and what it costs. `gpu_ns` is what was used, without idle time that is
    charged and without corrections; `energy_mj` is None where nobody stated any."""

    key: tuple[str, ...]
    records: int = 0
    sessions: int = 0
    gpu_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    energy_mj: int | None = None
    cost: Cost = field(default_factory=Cost)

    def add(self, other: "Total | Sum") -> None:
        """Add figures; what a line costs, too."""
        for name in (*COUNTED, *USED):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if isinstance(other, Total):
            self.energy_mj = sum_of_stated((self.energy_mj, other.energy_mj))
            self.cost.add(other.cost)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was used, charged or corrected."""
        return not (self.records or self.cost.idle_ns or self.cost.adjusted_ns or any(self.cost.amounts.values()))


def figures_of(key: tuple[str, ...], status: Mapping[str, Any]) -> Total:
    """What the status of a tenant's report says that the tenant used, and its amount."""
    idle_ns, adjusted_ns = (int(status.get(name, 0)) for name in ("idleGpuNanoseconds", "adjustedGpuNanoseconds"))
    cost = Cost(idle_ns=idle_ns, adjusted_ns=adjusted_ns)
    if "amount" in status:
        cost.amounts[status["currency"]] = Decimal(status["amount"])
    else:
        cost.unpriced_ns = int(status["gpuNanoseconds"])
    tokens, joules = status["tokens"], status.get("energyJoules")
    return Total(
        key,
        records=status["recordCount"],
        sessions=status["sessions"],
        gpu_ns=int(status["gpuNanoseconds"]) - idle_ns - adjusted_ns,
        prefill_ns=int(status["prefillGpuNanoseconds"]),
        decode_ns=int(status["decodeGpuNanoseconds"]),
        prompt_tokens=tokens["prompt"],
        cached_tokens=tokens["cached"],
        completion_tokens=tokens["completion"],
        energy_mj=None if joules is None else int(Decimal(joules).scaleb(3)),
        cost=cost,
    )
