"""Who of those that wait goes first: a line for each tenant, and a counter of what each tenant was served.

Owns the lines and the counters. Knows no cache, no step and no clock. After "Fairness in Serving Large Language Models"
(Sheng and others, OSDI 2024): served tokens are counted, an output token as two; the tenant with the lowest counter
goes first, and who comes back after a pause starts from the lowest of those that stayed, so that nobody saves up.
Between two tenants that always wait the counters differ by a bounded number of tokens, however long they wait.
"""

from collections import OrderedDict
from collections.abc import Callable

from gpumeter_worker.engine.sequence import Sequence

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2

_REMEMBERED = 4096
"""Counters of tenants that are away and were ahead of the others; with more than this many the lowest are forgotten."""


class Lines:
    """The waiting sequences of every tenant. A tenant is present from its first sequence's `enter` to its last `exit`.

    Within a tenant, first come is first served; a preempted sequence stands in front again.
    """

    def __init__(self) -> None:
        self._lines: dict[str, OrderedDict[Sequence, None]] = {}
        self._present: dict[str, int] = {}
        self._served: dict[str, int] = {}
        self._waiting = 0
        self.waiting_tokens = 0
        """Tokens of all who wait: what is to be computed before they can go on."""

    def __len__(self) -> int:
        return self._waiting

    def served(self, tenant: str) -> int:
        """The tenant's counter."""
        return self._served[tenant]

    def enter(self, sequence: Sequence) -> None:
        """A new sequence waits at the end of its tenant's line."""
        tenant = sequence.tenant
        if tenant not in self._present:
            floor = min((self._served[one] for one in self._present), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
        self._present[tenant] = self._present.get(tenant, 0) + 1
        self._lines.setdefault(tenant, OrderedDict())[sequence] = None
        self._waiting += 1
        self.waiting_tokens += len(sequence.tokens)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran waits again, in front of its tenant's line."""
        line = self._lines.setdefault(sequence.tenant, OrderedDict())
        line[sequence] = None
        line.move_to_end(sequence, last=False)
        self._waiting += 1
        self.waiting_tokens += len(sequence.tokens)

    def take(self, sequence: Sequence) -> None:
        """It waits no longer: it runs, or was cancelled."""
        line = self._lines[sequence.tenant]
        del line[sequence]
        if not line:
            del self._lines[sequence.tenant]
        self._waiting -= 1
        self.waiting_tokens -= len(sequence.tokens)

    def exit(self, sequence: Sequence) -> None:
        """It has ended, and waits nowhere."""
        tenant = sequence.tenant
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._forget()

    def charge(self, tenant: str, weighted_tokens: int) -> None:
        """A tenant was served; a negative number gives back what it was not served after all."""
        self._served[tenant] += weighted_tokens

    def first(self, held: Callable[[Sequence], bool]) -> Sequence | None:
        """Who goes next, `held` ones left out: of the tenant that was served least the one that came first."""
        best: tuple[int, int] | None = None
        found = None
        for tenant, line in self._lines.items():
            served = self._served[tenant]
            if best is not None and served > best[0]:
                continue
            sequence = next((one for one in line if not held(one)), None)
            if sequence is not None and (best is None or (served, sequence.arrival) < best):
                best, found = (served, sequence.arrival), sequence
        return found

    def _forget(self) -> None:
        """Nobody is owed anything by an idle engine, and who is not ahead would be lifted to the others anyway."""
        if not self._present:
            self._served.clear()
        elif len(self._served) > len(self._present) + _REMEMBERED:
            away = sorted((served, one) for one, served in self._served.items() if one not in self._present)
            for _, tenant in away[: _REMEMBERED // 2]:
                del self._served[tenant]
