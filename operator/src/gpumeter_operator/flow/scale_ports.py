"""What the autoscaler's loop needs of the world: workers that tell their load, gateways that tell what waits, services,
and somebody who marks pods.

Owns the shapes of these ports, so that a test can stand in for a cluster, and the answer of an installation whose
gateways tell nothing. Does not ask anybody.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from gpumeter_operator.adapters.kubernetes import Manifest, Resource
from gpumeter_operator.decide.crew import Load


class Marks(Protocol):
    """Writes on pods: adapters.kubernetes.Cluster."""

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        """Merge patch; None where the object is gone."""
        ...


class Loads(Protocol):
    """The workers' own counters: adapters.signals.Signals."""

    async def ask(self, workers: Mapping[str, str], within_s: float) -> None:
        """Ask all of them (uid -> address) again, and wait for their answers for so long."""
        ...

    def load(self, uid: str) -> Load | None:
        """What a worker last told; None where that is too old, or nothing."""
        ...

    def silent_since(self, uid: str) -> int | None:
        """Since when (milliseconds of the reader's clock) a worker without a load was asked and has not answered; None
        for one that had no chance to."""
        ...


class AtTheDoor(Protocol):
    """What all gateways together hold for a service."""

    @property
    def waiting(self) -> int:
        """Requests that no worker has yet."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that a worker has."""
        ...


class Doors(Protocol):
    """The gateways' waiting rooms, as adapters.gateways keeps them."""

    def asked(self) -> Mapping[str, AtTheDoor]:
        """By service (NAMESPACE/NAME); one of which nothing is asked is absent."""
        ...

    def silent(self) -> Sequence[str]:
        """A sentence for each gateway that does not tell, so that what waits at it is unknown."""
        ...

    def overdue(self) -> str | None:
        """A sentence when `run` hangs."""
        ...

    async def run(self) -> None:
        """Keep it up to date until cancelled."""
        ...


OnChange = Callable[[Iterable[str]], None]
"""Takes the services (NAMESPACE/NAME) whose figures have changed, as soon as they have: `Scaler.wake`."""

OpenDoors = Callable[[OnChange], Doors]


class NoDoors:
    """An installation whose gateway tells nothing: what waits at it is unknown, so nothing goes to zero."""

    def __init__(self, on_change: OnChange) -> None:
        self._on_change = on_change

    def asked(self) -> Mapping[str, AtTheDoor]:
        """Nothing that is known."""
        return {}

    def silent(self) -> Sequence[str]:
        """The one reason that there is."""
        return ("The operator was not told where the gateways are.",)

    def overdue(self) -> str | None:
        """Nothing hangs where nothing runs."""
        return None

    async def run(self) -> None:
        """There is nothing to keep up to date."""
        await asyncio.Event().wait()


class Services(Protocol):
    """All InferenceServices: adapters.mirror.Mirror."""

    @property
    def objects(self) -> Mapping[tuple[str, str], Manifest]:
        """By (namespace, name)."""
        ...
