"""Records that are gone for good: what is known of them, which periods they were of, and how many a boot may lose.

A worker trims what was acknowledged and nothing else. So a ledger that was restored from an older backup lacks what was
acknowledged since, and so does every ledger where somebody else acknowledged with the service's usage token. Nobody
has these records any more: their time is `unaccounted` and billed to nobody, the periods in which they may have been
end with Complete=False, and the chain goes on from the last of them, whose hash the worker keeps.

Owns these rules. Pure; a fork, which is two records under one key, is none of this and stays refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpumeter_operator.billing.accept import PageRefused
from gpumeter_operator.billing.facts import BootFacts, Gap, Pod
from gpumeter_operator.billing.reading import Row
from gpumeter_usage.page import Boot, Page
from gpumeter_usage.period import Period
from gpumeter_usage.record import MAX_INTEGER, Kind, Record

MAX_GAPS = 4
"""A backup that is restored leaves one in a boot. Whoever acknowledges in our place would leave one a pull: after so
many the boot is refused as a whole, and we acknowledge nothing of it. That does not end its lease where they go on
acknowledging: they use the service for nothing until somebody acts on `AcknowledgedAhead`."""

REASON = "SequenceGap"

NO_CONTINUATION = "; it does not say what its chain goes on from, so it is not collected any more: restart the pod"
"""How the refusal ends of a boot that could go on. Of a file that a dead pod left, it is not to be restarted."""


def lost(boot: Boot, committed_seq: int) -> str:
    """A sentence, without its end, for the records of a boot that were acknowledged and are not here."""
    return (
        f"boot {boot.boot_id:.64}: records {committed_seq + 1} to {boot.acknowledged_seq} were acknowledged and "
        "trimmed, but are not in this ledger; either it was restored from an older backup, or somebody else holds the "
        "service's usage token"
    )


def refuse_without_continuation(boot: Boot, committed_seq: int) -> None:
    """Raise PageRefused where a boot that was acknowledged ahead states nothing from which its chain could go on."""
    told = lost(boot, committed_seq)
    if boot.acknowledged_seq > min(boot.head_seq, MAX_INTEGER):
        raise PageRefused("AcknowledgedAhead", f"{told}; and its head is {boot.head_seq}, which cannot be")
    if boot.acknowledged_seq == boot.head_seq:
        raise PageRefused("AcknowledgedAhead", f"{told}; it is collected again as soon as there is a record after them")
    if len(boot.acknowledged_hash) != 64:
        raise PageRefused(
            "AcknowledgedAhead",
            f"{told}{NO_CONTINUATION}",
        )


def refuse_more_gaps(boot_id: str, known: Iterable[Gap]) -> None:
    """Raise PageRefused where a boot has lost records too often already."""
    if sum(gap.boot_id == boot_id for gap in known) >= MAX_GAPS:
        raise PageRefused(
            "AcknowledgedAhead",
            f"boot {boot_id:.64}: it has lost records {MAX_GAPS} times that somebody else acknowledged, and lost more; "
            "it is not collected any more. Whoever holds the service's usage token can use it for nothing: make the "
            "service anew or change the master key, which alone give another token, or restart the pod where it was no "
            "attack",
        )


def gap_before(
    page: Page,
    records: Sequence[Record | Row],
    boot: BootFacts | None,
    *,
    last_hash: str,
    known_until_ns: int,
    now_ns: int,
) -> Gap:
    """The gap between what is here of a boot, up to `known_until_ns`, and the first page after it.

    A flush ends with an account record (or a seal) that ends when it was made, so nothing before that ends later.
    """
    first_seq = (boot.committed_seq if boot else 0) + 1
    ends = [record.ended_at for record in records if record.kind is not Kind.SESSION]
    until_ns = max(ends[0] if ends else max(record.ended_at for record in records), known_until_ns)
    reason = (
        f"Records {first_seq} to {page.after} of boot {page.boot_id} were acknowledged and trimmed, but are not in "
        "this ledger; what they booked is unaccounted and billed to nobody."
    )
    return Gap(
        boot_id=page.boot_id,
        first_seq=first_seq,
        last_seq=page.after,
        last_hash=last_hash,
        after_ns=known_until_ns,
        until_ns=until_ns,
        reason=reason,
        made_ns=now_ns,
    )


def gaps_untold(
    pods: Iterable[Pod], period: Period, completeness: Mapping[str, Any], kept_ns: int
) -> list[tuple[Pod, Gap]]:
    """The gaps that were known when a period was closed and may hold something of it, though its report's completeness
    does not name their pod: such a row was put in afterwards."""
    missing = completeness["missing"]
    if completeness["expectedWorkers"] - completeness["reportedWorkers"] > len(missing):
        return []  # a report names only the first of very many
    named = {each["workerUid"] for each in missing}
    return [
        (pod, gap)
        for pod in pods
        if pod.worker.worker_uid not in named
        for gap in pod.gaps
        if gap.made_ns < kept_ns and _is_in(gap, period)
    ]


def gap_in(pod: Pod, period: Period) -> Gap | None:
    """The first gap of a pod that may hold something of a period."""
    return next((gap for gap in pod.gaps if _is_in(gap, period)), None)


def _is_in(gap: Gap, period: Period) -> bool:
    return gap.after_ns < period.end_ns and gap.until_ns > period.start_ns
