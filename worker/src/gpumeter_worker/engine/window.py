"""How long a step that could start now waits for company: the hybrid of time and count.

Owns the rule, not the clock: readings of a monotonic clock come in as arguments. Knows no channel and no engine.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Window:
    """From idle, the first step waits up to `max_wait_ns` after its first sequence, or until `sequences` are there.

    While the engine is busy a step starts at once: the next one takes along whoever has come in the meantime.
    """

    max_wait_ns: int
    sequences: int
    _from_idle: bool = field(default=False, init=False)
    _opened_ns: int | None = field(default=None, init=False)

    def patience_ns(self, now_ns: int, *, waiting: int, busy: bool) -> int | None:
        """How long to listen for commands before the next turn; None: until one comes, because there is nothing to do.

        `waiting` counts the sequences that the next step could take in; `busy`: there is anything else to do.
        """
        if busy or not waiting:
            self._from_idle, self._opened_ns = not busy, None
            return 0 if busy else None
        if not self._from_idle or waiting >= self.sequences:
            return 0
        if self._opened_ns is None:
            self._opened_ns = now_ns
        return max(0, self._opened_ns + self.max_wait_ns - now_ns)
