"""Publishes UsageReports: what the ledger says is what the cluster shows.

Owns when a report is written, and what becomes of one that is missing (it is written again, the same) or cannot be
written (its namespace is gone: one line in the log; the facts stay in the ledger). Decides no figure, watches nothing.
"""

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

from gpumeter_operator.adapters.kubernetes import USAGE_REPORTS, Refused, Resource
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.close import Phase
from gpumeter_operator.billing.report import Manifest, canonical_report
from gpumeter_operator.decide.names import MANAGED_BY, MANAGED_BY_LABEL
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import SECOND_NS

log = logging.getLogger(__name__)

FIELD_MANAGER = "gpumeter-collector"
REPUBLISH_NS = 7 * 24 * 3600 * SECOND_NS
"""How far back a Final report that is missing in the cluster is written again; older ones are in the ledger alone."""
MAX_WRITES = 8  # at the same time: the API server's clients share its attention
NAMESPACE_RETRY_NS = 600 * SECOND_NS  # a namespace that is gone may come back under the same name

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


class Publisher:
    """Writes what changed since it was written last."""

    def __init__(self, cluster: ReportsPort, ledger: Reader, execute: Execute) -> None:
        self.refused = 0
        self.written = 0
        self._cluster = cluster
        self._ledger = ledger
        self._execute = execute
        self._published: dict[Key, str] = {}  # the digest of what was written
        self._written_phase: dict[Key, str] = {}
        self._gone: dict[str, int] = {}  # namespace -> when to try again
        self._slots = asyncio.Semaphore(MAX_WRITES)

    async def publish(self, manifests: Iterable[Manifest], now_ns: int) -> None:
        """Write those of these reports that are not published as they are. Raises Unreachable.

        Every write has ended by then: one that went on into the next round could put an older state over a newer one.
        """
        ended = await asyncio.gather(*(self._publish(one, now_ns) for one in manifests), return_exceptions=True)
        for problem in ended:
            if problem is not None:
                raise problem

    async def restore(self, now_ns: int) -> None:
        """Compare with the cluster: write Final reports that are missing there again. Raises Unreachable, Refused."""
        labels = {MANAGED_BY_LABEL: MANAGED_BY}
        listed = await self._cluster.list(USAGE_REPORTS, None, labels)
        present = {
            (item["metadata"]["namespace"], item["metadata"]["name"]): (item.get("status") or {}).get("phase", "")
            for item in listed
        }
        for key in [key for key in self._published if present.get(key) in (None, Phase.FINAL.value)]:
            self._forget(key)  # absent: to be written again; Final: done with
        names = await self._execute(partial(self._ledger.final_names, now_ns - REPUBLISH_NS))
        for key in sorted(names):
            if present.get(key) != Phase.FINAL.value and not self._is_gone(key[0], now_ns):
                body = await self._execute(partial(self._ledger.final_report, *key))
                if body is not None:
                    self._forget(key)
                    await self._publish(json.loads(body), now_ns)

    async def _publish(self, manifest: Manifest, now_ns: int) -> None:
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["name"])
        digest = sha256(canonical_report(manifest)).hexdigest()
        if self._published.get(key) == digest or self._is_gone(key[0], now_ns):
            return
        async with self._slots:
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
        self._written_phase.pop(key, None)
