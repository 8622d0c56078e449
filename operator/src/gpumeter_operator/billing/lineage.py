"""Every Final report names the one before it: `status.previousDigest`, so that whoever has one can prove the others.

Owns what that digest is and the check of such a chain. There is one a tenant, service and kind of report (closing
periods, days, months): what a customer is shown is a chain by itself, without the other customers' reports. Pure.

    previousDigest = SHA-256 of the tenant's Final report before (its `canonical_report`), 64 zeros for the first

Reports of versions before have none; a chain begins with the first report that has, and from then on every one must.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from gpumeter_operator.billing.report import Manifest
from gpumeter_usage.chain import GENESIS

FIELD = "previousDigest"

FinalReport = tuple[int, str, bytes]
"""(end of the period, tenant, bytes)."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the reports of a service, of one kind, say of those before them. Keys are (end of the period, tenant)."""

    before: Mapping[tuple[int, str], str]
    breaks: tuple[tuple[int, str], ...]
    since_ns: int | None

    def has(self, end_ns: int) -> bool:
        """Whether the reports of this period are of a version that chains them."""
        return self.since_ns is not None and end_ns >= self.since_ns

    def chained(self, manifests: Iterable[Manifest], end_ns: int) -> tuple[Manifest, ...]:
        """Reports of a period that were folded anew, with what they must say of those before them."""
        manifests = tuple(manifests)
        if not self.has(end_ns):
            return manifests
        tenants = (manifest["spec"]["tenant"] for manifest in manifests)
        return chained(manifests, {name: self.before.get((end_ns, name), GENESIS) for name in tenants})


def chained(manifests: Sequence[Manifest], before: Mapping[str, str]) -> tuple[Manifest, ...]:
    """Final reports of one period, each with the digest of its tenant's report before it."""
    return tuple(
        {**each, "status": {**each["status"], FIELD: before.get(each["spec"]["tenant"], GENESIS)}} for each in manifests
    )


def lineage(reports: Iterable[FinalReport]) -> Lineage:
    """Follow the chains of all tenants through Final reports of one service and kind, given by period."""
    before: dict[tuple[int, str], str] = {}
    breaks: list[tuple[int, str]] = []
    heads: dict[str, str] = {}
    since_ns: int | None = None
    for end_ns, tenant, body in reports:
        stated = _stated(body)
        head = heads.get(tenant, GENESIS)
        before[end_ns, tenant] = head
        if since_ns is None and stated is not None:
            since_ns = end_ns
        if since_ns is not None and stated != head:
            told = "names no report before it" if stated is None else f"names {stated:.64} as the report before it"
            breaks.append((end_ns, f"{tenant}'s report {told}; that has the digest {head}"))
        # A file that somebody else wrote may hold text where bytes must be.
        heads[tenant] = sha256(body if isinstance(body, bytes) else str(body).encode()).hexdigest()
    return Lineage(before, tuple(breaks), since_ns)


def _stated(body: bytes) -> str | None:
    try:
        status: Any = json.loads(body)["status"]
        stated = status.get(FIELD)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return None if stated is None else str(stated)
