"""A service on a made-up clock: requests of a trace, workers that take time to start, a rule that sets their number.

Owns what a request costs and where it waits, and what is counted. A worker holds `batch` requests at a time and queues
the others in the order of their arrival; a request goes at once to the ready worker with the fewest, as the gateway
routes, and waits at the door while there is none. A worker that is to go gets nothing new and leaves when it is empty.
Knows no rule.
"""

import csv
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

PREFILL_TOKENS_PER_S = 10_000.0
TOKEN_S = 0.025
START_S = 60.0
BATCH = 4


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes, and how long it computes once it has a place in a batch."""

    at_s: float
    runs_s: float


def requests_of(path: Path) -> list[Request]:
    """The trace, from 0 s on: a prompt at 10,000 tokens a second, then 25 ms for each token."""
    found = []
    with path.open(newline="") as lines:
        for line in csv.DictReader(lines):
            when = datetime.fromisoformat(line["TIMESTAMP"].strip()[:26])
            runs_s = int(line["ContextTokens"]) / PREFILL_TOKENS_PER_S + int(line["GeneratedTokens"]) * TOKEN_S
            found.append((when, runs_s))
    found.sort()
    begun = found[0][0]
    return [Request((when - begun).total_seconds(), runs_s) for when, runs_s in found]


@dataclass(eq=False, slots=True)
class SimWorker:
    """One worker: ready from `ready_s` on; `busy_s` sums the time in which it computed anything."""

    made_s: float
    ready_s: float
    running: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    leaving: bool = False
    gone_s: float | None = None
    ended: int = 0


class SimService:
    """The state that a rule sees and changes."""

    def __init__(self, begin: int) -> None:
        self.now_s = 0.0
        self.workers = [SimWorker(0.0, 0.0) for _ in range(begin)]
        self.all_workers = list(self.workers)
        self.door: deque[Request] = deque()
        self.waits_s: list[float] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    @property
    def serving(self) -> list[SimWorker]:
        """Workers that are not on their way out, ready or not."""
        return [one for one in self.workers if not one.leaving]

    @property
    def ready(self) -> list[SimWorker]:
        """Those that get requests."""
        return [one for one in self.serving if one.ready_s <= self.now_s]

    def resize(self, wanted: int) -> None:
        """More workers are made, or taken back from leaving; of too many the emptiest leave."""
        serving = self.serving
        back = [one for one in self.workers if one.leaving][: max(0, wanted - len(serving))]
        for worker in back:
            worker.leaving = False
        for _ in range(wanted - len(serving) - len(back)):
            worker = SimWorker(self.now_s, self.now_s + START_S)
            self.workers.append(worker)
            self.all_workers.append(worker)
            self._at(worker.ready_s, self._empty_door)
        surplus = len(serving) - wanted
        if surplus > 0:
            by_loss = sorted(serving, key=lambda one: (one.ready_s <= self.now_s, one.running + len(one.waiting)))
            for worker in by_loss[:surplus]:
                worker.leaving = True
                self._leave_if_empty(worker)

    def run(self, requests: list[Request], rule: Callable[["SimService"], None], every_s: float) -> None:
        """Until every request has been computed; `rule` is asked every `every_s`."""
        for request in requests:
            self._at(request.at_s, lambda one=request: self._arrive(one))  # type: ignore[misc]
        end_s = requests[-1].at_s
        left = len(requests)

        def tick() -> None:
            rule(self)
            if self.now_s + every_s <= end_s:
                self._at(self.now_s + every_s, tick)

        self._at(0.0, tick)
        while self._events and (self.now_s < end_s or len(self.waits_s) < left):
            self.now_s, _, action = heapq.heappop(self._events)
            action()

    def gpu_hours(self, until_s: float) -> float:
        """One GPU for each worker, from the moment it was made until it left, or until `until_s`."""
        return sum((min(one.gone_s or until_s, until_s) - min(one.made_s, until_s)) for one in self.all_workers) / 3_600

    def _at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), action))

    def _arrive(self, request: Request) -> None:
        ready = self.ready
        if not ready:
            self.door.append(request)
            return
        worker = min(ready, key=lambda one: one.running + len(one.waiting))
        worker.waiting.append(request)
        self._fill(worker)

    def _empty_door(self) -> None:
        waiting, self.door = self.door, deque()
        for request in waiting:
            self._arrive(request)

    def _fill(self, worker: SimWorker) -> None:
        while worker.waiting and worker.running < BATCH:
            request = worker.waiting.popleft()
            worker.running += 1
            self.waits_s.append(self.now_s - request.at_s)
            self._at(self.now_s + request.runs_s, lambda: self._end(worker))

    def _end(self, worker: SimWorker) -> None:
        worker.running -= 1
        worker.ended += 1
        self._fill(worker)
        self._leave_if_empty(worker)

    def _leave_if_empty(self, worker: SimWorker) -> None:
        if worker.leaving and not worker.running and not worker.waiting and worker.gone_s is None:
            worker.gone_s = self.now_s
            self.workers.remove(worker)
