"""Tells whoever edits a PricePlan what became of it: writes its status.

Owns when that is written: when it says something else than what stands there. Decides no sentence.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from gpumeter_operator.adapters.kubernetes import PRICE_PLANS, Refused
from gpumeter_operator.adapters.ledger.prices import seen_versions
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.plan_status import PlanStatus, status_of
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.period import rfc3339

log = logging.getLogger(__name__)

FIELD_MANAGER = "gpumeter-collector"
Manifest = Mapping[str, Any]


class PlansPort(Protocol):
    """What telling needs of a cluster. Raises Refused and Unreachable."""

    async def apply(
        self, manifest: dict[str, Any], *, field_manager: str, subresource: str | None = None
    ) -> dict[str, Any]:
        """Server-side apply."""
        ...


class PlanTeller:
    """Keeps the status of price plans up to date."""

    def __init__(self, cluster: PlansPort, ledger: Reader, execute: Execute) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._execute = execute
        self._told: dict[str, tuple[str, PlanStatus]] = {}  # by name: the plan's uid, what was written
        self._refused: set[str] = set()

    async def tell(self, plans: Iterable[Manifest], now_ns: int) -> None:
        """Write the status of the plans of which there is something new to say. Raises LedgerUnavailable, Unreachable.

        A refusal is logged once a plan, and tried again: a bill does not wait for it.
        """
        for plan in plans:
            name, uid = plan["metadata"]["name"], plan["metadata"].get("uid", "")
            seen = await self._execute(partial(seen_versions, self._ledger.engine, name))
            if not seen:
                continue
            status = status_of(name, seen)
            if self._told.get(name) == (uid, status) or _stands(plan, status):
                continue
            try:
                await self._cluster.apply(
                    _manifest(plan, status, now_ns), field_manager=FIELD_MANAGER, subresource="status"
                )
            except Refused as refusal:
                if name not in self._refused:
                    log.warning("The status of the PricePlan %s cannot be written: %s", name, refusal)
                self._refused.add(name)
                continue
            self._told[name] = (uid, status)
            self._refused.discard(name)
            log.info("%s: PricePlan %s: %s", status.reason, name, status.message)


def _stands(plan: Manifest, status: PlanStatus) -> bool:
    there = plan.get("status") or {}
    ready = _ready(there)
    said = (there.get("hash"), ready.get("reason"), ready.get("message"))
    return said == (status.hash, status.reason, status.message)


def _ready(status: Manifest) -> Manifest:
    nothing: Manifest = {}
    return next((each for each in status.get("conditions") or [] if each.get("type") == "Ready"), nothing)


def _manifest(plan: Manifest, status: PlanStatus, now_ns: int) -> dict[str, Any]:
    state = "True" if status.ready else "False"
    before = _ready(plan.get("status") or {})
    since = before.get("lastTransitionTime") if before.get("status") == state else rfc3339(now_ns)
    condition = {
        "type": "Ready",
        "status": state,
        "observedGeneration": status.version,
        "lastTransitionTime": since,
        "reason": status.reason,
        "message": status.message[:32_768],
    }
    return {
        "apiVersion": PRICE_PLANS.api_version,
        "kind": PRICE_PLANS.kind,
        "metadata": {"name": plan["metadata"]["name"]},
        "status": {"observedGeneration": status.version, "hash": status.hash, "conditions": [condition]},
    }
