"""Which workers finish what they have when there are to be fewer, and when the Deployment may be lowered for them.

Owns the choice (who has least to lose), the moment at which a marked worker may leave, and the way back. A marked
worker carries gpumeter.io/draining: "true", which takes it out of its Service, and a low deletion cost, by which the
ReplicaSet deletes it and no other. Everything is read from the pods, so that an operator that was restarted goes on.
Pure; does not know how pods are marked.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gpumeter_operator.decide.crew import Load, Replica, is_former

# Until the endpoint has gone from the last gateway and node, requests may still come; marks are kept to the second.
SETTLE_MS = 3_000
AHEAD_MAX = timedelta(minutes=1)  # of a mark's time: clocks of two operators differ


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, by names of pods: unmark, mark, let leave, and then set `replicas` of the Deployment."""

    replicas: int
    mark: tuple[str, ...] = ()
    unmark: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    @property
    def patches(self) -> bool:
        """Whether a pod is to be changed."""
        return bool(self.mark or self.unmark or self.leave)


def plan(
    wanted: int,
    deployed: int,
    crew: Sequence[Replica],
    loads: Mapping[str, Load],
    *,
    timeout_ms: int,
    now: datetime,
    now_ms: int,
    template: str = "",
) -> Plan:
    """From `deployed` replicas of the Deployment towards `wanted` that serve. `loads` by the pod's uid.

    `now` is the clock of the marks, `now_ms` that of the loads. `template` is the hash of the Deployment's template: of
    a rollout the former workers go first, for from them the Deployment takes when it is lowered.
    """
    leaving = [one for one in crew if one.leaving]
    if len(crew) <= deployed:
        leaving = []  # another pod went in their place; they are drained ones again
    draining = [one for one in crew if one.draining and one not in leaving]
    if wanted >= deployed:
        return Plan(wanted, unmark=_names(draining))
    surplus = deployed - wanted
    unmade = max(0, deployed - (len(crew) - len(leaving)))
    surplus -= min(surplus, unmade)  # pods that do not exist lose nothing
    # Those that are marked come first: another choice at every look would drain them all.
    by_loss = sorted(_young_first(one for one in crew if one not in leaving), key=lambda one: _loss(one, loads))
    former_first = sorted(by_loss, key=lambda one: not is_former(one, template))
    chosen = sorted(former_first, key=lambda one: not one.draining)[:surplus]
    finished = [one for one in chosen if one.draining and _may_leave(one, loads, timeout_ms, now, now_ms)]
    # Not ready and not yet marked: whatever it is doing, no request is in it.
    idle = [one for one in chosen if not one.draining and not one.ready and _in_flight(one, loads) == 0]
    gone = [*finished, *idle]
    undated = [one for one in chosen if one.draining and one not in gone and _marked_at(one, now) is None]
    return Plan(
        wanted + surplus - len(gone),
        mark=_names(one for one in chosen if one in undated or not (one.draining or one in idle)),
        unmark=_names(one for one in draining if one not in chosen),
        leave=_names(one for one in gone if not one.leaving),
    )


def _may_leave(replica: Replica, loads: Mapping[str, Load], timeout_ms: int, now: datetime, now_ms: int) -> bool:
    marked_at = _marked_at(replica, now)
    marked_ms = 0 if marked_at is None else int((now - marked_at).total_seconds() * 1_000)
    if marked_ms >= timeout_ms:
        return True  # what still runs gets the pod's own grace period after this
    load = loads.get(replica.uid)
    if load is None:
        return not replica.ready  # a silent worker may be at work
    told_after_ms = marked_ms - (now_ms - load.at_ms)
    return load.waiting + load.running == 0 and told_after_ms >= SETTLE_MS


def _marked_at(replica: Replica, now: datetime) -> datetime | None:
    """When it was marked. None where nobody can tell, as of a mark by hand: it is marked again, with a time.

    A time without a zone is taken for UTC; one that lies ahead of any clock's error would hold the worker until then.
    """
    try:
        at = datetime.fromisoformat(replica.draining_since)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at if at - now <= AHEAD_MAX else None


def _loss(replica: Replica, loads: Mapping[str, Load]) -> tuple[int, int]:
    """Not ready before ready, few requests before many, and what tells nothing last."""
    if not replica.ready:
        return 0, 0
    return (2, 0) if replica.uid not in loads else (1, _in_flight(replica, loads))


def _in_flight(replica: Replica, loads: Mapping[str, Load]) -> int:
    load = loads.get(replica.uid)
    return 0 if load is None else load.waiting + load.running


def _young_first(crew: Iterable[Replica]) -> list[Replica]:
    return sorted(crew, key=lambda one: (one.created, one.name), reverse=True)


def _names(crew: Iterable[Replica]) -> tuple[str, ...]:
    return tuple(one.name for one in crew)
