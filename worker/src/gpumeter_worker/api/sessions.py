"""The sessions of this worker: who waits for which tokens, and which ids were used.

Owns the line of tokens from the engine to a session's response. Does not know what a token costs.
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from gpumeter_usage.record import Status
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.engine.messages import Token
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.running import Totals

_REMEMBERED = 100_000
"""Ended ids are remembered, so that a hop token that is sent twice is not metered as one session."""


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended and what it used; final, and the same for all its choices."""

    status: Status
    totals: Totals
    message: str = ""
    cut_off: Refused | None = None
    """What the client is told where it was cancelled for a reason of its own."""


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a session: one of several answers to a prompt, or the answer to one of several prompts."""

    prompt: list[int]
    sampling: Sampling
    counts_prompt: bool = True
    outcome: Status | None = None
    """What the API process decided when it took the choice back: finished (a stop string), cancelled or failed."""
    finish: Finish | None = None
    message: str = ""
    """Why it failed, where it did."""
    last_token_ns: int = 0


LINE_ENTRIES_MAX = 2**16
"""What may wait for one session's client. A token is one entry, and each of its likeliest ones that were asked for is
one more: about 10 MB. A client that reads slowly may fall so far behind an engine that never waits for it."""


class Finished(NamedTuple):
    """A choice got its last token; the session's usage is final only when all have."""

    choice: int
    finish: Finish


class Line(asyncio.Queue["Token | Finished"]):
    """From the engine to a session's response; knows how much lies in it."""

    entries = 0

    def _put(self, item: Token | Finished) -> None:
        self.entries += entries(item)
        super()._put(item)

    def _get(self) -> Token | Finished:
        item = super()._get()
        self.entries -= entries(item)
        return item


def entries(item: Token | Finished) -> int:
    """How much it takes to keep this."""
    return 1 + len(item.top) if isinstance(item, Token) else 1


@dataclass(slots=True, eq=False)
class Session:
    """One request in flight."""

    session_id: str
    tenant: str
    choices: list[Choice]
    line: Line = field(default_factory=Line)
    """One for all choices: what comes is written in the order in which it came."""
    begun_ns: int = field(default_factory=time.monotonic_ns)
    stepped: bool = False
    cut_off: Refused | None = None
    """Why it was stopped, where its own client is the reason."""
    end: End | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Sessions:
    """Every session in flight, by id."""

    def __init__(self) -> None:
        self._in_flight: dict[str, Session] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self.emptied = asyncio.Event()
        self.emptied.set()

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def sequences(self) -> int:
        """How many sequences of theirs have not ended."""
        return sum(choice.finish is None for session in self._in_flight.values() for choice in session.choices)

    @property
    def waiting(self) -> int:
        """Sessions that no step has held yet."""
        return sum(not session.stepped for session in self._in_flight.values())

    def known(self, session_id: str) -> bool:
        """Whether this id is or was in use here."""
        return session_id in self._in_flight or session_id in self._used

    def add(self, session: Session) -> None:
        """A session was admitted."""
        self._in_flight[session.session_id] = session
        self.emptied.clear()

    def get(self, session_id: str) -> Session | None:
        """A session in flight."""
        return self._in_flight.get(session_id)

    def all(self) -> list[Session]:
        """Those in flight, oldest first."""
        return list(self._in_flight.values())

    def finish(self, session: Session, end: End) -> None:
        """The session's usage is final; its response is told."""
        del self._in_flight[session.session_id]
        self._used[session.session_id] = None
        if len(self._used) > _REMEMBERED:
            self._used.popitem(last=False)
        session.end = end
        session.over.set()
        if not self._in_flight:
            self.emptied.set()
