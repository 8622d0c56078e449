"""The gateways as the autoscaler sees them: found by their Service, asked by long polls.

Owns that both run together. Decides nothing; what the figures mean is the autoscaler's business.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from gpumeter_operator.adapters.gateways import Asked, Gateways, addresses, mirror_of, target_of
from gpumeter_operator.adapters.mirror import Source
from gpumeter_operator.flow.scale_ports import OnChange


class GatewayDoors:
    """See scale_ports.Doors: the waiting rooms behind one Service of gateways."""

    def __init__(self, cluster: Source, namespace: str, service: str, token: str, on_change: OnChange) -> None:
        self._where = f"{namespace}/{service}"
        self._gateways = Gateways(self._targets, token, on_change)
        self._slices = mirror_of(cluster, namespace, service, on_change=self._gateways.look)

    def asked(self) -> Mapping[str, Asked]:
        """By service (NAMESPACE/NAME); one of which nothing is asked is absent."""
        return self._gateways.asked()

    def silent(self) -> Sequence[str]:
        """A sentence for each gateway that does not tell; without any gateway nobody knows what is asked, either."""
        if not self._targets():
            return (f"The Service {self._where} has no gateways (no pods, or they are not listed yet).",)
        return self._gateways.silent()

    def overdue(self) -> str | None:
        """A sentence when nobody asks the gateways any more, though `run` runs."""
        return self._gateways.overdue()

    async def run(self) -> None:
        """Keep it up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._slices.run())
            group.create_task(self._gateways.run())

    def _targets(self) -> list[str]:
        return [target_of(address) for address in addresses(self._slices.objects.values())]


def doors_of(cluster: Source, service: str, token: str) -> partial[GatewayDoors]:
    """What opens the doors behind a Service (NAMESPACE/NAME) of gateways, for `Operation`."""
    namespace, _, name = service.partition("/")
    return partial(GatewayDoors, cluster, namespace, name, token)
