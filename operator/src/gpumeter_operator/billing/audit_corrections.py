"""What every correction by hand must agree with: the report that it corrects, and the one on which it is billed.

Owns the comparison, and its sentences. Knows neither how corrections are priced nor how they are kept.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from gpumeter_operator.billing.facts import PLATFORM, Correction
from gpumeter_operator.billing.report import MAX_ADJUSTMENTS
from gpumeter_usage.period import from_rfc3339, rfc3339

Finals = Mapping[tuple[int, str], tuple[bytes, str]]
"""By end of period and tenant, bytes and digest of the Final reports of a service."""


def corrections_unproved(
    corrections: Iterable[Correction],
    finals: Finals,
    classes_of: Callable[[int], Iterable[str]],
    models_of: Callable[[int], Iterable[str]],
    final_ns: int,
) -> Iterator[tuple[str, str]]:
    """(reason, sentence without its end) for every correction that is not of its report, or is on no bill.

    `classes_of` gives the classes of GPU of a service in a Final period, by its end, and `models_of` its models.
    `final_ns` is the end of the last Final one, and must be older than the reports: what is booked until then is on a
    bill, or never will be.
    """
    for each in corrections:
        if told := _of_its_report(each, finals) or _of_its_pods(each, classes_of, models_of):
            yield "CorrectionUnproved", f"corrections ({each.id}): {each.namespace}/{each.service}: {told}"
        if each.booked_end_ns <= final_ns and not _is_billed(each, finals):
            told = f"it stands on no Final report of the period until {rfc3339(each.booked_end_ns)}"
            yield "CorrectionUnbilled", f"corrections ({each.id}): {each.namespace}/{each.service}: {told}"


def _of_its_report(each: Correction, finals: Finals) -> str:
    # Who had no report was billed beside the platform's.
    who = each.tenant if (each.closed_end_ns, each.tenant) in finals else PLATFORM
    body, digest = finals.get((each.closed_end_ns, who), (b"", ""))
    whose = f"{who}'s report of the period that ended {rfc3339(each.closed_end_ns)}"
    if digest != each.report_digest:
        return f"{whose} is not the one that it corrects"
    report = json.loads(body)
    name, start = report["metadata"]["name"], report["spec"]["period"]["start"]
    if name != each.report:
        return f"{whose} is called {name}, and it names {each.report:.120}"
    if from_rfc3339(start) != each.closed_start_ns:
        return f"{whose} begins at {start}, and it says {rfc3339(each.closed_start_ns)} ({each.closed_start_ns} ns)"
    return ""


def _of_its_pods(
    each: Correction, classes_of: Callable[[int], Iterable[str]], models_of: Callable[[int], Iterable[str]]
) -> str:
    if each.model is None and each.gpu_class not in (classes := sorted(classes_of(each.closed_end_ns))):
        return (
            f"no GPU of that period was of the class {each.gpu_class!r:.80}, but of {' and '.join(classes) or 'none'}"
        )
    if each.model is not None and each.model not in (models := sorted(models_of(each.closed_end_ns))):
        return f"no pod of that period had the model {each.model!r:.80}, but {' and '.join(models) or 'none'}"
    return ""


def _is_billed(each: Correction, finals: Finals) -> bool:
    body, _ = finals.get((each.booked_end_ns, each.tenant), (b"", ""))
    shown = json.loads(body)["status"].get("adjustments", ()) if body else ()
    # Of more than a report shows it cannot be told from the report; the period is folded anew in any case.
    return len(shown) >= MAX_ADJUSTMENTS or any(entry.get("id") == each.id for entry in shown)
