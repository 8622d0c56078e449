"""What the traffic came to: a table by tenant, and every exchange as JSON. Pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal

from traffic.exchange import Exchange, Outcome

COLUMNS = ("TENANT", "REQUESTS", "FINISHED", "ABORTED", "REFUSED", "BUSY", "FAILED", "TOKENS SEEN", "GPU-SECONDS TOLD")


def table(exchanges: Sequence[Exchange]) -> str:
    """One line a tenant. GPU-seconds are those that answers stated; an aborted request's client was told none."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for tenant in sorted({one.tenant for one in exchanges}):
        own = [one for one in exchanges if one.tenant == tenant]
        counts = [sum(one.outcome is outcome for one in own) for outcome in Outcome]
        told = sum((Decimal(one.gpu_seconds) for one in own if one.gpu_seconds), Decimal())
        rows.append(tuple(map(str, (tenant, len(own), *counts, sum(one.tokens for one in own), told))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(exchanges: Sequence[Exchange]) -> str:
    """All exchanges, one object each, for whoever compares them with the ledger."""
    return json.dumps([asdict(one) for one in exchanges], indent=1) + "\n"


def surprises(exchanges: Sequence[Exchange]) -> list[str]:
    """A sentence for every request that ended otherwise than it was meant to, or that nobody can find in a ledger."""
    found = [
        f"{one.tenant} #{one.number} ({one.kind}) {one.outcome} with {one.status}: {one.note}"
        for one in exchanges
        if one.surprising
    ]
    found += [f"{one.tenant} #{one.number} has no session id" for one in exchanges if one.status and not one.session]
    return found
