"""The bytes of requests that this gateway holds: how many there may be, and how many of one tenant.

Owns the count and the two refusals. A body is held until its request has ended, because a second attempt needs it. Does
not read bodies. One event loop uses it, so nothing is locked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gpumeter_operator.gateway.refusal import Refusal


class Budget:
    """Counts what is held, as a whole and by tenant."""

    def __init__(self, *, held_max: int, tenant_held_max: int) -> None:
        self._held_max = held_max
        self._tenant_held_max = tenant_held_max
        self._by_tenant: dict[str, int] = {}
        self.held = 0

    @contextmanager
    def hold(self, tenant: str) -> Iterator["Hold"]:
        """Room for one request of a tenant; what it took comes back at the end, however that comes."""
        hold = Hold(self, tenant)
        try:
            yield hold
        finally:
            self._count(tenant, -hold.size)

    def require(self, tenant: str, size: int) -> None:
        """Raise Refusal (503, with a time to come back) unless there is room for `size` more bytes of this tenant.

        The whole is asked last: who is told of it can be sure that others hold it.
        """
        if self._by_tenant.get(tenant, 0) + size > self._tenant_held_max:
            share = f"Your requests in flight hold as many bytes as one tenant may have here ({self._tenant_held_max})."
            raise Refusal(503, "tenant_busy", f"{share} Send fewer at a time.", retry_after_s=1)
        if self.held + size > self._held_max:
            raise Refusal(503, "gateway_busy", "The gateway holds as many bytes as it may.", retry_after_s=1)

    def take(self, tenant: str, size: int) -> None:
        """Count `size` more bytes. Raises Refusal."""
        self.require(tenant, size)
        self._count(tenant, size)

    def _count(self, tenant: str, size: int) -> None:
        self.held += size
        if left := self._by_tenant.get(tenant, 0) + size:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)


@dataclass(slots=True)
class Hold:
    """What one request holds."""

    budget: Budget
    tenant: str
    size: int = 0

    def require(self, size: int) -> None:
        """Raise Refusal unless `size` more bytes fit now. Takes nothing."""
        self.budget.require(self.tenant, size)

    def take(self, size: int) -> None:
        """Take `size` more bytes. Raises Refusal."""
        self.budget.take(self.tenant, size)
        self.size += size
