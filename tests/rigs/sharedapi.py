"""An API server in memory that several operators use one after the other: as much of the real one as they can notice.

Owns server-side apply with field ownership (what a manager no longer says is removed, what says nothing new changes
nothing), merge patches guarded by the resource version, generations, finalizers, deletion in the background with its
garbage collection, lists and watches from a version on. Lists inside manifests are replaced whole: nobody else writes
into those of the operator. Counts creations, so that whatever is doubled shows.
"""

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from gpumeter_operator.adapters.kubernetes import Keep, Labels, Manifest, Manifests, Refused, Resource, whole

Key = tuple[str, str, str]
Path = tuple[str, ...]
FIRST = 100  # each write is the next version, so a version says where it stands in the history
BOOKKEEPING = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")


class SharedApi:
    """Objects by (kind, namespace, name). `now` gives the time that is written into them."""

    def __init__(self, now: Callable[[], str]) -> None:
        self.objects: dict[Key, Manifest] = {}
        self.created: Counter[Key] = Counter()
        self.on_removed: Callable[[Manifest], None] = lambda item: None
        self._now = now
        self._owned: dict[Key, dict[str, set[Path]]] = {}
        self._version = FIRST
        self._uids = 0
        self._history: list[tuple[int, str, Manifest]] = []
        self._news = asyncio.Condition()

    @property
    def version(self) -> int:
        return self._version

    # The port of the flows (flow.api.Api and flow.scale_ports.Marks).

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest | None:
        return copy.deepcopy(self.objects.get((resource.kind, namespace or "", name)))

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Manifests:
        return (await self.list_at(resource, namespace, labels))[0]

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[Manifests, str]:
        found = [one for key, one in self.objects.items() if key[0] == resource.kind and namespace in (None, key[1])]
        return [keep(copy.deepcopy(one)) for one in found if _matches(one, labels)], str(self._version)

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        seen = int(version)
        while True:
            for at, change, item in self._history[seen - FIRST :]:
                seen = at
                if item["kind"] == resource.kind and _matches(item, labels):
                    yield change, copy.deepcopy(item)
            async with self._news:
                await self._news.wait_for(lambda: self._version > seen)  # noqa: B023

    async def apply(
        self, manifest: Manifest, *, field_manager: str, subresource: str | None = None, only_new: bool = False
    ) -> Manifest:
        key = _key(manifest)
        before = self.objects.get(key)
        if only_new and before is not None:
            raise Refused(409, "Conflict", "the object has been modified")
        mine = set(_leaves(_without_bookkeeping(manifest)))
        former = self._owned.setdefault(key, {}).get(field_manager, set())
        after = copy.deepcopy(before) if before else {"metadata": {}}
        for path in former - mine:
            if not any(path in theirs for who, theirs in self._owned[key].items() if who != field_manager):
                _remove(after, path)
        for path in mine:
            _put(after, path, copy.deepcopy(_at(manifest, path)))
        self._owned[key][field_manager] = mine
        return await self._store(key, before, after)

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest, *, subresource: str | None = None
    ) -> Manifest | None:
        key = (resource.kind, namespace or "", name)
        before = self.objects.get(key)
        if before is None:
            return None
        wanted = patch.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != before["metadata"]["resourceVersion"]:
            raise Refused(
                409, "Conflict", "the object has been modified; please apply your changes to the latest version"
            )
        part = {"status": patch["status"]} if subresource == "status" else _without_bookkeeping(patch)
        return await self._store(key, before, _merged(before, part))

    async def patch_status(
        self, resource: Resource, name: str, namespace: str | None, patch: Manifest
    ) -> Manifest | None:
        return await self.patch(resource, name, namespace, patch, subresource="status")

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        key = (resource.kind, namespace or "", name)
        found = self.objects.get(key)
        if found is None or (uid is not None and found["metadata"]["uid"] != uid):
            return
        if found["metadata"].get("finalizers"):
            after = copy.deepcopy(found)
            after["metadata"].setdefault("deletionTimestamp", self._now())
            await self._store(key, found, after)
        else:
            await self._drop(key)

    async def close(self) -> None:
        pass

    # Everybody else.

    async def put(self, manifest: Manifest) -> Manifest:
        """What a user or a controller writes."""
        key = _key(manifest)
        return await self._store(key, self.objects.get(key), copy.deepcopy(manifest))

    async def _store(self, key: Key, before: Manifest | None, after: Manifest) -> Manifest:
        metadata = after["metadata"]
        if before is None:
            self._uids += 1
            self.created[key] += 1
            metadata |= {
                "uid": metadata.get("uid", f"uid-{self._uids}"),
                "creationTimestamp": self._now(),
                "generation": 1,
            }
        elif after == before:
            return copy.deepcopy(before)
        elif after.get("spec") != before.get("spec"):
            metadata["generation"] = int(before["metadata"].get("generation", 1)) + 1
        self.objects[key] = after
        await self._tell("ADDED" if before is None else "MODIFIED", after)
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            await self._drop(key)
        return copy.deepcopy(after)

    async def _drop(self, key: Key) -> None:
        gone = self.objects.pop(key)
        self._owned.pop(key, None)
        await self._tell("DELETED", gone)
        self.on_removed(gone)
        for other, item in list(self.objects.items()):
            owners = [one["uid"] for one in item["metadata"].get("ownerReferences") or ()]
            if gone["metadata"]["uid"] in owners and other in self.objects and other[0] != "Pod":
                await self._drop(other)  # pods end by themselves, when their kubelet says so

    async def _tell(self, change: str, item: Manifest) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, change, copy.deepcopy(item)))
        async with self._news:
            self._news.notify_all()


def _key(manifest: Manifest) -> Key:
    return manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def _matches(item: Manifest, labels: Labels | None) -> bool:
    its = item["metadata"].get("labels") or {}
    return all(name in its and (value is None or its[name] == value) for name, value in (labels or {}).items())


def _without_bookkeeping(manifest: Manifest) -> Manifest:
    metadata = {name: value for name, value in manifest.get("metadata", {}).items() if name not in BOOKKEEPING}
    return {**manifest, "metadata": metadata}


def _leaves(value: Any, path: Path = ()) -> list[Path]:
    if isinstance(value, dict) and value:
        return [leaf for name, part in value.items() for leaf in _leaves(part, (*path, name))]
    return [path]


def _at(value: Any, path: Path) -> Any:
    for name in path:
        value = value[name]
    return value


def _put(value: dict[str, Any], path: Path, leaf: Any) -> None:
    for name in path[:-1]:
        if not isinstance(value.get(name), dict):
            value[name] = {}
        value = value[name]
    value[path[-1]] = leaf


def _remove(value: dict[str, Any], path: Path) -> None:
    for name in path[:-1]:
        if not isinstance(value.get(name), dict):
            return
        value = value[name]
    value.pop(path[-1], None)


def _merged(base: Manifest, patch: Manifest) -> Manifest:
    result = copy.deepcopy(base)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            former = result.get(name)
            result[name] = _merged(former if isinstance(former, dict) else {}, value)
        else:
            result[name] = copy.deepcopy(value)
    return result
