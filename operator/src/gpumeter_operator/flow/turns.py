"""Whose turn it is to be asked, fair between thousands of workers.

Owns the queue and the back-off: every worker is in the queue once, has one turn at a time, goes to the end of the queue
when its turn was not enough, and rests for a while after it did not answer. Asks nobody and reads no clock.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from gpumeter_operator.adapters.workers import Target
from gpumeter_operator.billing.facts import Worker
from gpumeter_usage.period import SECOND_NS

REST_MAX_NS = 30 * SECOND_NS
"""The longest rest of a worker that does not answer: half of a worker's usual lease, so that one that comes back is
acknowledged before it stops admitting."""


class Outcome(Enum):
    """How a turn ended."""

    DONE = auto()  # everything that the journal held is committed
    MORE = auto()  # there is more, and it was long enough for now
    TROUBLE = auto()  # it answered, and something was wrong with what it said, or with the ledger
    SILENT = auto()  # it did not answer


@dataclass(frozen=True, slots=True)
class Silence:
    """A worker that did not answer: since when, how often in a row, and when it is asked again."""

    worker: Worker
    since_ns: int
    times: int
    ask_at_ns: int


class Turns:
    """The queue of all workers that are to be asked."""

    def __init__(self) -> None:
        self._offered: dict[str, tuple[Worker, Target]] = {}
        self._queue: deque[str] = deque()
        self._out: set[str] = set()
        self._silent: dict[str, Silence] = {}

    def __len__(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @property
    def silent(self) -> Mapping[str, Silence]:
        """By uid, the workers that did not answer when they were asked last."""
        return self._silent

    def offer(self, fleet: Iterable[tuple[Worker, Target]], now_ns: int, urgent: Collection[str] = ()) -> None:
        """Queue every worker that is not queued, not out and not resting. `urgent` uids go first and do not rest: a
        pod that terminates waits for its acknowledgement with a deadline."""
        for worker, target in fleet:
            uid = worker.worker_uid
            if uid in self._offered:
                continue
            if uid in urgent:
                self._queue.appendleft(uid)
            elif self._rests(uid, now_ns):
                continue
            else:
                self._queue.append(uid)
            self._offered[uid] = (worker, target)

    def next(self) -> tuple[Worker, Target] | None:
        """The worker whose turn begins; None where nobody waits."""
        if not self._queue:
            return None
        uid = self._queue.popleft()
        self._out.add(uid)
        return self._offered[uid]

    def ended(self, uid: str, outcome: Outcome, now_ns: int) -> None:
        """A turn is over: whoever has more goes to the end of the queue, all others leave it."""
        self._out.discard(uid)
        worker, _ = self._offered[uid]
        if outcome is Outcome.MORE:
            self._queue.append(uid)
        else:
            del self._offered[uid]
        if outcome is Outcome.SILENT:
            self._silent[uid] = _silence(worker, self._silent.get(uid), now_ns)
        else:
            self._silent.pop(uid, None)

    def forget(self, uid: str) -> None:
        """A worker is gone; its silence is nobody's concern any more."""
        self._silent.pop(uid, None)

    def drop(self) -> None:
        """Forget who waits; whoever has a turn keeps it."""
        self._queue.clear()
        self._offered = {uid: offered for uid, offered in self._offered.items() if uid in self._out}

    def _rests(self, uid: str, now_ns: int) -> bool:
        silence = self._silent.get(uid)
        # A wall clock that was set back must not silence a worker for as long as it went back.
        return silence is not None and 0 < silence.ask_at_ns - now_ns <= REST_MAX_NS


def _silence(worker: Worker, before: Silence | None, now_ns: int) -> Silence:
    """The first silence costs no rest: most are a worker that starts, or one lost packet."""
    times = before.times + 1 if before else 1
    rest_ns = min(REST_MAX_NS, 2**times * SECOND_NS) if times > 1 else 0
    return Silence(worker, before.since_ns if before else now_ns, times, now_ns + rest_ns)
