"""A kind of object that a cluster need not have, mirrored from the moment at which it has it.

Owns when the API server is asked for it again, and that nobody waits for what may never come. Does not know what the
objects are for.
"""

import asyncio
import logging
from collections.abc import Callable

from gpumeter_operator.adapters.kubernetes import Labels, Manifest, Refused, Resource, Unreachable
from gpumeter_operator.adapters.mirror import Mirror, Source
from gpumeter_operator.adapters.packed import packed

ASK_AGAIN_S = 60.0
OnItem = Callable[[Manifest | None, Manifest | None], None]

log = logging.getLogger(__name__)


class OptionalMirror:
    """A mirror, if there is anything to mirror."""

    def __init__(self, source: Source, resource: Resource, labels: Labels, on_item: OnItem) -> None:
        """`on_item` is told of each object that changed; they are kept packed."""
        self._source = source
        self._resource = resource
        self._labels = labels
        self._on_item = on_item
        self._mirror: Mirror | None = None

    @property
    def mirror(self) -> Mirror | None:
        """None until the cluster has the kind, and when its API was taken away again."""
        return self._mirror if self._mirror is not None and self._mirror.silence() is None else None

    async def run(self) -> None:
        """Ask until the kind is there, then keep the mirror up to date until cancelled."""
        while True:
            if await self._is_offered():
                break
            await asyncio.sleep(ASK_AGAIN_S)
        mirror = Mirror(self._source, self._resource, labels=self._labels, on_item=self._on_item, pack=packed)
        keeping = asyncio.create_task(mirror.run())
        try:
            await mirror.synced()
            self._mirror = mirror
            await keeping
        finally:
            keeping.cancel()

    async def _is_offered(self) -> bool:
        try:
            await self._source.list_at(self._resource, None, self._labels)
        except Refused as refusal:
            if refusal.status != 404:
                log.warning("Objects of kind %s are left alone: %s", self._resource.kind, refusal)
            return False
        except Unreachable:
            return False
        return True
