"""Which of several operators acts: the rule of the Lease that one of them holds.

Owns when a Lease may be taken, how long its holder may act, and what is written into it. Every time here is read from
the deciding process's own monotonic clock. The times inside a Lease are another machine's: they are written for people,
and read only to see that they have changed, so the clocks of two machines are never compared. That is the rule of
client-go's leaderelection (k8s.io/client-go/tools/leaderelection), with one difference: a holder counts from the moment
at which it sent a renewal, not from the answer, because whoever waits may have seen the renewal before the answer came.
Does not know how a Lease is read or written, nor what is done by whoever holds it.
"""

from dataclasses import dataclass

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Terms:
    """How long everything takes. All are measured by one process's clock.

    From a crash to a successor's first write 10 s may pass. The successor sees the last renewal up to `look_every_ns`
    late, waits `duration_s`, and needs a second or two to list the cluster: so 7 s. The holder stops 2 s earlier
    (`deadline_ns`): one clock may run that much faster than another (7/5, nearly client-go's 15/10), and a write that
    is on its way may take that long. In these 5 s a renewal is tried at least three times.
    """

    duration_s: int = 7
    deadline_ns: int = 5 * SECOND_NS
    renew_every_ns: int = 3 * SECOND_NS // 2
    retry_every_ns: int = SECOND_NS // 2  # after a renewal that failed
    look_every_ns: int = SECOND_NS // 2  # of who stands by: a Lease that was given back is seen this much later
    # After so long a renewal is sent once more beside the one that is not answered; who stands by gives a request no
    # longer. A healthy API server needs 10 ms, one that is busy with thousands of objects may need seconds.
    attempt_ns: int = 3 * SECOND_NS // 2

    def __post_init__(self) -> None:
        if not self.duration_s * SECOND_NS > self.deadline_ns > self.renew_every_ns + self.attempt_ns:
            raise ValueError(
                "a Lease must last longer than its holder acts, and a holder longer than one renewal takes"
            )


@dataclass(frozen=True, slots=True)
class Lease:
    """What the API server keeps: coordination.k8s.io/v1. `holder` is empty where nobody holds it.

    `acquired` and `renewed` are RFC 3339 with microseconds by the holder's clock, `version` is the resource version.
    """

    holder: str
    duration_s: int
    acquired: str
    renewed: str
    transitions: int
    version: str = ""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A Lease, and since when this process has seen it unchanged."""

    lease: Lease
    since_ns: int


def sight(before: Sighting | None, lease: Lease, now_ns: int) -> Sighting:
    """Take note of a Lease that was read; `now_ns` is after the answer. What others annotate changes nothing."""
    if before is not None and _content(before.lease) == _content(lease):
        return Sighting(lease, before.since_ns)
    return Sighting(lease, now_ns)


def free_at_ns(sighting: Sighting) -> int:
    """When the Lease may be taken: at once where nobody holds it, else when it was unchanged for its whole duration.

    The duration is the one that its holder wrote, which may be of another version with other terms.
    """
    lease = sighting.lease
    return sighting.since_ns + (lease.duration_s * SECOND_NS if lease.holder else 0)


def next_look_ns(sighting: Sighting | None, terms: Terms, now_ns: int) -> int:
    """When whoever stands by looks again: soon, and at the very moment at which the Lease becomes free."""
    soon_ns = now_ns + terms.look_every_ns
    if sighting is None or free_at_ns(sighting) <= now_ns:
        return soon_ns  # it was free just now, and somebody else was faster
    return min(soon_ns, free_at_ns(sighting))


def claim(former: Lease | None, me: str, terms: Terms, stamp: str) -> Lease:
    """What is written by who takes the Lease, or renews its own. `stamp` is this machine's time, for people."""
    if former is not None and former.holder == me:
        return Lease(me, terms.duration_s, former.acquired or stamp, stamp, former.transitions, former.version)
    if former is None:
        return Lease(me, terms.duration_s, stamp, stamp, 0)
    return Lease(me, terms.duration_s, stamp, stamp, former.transitions + 1, former.version)


def given_back(lease: Lease, stamp: str) -> Lease:
    """What a holder writes that has stopped acting: the next one need not wait. A Lease lasts at least a second."""
    return Lease("", 1, lease.acquired or stamp, stamp, lease.transitions, lease.version)


def may_act_until_ns(sent_ns: int, terms: Terms) -> int:
    """Until when a holder may act whose renewal, sent at `sent_ns`, was accepted."""
    return sent_ns + terms.deadline_ns


def renew_at_ns(sent_ns: int, failed_ns: int | None, terms: Terms) -> int:
    """When to renew: a while after the last success (sent at `sent_ns`), sooner after a failure since."""
    return sent_ns + terms.renew_every_ns if failed_ns is None else failed_ns + terms.retry_every_ns


def _content(lease: Lease) -> tuple[str, int, str, str, int]:
    return lease.holder, lease.duration_s, lease.acquired, lease.renewed, lease.transitions
