"""Tells each service what it has used: writes status.usage of InferenceServices.

Owns how often that is written: at most once a minute, and seldom where nobody used anything, since each write wakes
whoever watches services. The collector writes it and not the operator, because it has the reports at hand and a field
manager of its own; no watch of UsageReports is needed for it. Decides no figure.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, Refused
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.rollups import final_bodies
from gpumeter_operator.billing.service_usage import Manifest, Service, Usage, hour_of, usage_of, written
from gpumeter_operator.flow.collect import Execute
from gpumeter_operator.flow.plans import PlansPort as StatusPort
from gpumeter_usage.period import SECOND_NS, Granularity

log = logging.getLogger(__name__)

FIELD_MANAGER = "gpumeter-collector"
USED_EVERY_NS = 60 * SECOND_NS
IDLE_EVERY_NS = 600 * SECOND_NS  # only what is allocated grows: a thousand such services are two writes a second
MAX_WRITES = 50  # in a round, so that a thousand services do not hold up the next one
MAX_TELLING_NS = SECOND_NS  # so long a round tells: the next closing waits for it

Objects = Callable[[], Mapping[Service, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Told:
    uid: str
    at_ns: int
    usage: Usage
    text: Mapping[str, Any]


class UsageTeller:
    """Keeps status.usage of services up to date. `services` are the live copies, `clock_ns` never goes back."""

    def __init__(
        self,
        cluster: StatusPort,
        ledger: Reader,
        execute: Execute,
        services: Objects,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._execute = execute
        self._services = services
        self._clock_ns = clock_ns
        self._looked_ns: dict[Service, int] = {}  # when it was last computed what a service has used
        self._told: dict[Service, _Told] = {}
        self._refused: set[Service] = set()

    async def tell(self, reports: Iterable[Manifest], now_ns: int) -> None:
        """Write what is due. `reports` are all that a round of closing gives. Raises LedgerUnavailable, Unreachable.

        Whoever has waited longest comes first; what does not fit into this round goes on in the next one. A refusal is
        logged once a service and tried again after a while: a bill does not wait for it.
        """
        services, left = self._services(), MAX_WRITES
        until_ns = self._clock_ns() + MAX_TELLING_NS
        for gone in self._looked_ns.keys() - services.keys():
            del self._looked_ns[gone]
            self._told.pop(gone, None)
        by_service = {key: list(group) for key, group in groupby(sorted(reports, key=_service), key=_service)}
        for key in sorted(by_service, key=lambda each: (self._looked_ns.get(each, 0), each)):
            if not left or self._clock_ns() >= until_ns:
                break
            service = services.get(key)
            if service is None or "deletionTimestamp" in service["metadata"]:
                continue
            uid, told = service["metadata"]["uid"], self._told.get(key)
            if told is not None and told.uid != uid:
                told = None  # a namesake
            if told is not None and now_ns < told.at_ns + USED_EVERY_NS and told.usage.hour_ns == hour_of(now_ns):
                continue
            self._looked_ns[key] = now_ns
            usage = await self._usage(key, by_service[key], now_ns)
            if usage is None or (told is not None and not _is_due(told, usage, now_ns)):
                continue
            text = written(usage)
            if text != (service.get("status") or {}).get("usage"):
                left -= 1
                await self._write(key, uid, text)
            self._told[key] = _Told(uid, now_ns, usage, text)

    async def _usage(self, key: Service, reports: list[Manifest], now_ns: int) -> Usage | None:
        closed: list[Manifest] = []
        if any(_is_short(each) for each in reports):
            # What of this hour was closed in earlier rounds, which an hour's own report would still hold.
            bodies = partial(final_bodies, self._ledger.engine, key, hour_of(now_ns), now_ns)
            closed = [json.loads(body) for _, _, body in await self._execute(bodies)]
        return usage_of(reports, now_ns, closed)

    async def _write(self, key: Service, uid: str, text: Mapping[str, Any]) -> None:
        manifest = {
            "apiVersion": INFERENCE_SERVICES.api_version,
            "kind": INFERENCE_SERVICES.kind,
            # With its uid, so that a namesake made meanwhile is not told what another has used.
            "metadata": {"namespace": key[0], "name": key[1], "uid": uid},
            "status": {"usage": text},
        }
        try:
            await self._cluster.apply(manifest, field_manager=FIELD_MANAGER, subresource="status")
        except Refused as refusal:
            if refusal.status not in (404, 409) and key not in self._refused:
                log.warning("The usage of %s/%s cannot be written to its status: %s", *key, refusal)
                self._refused.add(key)
        else:
            self._refused.discard(key)


def _is_due(told: _Told, usage: Usage, now_ns: int) -> bool:
    used = (usage.hour_ns, usage.attributed_ns) != (told.usage.hour_ns, told.usage.attributed_ns)
    return used or now_ns >= told.at_ns + IDLE_EVERY_NS


def _is_short(report: Manifest) -> bool:
    long = (Granularity.HOUR.value, Granularity.DAY.value, Granularity.MONTH.value)
    return report["spec"]["period"]["granularity"] not in long


def _service(report: Manifest) -> Service:
    return report["metadata"]["namespace"], report["spec"]["serviceRef"]["name"]
