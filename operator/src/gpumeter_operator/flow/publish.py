"""Publishes UsageReports: what the ledger says is what the cluster shows.

Owns when a report is written, what becomes of one that is missing (it is written again, the same) or cannot be written
(its namespace is gone: one line in the log; the facts stay in the ledger), and the removal of those whose time in the
API is over. Decides no figure, watches nothing.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

from gpumeter_operator.adapters.kubernetes import USAGE_REPORTS, Refused, Resource
from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.keep import DEFAULT_KEEP, Keep, holder_of, leaves_ns, stay_since_ns
from gpumeter_operator.billing.report import Manifest, canonical_report
from gpumeter_operator.decide.names import MANAGED_BY, MANAGED_BY_LABEL
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import SECOND_NS, Granularity, Period, from_rfc3339

log = logging.getLogger(__name__)

FIELD_MANAGER = "gpumeter-collector"
MAX_RESTORED = 500
"""Of the reports that are missing, so many are written again in a round: when etcd was lost, running periods go on."""
MAX_REMOVED = 500
"""Of those whose time is over, so many are removed in one round, the oldest first."""
MAX_WRITES = 8  # at the same time: the API server's clients share its attention
NAMESPACE_RETRY_NS = 600 * SECOND_NS  # a namespace that is gone may come back under the same name

_GRANULARITIES = (Granularity.HOUR, Granularity.DAY, Granularity.MONTH)  # HOUR stands for all closing periods

Key = tuple[str, str]


class ReportsPort(Protocol):
    """What publishing needs of a cluster. Raises Refused and Unreachable."""

    async def list(
        self, resource: Resource, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[dict[str, Any]]:
        """All objects."""
        ...

    async def apply(
        self, manifest: dict[str, Any], *, field_manager: str, subresource: str | None = None
    ) -> dict[str, Any]:
        """Server-side apply."""
        ...

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> None:
        """Delete this very object; an absent one is fine."""
        ...


class Publisher:
    """Writes what changed since it was written last."""

    def __init__(
        self,
        cluster: ReportsPort,
        ledger: Reader,
        execute: Execute,
        keep: Keep = DEFAULT_KEEP,
        *,
        restored_max: int = MAX_RESTORED,
    ) -> None:
        self.refused = 0
        self.written = 0
        self.removed = 0
        self._keep = keep
        self._restored_max = restored_max
        self._cluster = cluster
        self._ledger = ledger
        self._execute = execute
        self._published: dict[Key, str] = {}  # the digest of what was written
        self._same: dict[Key, Manifest] = {}  # the very object that was found to be published as it is
        self._written_phase: dict[Key, str] = {}
        self._gone: dict[str, int] = {}  # namespace -> when to try again
        self._slots = asyncio.Semaphore(MAX_WRITES)

    async def publish(self, manifests: Iterable[Manifest], now_ns: int) -> None:
        """Write those of these reports that are not published as they are. Raises Unreachable.

        Every write has ended by then: one that went on into the next round could put an older state over a newer one.
        """
        await _all(self._publish(one, now_ns) for one in manifests)

    async def restore(self, now_ns: int) -> bool:
        """Compare with the cluster: write Final reports that are missing there again, remove those whose time is over.

        Returns whether nothing was left for the next time. Raises Unreachable, Refused.
        """
        labels = {MANAGED_BY_LABEL: MANAGED_BY}
        listed = await self._cluster.list(USAGE_REPORTS, None, labels)
        present = {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in listed}
        final = {key for key, item in present.items() if (item.get("status") or {}).get("phase") == Phase.FINAL.value}
        for key in [key for key in self._published if key not in present or key in final]:
            self._forget(key)  # absent: to be written again; Final: done with
        since_ns = {each: stay_since_ns(each, self._keep, now_ns) for each in _GRANULARITIES}
        names = await self._execute(partial(rollups.final_names, self._ledger.engine, since_ns))
        missing = sorted(key for key in names - final if not self._is_gone(key[0], now_ns))
        over = [(period_of(present[key]), key) for key in final - names]
        over = sorted(each for each in over if leaves_ns(each[0], self._keep) <= now_ns)
        await _all(self._write_again(key, now_ns) for key in missing[: self._restored_max])
        await _all(self._remove(period, present[key]) for period, key in over[:MAX_REMOVED])
        return len(missing) <= self._restored_max and len(over) <= MAX_REMOVED

    async def _write_again(self, key: Key, now_ns: int) -> None:
        body = await self._execute(partial(rollups.final_body, self._ledger.engine, *key))
        if body is not None:
            self._forget(key)
            await self._publish(json.loads(body), now_ns)

    async def _remove(self, period: Period, report: Manifest) -> None:
        metadata, service = report["metadata"], report["spec"]["serviceRef"]["name"]
        namespace, name = metadata["namespace"], metadata["name"]
        holder = holder_of(period)
        if holder is not None:
            held = partial(rollups.is_final, self._ledger.engine, (namespace, service), holder)
            if not await self._execute(held):
                return  # what is not in a Final sum stays
        if await self._execute(partial(rollups.final_body, self._ledger.engine, namespace, name)) is None:
            return  # it is not this ledger's: removed here it would be lost
        async with self._slots:
            await self._cluster.delete(USAGE_REPORTS, name, namespace, uid=metadata["uid"])
        self._forget((namespace, name))
        self.removed += 1

    async def _publish(self, manifest: Manifest, now_ns: int) -> None:
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if self._same.get(key) is manifest:
            return
        digest = sha256(canonical_report(manifest)).hexdigest()
        if self._published.get(key) == digest:
            self._same[key] = manifest
            return
        if self._is_gone(key[0], now_ns):
            return
        async with self._slots:
            if self._is_gone(key[0], now_ns):
                return  # another of the namespace has just been told so
            try:
                await self._write(key, manifest)
            except Refused as refusal:
                self._give_up(key, refusal, digest, now_ns)
                return
        self._published[key] = digest
        self._written_phase[key] = manifest["status"]["phase"]
        self.written += 1

    async def _write(self, key: Key, manifest: Manifest) -> None:
        phase = manifest["status"]["phase"]
        if self._written_phase.get(key) != phase:
            # Spec and labels change with the phase only.
            outer = {name: value for name, value in manifest.items() if name != "status"}
            await self._cluster.apply(outer, field_manager=FIELD_MANAGER)
        inner = {name: manifest[name] for name in ("apiVersion", "kind", "status")}
        inner["metadata"] = {"name": key[1], "namespace": key[0]}
        await self._cluster.apply(inner, field_manager=FIELD_MANAGER, subresource="status")

    def _give_up(self, key: Key, refusal: Refused, digest: str, now_ns: int) -> None:
        namespace, name = key
        self.refused += 1
        terminating = refusal.status == 403 and "being terminated" in refusal.message
        if refusal.status == 404 and self._written_phase.get(key) is not None:
            self._forget(key)  # deleted by hand since it was written: the next round writes it whole
        elif refusal.status == 404 or terminating:
            self._gone[namespace] = now_ns + NAMESPACE_RETRY_NS
            log.info("%s/%s is not published, the namespace is gone; the ledger keeps its facts.", namespace, name)
        elif refusal.status == 422:
            # It will be refused again until its figures change: a Final one never does.
            self._published[key] = digest
            log.error("UsageReport %s/%s was refused and stays as it is: %s", namespace, name, refusal.message)
        else:
            log.warning("UsageReport %s/%s was not written: %s", namespace, name, refusal)

    def _is_gone(self, namespace: str, now_ns: int) -> bool:
        return self._gone.get(namespace, 0) > now_ns

    def _forget(self, key: Key) -> None:
        self._published.pop(key, None)
        self._same.pop(key, None)
        self._written_phase.pop(key, None)


def period_of(report: Manifest) -> Period:
    """The period of a report, as its spec says it."""
    period = report["spec"]["period"]
    start_ns, end_ns = from_rfc3339(period["start"]), from_rfc3339(period["end"])
    return Period(start_ns, end_ns, Granularity(period["granularity"]))


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """All of them to their end, then what went wrong first."""
    for problem in await asyncio.gather(*calls, return_exceptions=True):
        if problem is not None:
            raise problem
