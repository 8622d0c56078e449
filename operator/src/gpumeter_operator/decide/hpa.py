"""HorizontalPodAutoscaler v2's algorithm: how many pods a ratio asks for, and what `behavior` lets through of it.

Owns three functions that answer as Kubernetes' controller does (k8s.io/kubernetes 1.36, pkg/controller/podautoscaler):
`asked_for` as calcPlainMetricReplicas in replica_calculator.go, `stabilized` as stabilizeRecommendationWithBehaviors
and `limited` as convertDesiredReplicasWithBehaviorRate in horizontal.go. Their published test cases are tests here. In
whole numbers throughout. Knows neither queues nor GPUs; takes the clock (milliseconds that never go back) as an
argument.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpumeter_operator.decide.scaling import Rules, Scaling

_MILLION = 1_000_000


class Recommendation(NamedTuple):
    """What was asked for; the newest moment at which it was."""

    at_ms: int
    replicas: int


class Change(NamedTuple):
    """A change of the number of replicas by `by`, more or fewer."""

    at_ms: int
    by: int


def asked_for(
    measured: Sequence[int], *, silent: int, starting: int, beside: int, current: int, target: int, scaling: Scaling
) -> int:
    """Pods that are wanted so that each has `target`, by the ratio of what is measured to it.

    `measured` has a value for each pod that is ready and told one. `silent` pods should have told one: they count as
    exactly at target when less is measured, and as idle when more is, so that silence never moves anything. `starting`
    pods are not ready yet: they count as idle when more is measured, for they will take their part, and not at all
    otherwise. `beside` is load that no pod has yet. Within the tolerance, and wherever the corrections would turn the
    direction round, `current` stays.

    Two differences from Kubernetes, both where pods are missing or surplus to `current`: more load never asks for fewer
    than `current`, less never for more. And without any measured pod it decides by `beside`, where Kubernetes gives up.
    """
    total, ready = sum(measured) + beside, len(measured)
    if total > target * ready:
        counted = ready + silent + starting
    elif silent:
        counted, total = ready + silent, total + target * silent
    else:
        counted = ready
    at_target = target * counted
    if counted and -at_target * scaling.down.tolerance_ppm <= (total - at_target) * _MILLION <= (
        at_target * scaling.up.tolerance_ppm
    ):
        return current
    wanted = -(-total // target)
    if sum(measured) + beside > target * ready:
        return max(wanted, current) if total > at_target else current
    return min(wanted, current) if total < at_target else current


def stabilized(wanted: int, current: int, past: Iterable[Recommendation], now_ms: int, scaling: Scaling) -> int:
    """The number nearest to `current` among those that the windows leave.

    Up: no more than the lowest recommendation inside scaleUp's window. Down: no fewer than the highest inside
    scaleDown's window.
    """
    ceiling = floor = wanted
    for recommendation in past:
        age_ms = now_ms - recommendation.at_ms
        if age_ms < scaling.up.window_ms:
            ceiling = min(ceiling, recommendation.replicas)
        if age_ms < scaling.down.window_ms:
            floor = max(floor, recommendation.replicas)
    return min(max(current, ceiling), floor)


def remembered(
    past: Sequence[Recommendation], wanted: int, now_ms: int, scaling: Scaling
) -> tuple[Recommendation, ...]:
    """The recommendations of the longer window with this one; equal ones in a row count once, by the newest."""
    window_ms = max(scaling.up.window_ms, scaling.down.window_ms)
    kept = [one for one in past if now_ms - one.at_ms < window_ms]
    if kept and kept[-1].replicas == wanted:
        kept.pop()
    return (*kept, Recommendation(now_ms, wanted))


def limited(
    wanted: int, current: int, changes: Sequence[Change], now_ms: int, scaling: Scaling, *, least: int, most: int
) -> tuple[int, str]:
    """What the policies and the bounds leave of `wanted`, and which of them cut it.

    The second is ScaleUpLimit, TooManyReplicas, ScaleDownLimit or TooFewReplicas, as in an HPA's ScalingLimited
    condition, or empty.
    """
    if current > most:
        return most, "TooManyReplicas"
    if current < least:
        return least, "TooFewReplicas"
    if wanted > current:
        allowed = max(current, _limit(current, changes, now_ms, scaling.up, up=True))
        if wanted > min(allowed, most):
            return (allowed, "ScaleUpLimit") if allowed < most else (most, "TooManyReplicas")
    elif wanted < current:
        allowed = min(current, _limit(current, changes, now_ms, scaling.down, up=False))
        if wanted < max(allowed, least):
            return (allowed, "ScaleDownLimit") if allowed > least else (least, "TooFewReplicas")
    return wanted, ""


def recent(changes: Sequence[Change], now_ms: int, scaling: Scaling) -> tuple[Change, ...]:
    """The changes that some policy still counts."""
    longest_ms = max(policy.period_ms for rules in (scaling.up, scaling.down) for policy in rules.policies)
    return tuple(one for one in changes if now_ms - one.at_ms < longest_ms)


def _limit(current: int, changes: Sequence[Change], now_ms: int, rules: Rules, *, up: bool) -> int:
    if rules.select == "Disabled":
        return current
    proposed = []
    for policy in rules.policies:
        start = current - sum(one.by for one in changes if now_ms - one.at_ms < policy.period_ms)
        if not policy.percent:
            proposed.append(start + policy.value if up else start - policy.value)
        elif up:  # rounded up, or a small number would never grow
            proposed.append(-(-start * (100 + policy.value) // 100))
        else:  # towards zero, as Go turns a float into a number
            proposed.append(int(start * (100 - policy.value) / 100))
    most_change = max if up else min
    least_change = min if up else max
    return (least_change if rules.select == "Min" else most_change)(proposed)
