"""Log probabilities of answers that are written when they are whole: how many are kept, and how they become JSON.

Owns the bounds, of one answer and of all together, and writing so much at a time that streams go on beside it. Does not
know what a log probability looks like.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gpumeter_worker.api.compact import to_json
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.sessions import Session

Kept = TypeVar("Kept")

KEPT_ENTRIES_MAX = 2**18
"""Of one answer: about 50 MB. A stream keeps none."""

KEPT_BY_ALL_MAX = 2**20
"""Of all answers together: about 200 MB, and as much again while they are written."""

_AT_ONCE = 64
"""Tokens that are written before others get the event loop: with 20 likeliest ones each some milliseconds."""

_TOO_LARGE = Refused(
    400,
    "answer_too_large",
    f"the answer has more than {KEPT_ENTRIES_MAX} log probabilities and was cut off; set stream to true, or ask for "
    "fewer of them",
)
# Not 503, which clients' libraries send again by themselves: what it used is billed, and it is the memory that is full.
_TOO_MANY = Refused(
    400,
    "answers_too_large",
    f"the answers that this worker holds until they are whole have more than {KEPT_BY_ALL_MAX} log probabilities, and "
    "this one, the largest, was cut off; set stream to true, ask for fewer of them, or try again",
)


class Keeping:
    """How many log probabilities are kept of each answer; one for all sessions of a worker."""

    def __init__(self) -> None:
        self._kept: dict[Session, int] = {}
        self.entries = 0

    def keep(self, session: Session, count: int) -> list[tuple[Session, Refused]]:
        """Note that `count` are kept of a session now; returns who is to be cut off for it, and what to say.

        Who is cut off grows no further and counts no longer: what is kept of it is about to go.
        """
        if session.cut_off is not None:
            self.release(session)
            return []
        if count > KEPT_ENTRIES_MAX:
            self.release(session)
            return [(session, _TOO_LARGE)]
        self.entries += count - self._kept.get(session, 0)
        self._kept[session] = count
        cut = []
        while self.entries > KEPT_BY_ALL_MAX and (growing := [one for one in self._kept if one.end is None]):
            largest = max(growing, key=self._kept.__getitem__)
            self.release(largest)
            cut.append((largest, _TOO_MANY))
        return cut

    def release(self, session: Session) -> None:
        """Nothing is kept of it any more."""
        self.entries -= self._kept.pop(session, 0)


async def in_pieces(write: Callable[[Sequence[Kept]], dict[str, Any]], kept: Sequence[Kept]) -> bytes:
    """The JSON of `write(kept)`, written a few at a time.

    `write` gives the same members whatever it is given: lists with one item for each of what it gets, which are joined,
    and others, which are the same every time.
    """
    members: dict[str, list[bytes]] = {}
    lists: set[str] = set()
    for at in range(0, max(len(kept), 1), _AT_ONCE):
        for name, value in write(kept[at : at + _AT_ONCE]).items():
            members.setdefault(name, []).append(to_json(value))
            if isinstance(value, list):
                lists.add(name)
        await asyncio.sleep(0)
    written = []
    for name, values in members.items():
        whole = b"[" + b",".join(value[1:-1] for value in values) + b"]" if name in lists else values[0]
        written.append(to_json(name) + b":" + whole)
    return b"{" + b",".join(written) + b"}"
