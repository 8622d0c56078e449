"""An informer: all objects of a resource in memory, kept up to date by list and watch.

Owns when to list again, what was removed meanwhile, and whether the copy is still fed. Does not know what the objects
mean, nor how a cluster is spoken to.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

from gpumeter_operator.adapters.kubernetes import (
    Keep,
    Labels,
    Manifest,
    Manifests,
    Refused,
    Resource,
    Unreachable,
    whole,
)

STEADY_NS = 30_000_000_000  # a watch that lived this long was sound; the next failure starts the back-off anew
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # between attempts of an informer; 10 s keeps recovery within one look
# Bookmarks come about once a minute, and a silent watch is given up after 150 s; twice that is a stuck mirror.
SILENCE_MAX_S = 300

log = logging.getLogger(__name__)


class Source(Protocol):
    """What a Mirror needs of a cluster."""

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[Manifests, str]:
        """All objects, of each what `keep` makes of it, and the version at which the list was true."""
        ...

    def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes after `version`."""
        ...


class Mirror:
    """An informer: a copy in memory of all objects of a resource, kept up to date by list and watch.

    `run` never ends by itself: after a refusal, a broken or a silent connection it lists again, with back-off, and
    finds by comparison what was removed meanwhile. metadata.managedFields are left out, they are half of an object.
    """

    def __init__(
        self,
        cluster: Source,
        resource: Resource,
        *,
        namespace: str | None = None,
        labels: Labels | None = None,
        on_change: Callable[[], None] | None = None,
        on_remove: Callable[[Manifest], None] | None = None,
        on_item: Callable[[Manifest | None, Manifest | None], None] | None = None,
        pack: Callable[[Manifest], Manifest] | None = None,
    ) -> None:
        """`on_item` hears of each object that came, changed or went: what it was, and what it is now.

        `pack` gives what is kept of an object, with its metadata's name, namespace, uid and resourceVersion.
        """
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.on_change = on_change
        self.on_remove = on_remove
        self.on_item = on_item
        self._pack = pack
        self.last_heard_ns = time.monotonic_ns()
        self._cluster = cluster
        self._resource = resource
        self._namespace = namespace
        self._labels = labels
        self._synced = asyncio.Event()
        self._version: int | None = None  # the newest that the API server told of
        self._tried_ns = self.last_heard_ns
        self._end: str | None = None

    async def run(self) -> None:
        """Keep the copy up to date until cancelled."""
        self._tried_ns = time.monotonic_ns()  # it may have been made long before
        try:
            await self._keep()
        except BaseException as end:
            self._end = repr(end)
            raise

    async def _keep(self) -> None:
        failures = 0
        while True:
            begun_ns = time.monotonic_ns()
            try:
                await self._list_then_watch()
            except Refused as refusal:
                if refusal.status != 410:  # 410: the version is too old, an ordinary reason to list again
                    log.warning("Watching %s was refused: %s", self._resource.plural, refusal)
            except Unreachable as problem:
                log.warning("Watching %s was interrupted: %s", self._resource.plural, problem)
                self._tried_ns = time.monotonic_ns()
            # A list that works and a watch that is refused must not become a list every 200 ms.
            failures = 0 if time.monotonic_ns() - begun_ns > STEADY_NS else failures + 1
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])

    async def synced(self) -> None:
        """Wait until the first list is complete."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        """Whether the first list is complete."""
        return self._synced.is_set()

    def silence(self, limit_s: float = SILENCE_MAX_S) -> str | None:
        """A sentence when the copy is not fed any more: `run` has ended, or nothing was heard for `limit_s`.

        An API server that cannot be reached is noticed, told in the log and tried again every few seconds; that counts
        as heard, for a restart would cure nothing and lose the copy. Refusals do not: a restart reads credentials anew.
        """
        if self._end is not None:
            return f"Watching {self._resource.plural} has ended: {self._end}."
        silence_s = (time.monotonic_ns() - max(self.last_heard_ns, self._tried_ns)) / 1_000_000_000
        if silence_s > limit_s:
            return f"Nothing was heard about {self._resource.plural} for {silence_s:.0f} s."
        return None

    def learn(self, item: Manifest) -> None:
        """Take what a write of our own returned, so that who writes also reads it before the watch tells.

        Nothing is taken that the API server has told of already: the copy may be past it, and the object deleted.
        """
        held = self.objects.get(_key(item))
        version = version_of(item)
        known = [one for one in (self._version, version_of(held) if held else None) if one is not None]
        if version is not None and known and version <= max(known):
            return
        self._put(item)
        self._tell_changed()

    async def _list_then_watch(self) -> None:
        version = await self._list()
        async with aclosing(  # type: ignore[type-var]  # an async generator, which the protocol need not say
            self._cluster.watch(self._resource, self._namespace, self._labels, version)
        ) as changes:
            async for change, item in changes:
                self._take(change, item)

    async def _list(self) -> str:
        # By itself, so that nothing holds the list any more while the watch goes on: unpacked it is most of the memory.
        listed, version = await self._cluster.list_at(self._resource, self._namespace, self._labels, self._kept)
        self._replace_all({_key(item): item for item in listed})
        self._version = _number(version)
        return version

    def _replace_all(self, listed: dict[tuple[str, str], Manifest]) -> None:
        self.last_heard_ns = time.monotonic_ns()
        before, self.objects = self.objects, listed
        for key, item in before.items():
            # Another uid under the same name: the former object ended unseen, and the hook must hear of it.
            if key not in listed or listed[key]["metadata"].get("uid") != item["metadata"].get("uid"):
                self._tell_removed(item)
                if key not in listed:
                    self._tell_item(item, None)
        for key, item in listed.items():
            if before.get(key) != item:
                self._tell_item(before.get(key), item)
        first = not self._synced.is_set()
        self._synced.set()
        if first or before != listed:
            self._tell_changed()

    def _take(self, change: str, item: Manifest) -> None:
        self.last_heard_ns = time.monotonic_ns()
        self._version = version_of(item) or self._version
        if change == "BOOKMARK":
            return
        if change == "DELETED":
            self._tell_item(self.objects.pop(_key(item), None), None)
            self._tell_removed(self._kept(item))
        else:
            self._put(item)
        self._tell_changed()

    def _put(self, item: Manifest) -> None:
        key, slim = _key(item), self._kept(item)
        former, self.objects[key] = self.objects.get(key), slim
        self._tell_item(former, slim)

    def _kept(self, item: Manifest) -> Manifest:
        return _slim(item) if self._pack is None else self._pack(_slim(item))

    def _tell_item(self, former: Manifest | None, now: Manifest | None) -> None:
        if self.on_item is not None:
            with _hook("on_item"):
                self.on_item(former, now)

    def _tell_changed(self) -> None:
        if self.on_change is not None:
            with _hook("on_change"):
                self.on_change()

    def _tell_removed(self, item: Manifest) -> None:
        if self.on_remove is not None:
            with _hook("on_remove"):
                self.on_remove(item)


@contextmanager
def _hook(name: str) -> Iterator[None]:
    # A mirror that stopped because a listener failed would be a silent freeze; the failure is loud in the log.
    try:
        yield
    except Exception:
        log.exception("The %s hook of a mirror failed; the mirror goes on.", name)


def _key(item: Manifest) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _slim(item: Manifest) -> Manifest:
    metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
    return {**item, "metadata": metadata}


def version_of(item: Manifest) -> int | None:
    """By which of two copies of an object the newer is known; None where versions are no numbers."""
    return _number(item["metadata"].get("resourceVersion", ""))


def _number(version: str) -> int | None:
    # Versions of one resource are numbers that only grow (KEP-5504 makes it a promise). Where an API server behind the
    # aggregator numbers otherwise, nothing is known to be older.
    return int(version) if version.isascii() and version.isdigit() else None
