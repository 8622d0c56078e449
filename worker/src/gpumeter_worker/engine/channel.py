"""One end of the channel between the API process and the engine process: whole messages over a socket, both ways.

Owns how a message becomes bytes. Does not know what a message means, nor how many may wait: a full socket makes the
sender wait, and who may wait for whom is the affair of the two ends (engine.link, engine.process).

A step's report is the message that is sent all day, from the thread that launches steps. Pickled as it is, one of 64
sequences costs 126 us; as rows of plain values, 29 us (and 55 us to read, in a thread of the API process). And most
are of the sequences of the report before, which the other end has: of those, only how far they are on is sent.
"""

import copyreg
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, Generic, TypeVar

from gpumeter_worker.engine.messages import StepReport, Token
from gpumeter_worker.metering.parts import Onward, Part

Out = TypeVar("Out")
In = TypeVar("In")

_PROTOCOL = 5


class Channel(Generic[Out, In]):
    """Sends messages of one type and receives those of another. One thread may send while another receives."""

    def __init__(self, file_descriptor: int) -> None:
        """Takes over one end of a connected pair of stream sockets."""
        self._connection: Connection[bytes, bytes] = Connection(file_descriptor)
        self._sent, self._received = Known(), Known()

    def send(self, message: Out) -> None:
        """Wait until the socket has taken all of it. Raises OSError when the other end is gone."""
        self._connection.send_bytes(encode(self._sent.short(message)))

    def receive(self) -> In:
        """Wait for the next message. Raises EOFError or OSError when the other end is gone, even in a message."""
        message: In = self._received.whole(decode(self._connection.recv_bytes()))
        return message

    def poll(self, timeout_s: float | None) -> bool:
        """Whether a message, or the end, can be received; waits for it, without end where the timeout is None."""
        return self._connection.poll(timeout_s)

    def close(self) -> None:
        """Give the socket back. No thread may be using it."""
        self._connection.close()


class Known:
    """The parts that both ends know, of the last report that had rows. One end shortens by it, the other completes."""

    def __init__(self) -> None:
        self._parts: tuple[Part, ...] = ()

    def short(self, message: object) -> object:
        """Lists of events without the rows that the other end has; anything else as it is."""
        return [self._shortened(event) for event in message] if isinstance(message, list) else message

    def whole(self, message: Any) -> Any:
        """What `short` was given at the other end."""
        return [self._completed(event) for event in message] if isinstance(message, list) else message

    def _shortened(self, event: object) -> object:
        if not isinstance(event, StepReport):
            return event
        parts = event.parts
        if isinstance(parts, Onward) and parts.first is self._parts:
            return replace(event, parts=Onward((), parts.further))
        self._parts = parts.first if isinstance(parts, Onward) else parts
        return event

    def _completed(self, event: object) -> object:
        if not isinstance(event, StepReport):
            return event
        parts = event.parts
        if isinstance(parts, Onward) and not parts.first:
            return replace(event, parts=Onward(self._parts, parts.further))
        self._parts = parts.first if isinstance(parts, Onward) else parts
        return event


def encode(message: object) -> bytes:
    """A message's bytes. Both ends are the same program, so nothing here has to be stable."""
    return pickle.dumps(message, _PROTOCOL)


def decode(body: bytes) -> Any:
    """What `encode` was given."""
    return pickle.loads(body)  # noqa: S301 - both ends are one program, over a socket that nobody else holds


_PLAIN = tuple(one.name for one in fields(StepReport) if one.name not in {"parts", "tokens"})
_plain_of = attrgetter(*_PLAIN)


def _rows(report: StepReport) -> tuple[Callable[..., StepReport], tuple[Any, ...]]:
    further = report.parts.further if isinstance(report.parts, Onward) else None
    parts = report.parts.first if isinstance(report.parts, Onward) else report.parts
    return _report, (
        _plain_of(report),
        further,
        [tuple(part) for part in parts],
        [tuple(one) for one in report.tokens],
    )


def _report(plain: tuple[Any, ...], further: int | None, parts: list[Any], tokens: list[Any]) -> StepReport:
    rows = tuple(map(Part._make, parts))
    return StepReport(
        parts=rows if further is None else Onward(rows, further),
        tokens=tuple(map(Token._make, tokens)),
        **dict(zip(_PLAIN, plain, strict=True)),
    )


copyreg.pickle(StepReport, _rows)
