"""What the gateway knows of the cluster: services, their ready workers, and the keys of tenants.

Owns the three mirrors' lifetimes and what is computed from them, again only after something changed. Does not know how
a mirror is kept; it opens them through a port, which adapters.mirror.Mirror fills. Nor how what is wrong is told.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from gpumeter_operator.gateway.endpoints import Endpoint, endpoints_from
from gpumeter_operator.gateway.keys import Keyring, keyring_from
from gpumeter_operator.gateway.models import Catalogue, Service, catalogue_from
from gpumeter_operator.gateway.notices import Notices
from gpumeter_operator.gateway.outlook import Outlook, outlook

logger = logging.getLogger(__name__)

Objects = Mapping[tuple[str, str], Mapping[str, Any]]
T = TypeVar("T")


class Source(Protocol):
    """A mirror of one kind of object: what adapters.mirror.Mirror offers."""

    @property
    def objects(self) -> Mapping[tuple[str, str], Any]:
        """All objects by (namespace, name), as plain dicts."""

    async def run(self) -> None:
        """Keep the objects up to date; never ends by itself."""

    async def synced(self) -> None:
        """Return once the first list is complete."""

    def silence(self) -> str | None:
        """A sentence when the objects are not kept up to date any more."""


OpenSource = Callable[[Callable[[], None]], Source]  # gets a function to call after every change


class World:
    """The state of the cluster as far as requests need it."""

    def __init__(self, *, services: OpenSource, slices: OpenSource, keys: OpenSource, notices: Notices) -> None:
        self._catalogue: _Derived[Catalogue] = _Derived(lambda: catalogue_from(self._services.objects.values()))
        self._endpoints: _Derived[dict[tuple[str, str], tuple[Endpoint, ...]]] = _Derived(
            lambda: endpoints_from(self._slices.objects.values())
        )
        self._keyring: _Derived[Keyring] = _Derived(self._read_keys)
        self._all_endpoints: _Derived[frozenset[Endpoint]] = _Derived(
            lambda: frozenset(one for workers in self._endpoints.value().values() for one in workers)
        )
        self._notices = notices
        self.on_services: Callable[[], None] | None = None  # called after a service has changed
        self.on_workers: Callable[[], None] | None = None  # the same for endpoints
        self._services = services(self._services_changed)
        self._slices = slices(self._workers_changed)
        self._keys = keys(self._keys_changed)
        self.synced = False

    async def run(self) -> None:
        """Keep all mirrors running. Ends only with an error: without its mirrors a gateway would serve the past."""
        sources = (self._services, self._slices, self._keys)
        async with asyncio.TaskGroup() as tasks:
            for source in sources:
                tasks.create_task(source.run())
            tasks.create_task(self._notices.run())
            for source in sources:
                await source.synced()
            self.synced = True
            logger.info(
                "in sync: %d services, %d keys", len(self.catalogue().by_qualified), len(self.keyring().tenants)
            )

    def silent(self) -> str | None:
        """A sentence when a mirror is not fed any more, and this gateway would serve the past."""
        sentences = (source.silence() for source in (self._services, self._slices, self._keys))
        return next((sentence for sentence in sentences if sentence is not None), None)

    def catalogue(self) -> Catalogue:
        """All services by name."""
        return self._catalogue.value()

    def endpoints(self, service: Service) -> tuple[Endpoint, ...]:
        """The service's workers that take new requests, as of now."""
        return self._endpoints.value().get((service.namespace, service.name), ())

    def all_endpoints(self) -> frozenset[Endpoint]:
        """Such workers of all services."""
        return self._all_endpoints.value()

    def keyring(self) -> Keyring:
        """Tenants by key, and the Secrets that are left out."""
        return self._keyring.value()

    def outlook(self, service: Service) -> Outlook:
        """Whether a service without a ready worker may get one, and what its Ready condition says."""
        return outlook(self._services.objects.get((service.namespace, service.name), {}))

    def _read_keys(self) -> Keyring:
        keyring = keyring_from(self._keys.objects.values())
        self._notices.show(keyring.ignored)
        return keyring

    def _services_changed(self) -> None:
        self._catalogue.forget()
        if self.on_services is not None:
            self.on_services()

    def _workers_changed(self) -> None:
        self._endpoints.forget()
        self._all_endpoints.forget()
        if self.on_workers is not None:
            self.on_workers()

    def _keys_changed(self) -> None:
        self._keyring.forget()
        asyncio.get_running_loop().call_soon(self.keyring)  # so that a bad Secret is told when it appears


class _Derived(Generic[T]):
    """A value that is computed from a mirror when it is first needed after a change."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._value: T | None = None

    def forget(self) -> None:
        self._value = None

    def value(self) -> T:
        if self._value is None:
            self._value = self._compute()
        return self._value
