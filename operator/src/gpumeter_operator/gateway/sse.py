"""Server-sent events in passing: where one ends, and whether a stream came to its end.

Owns the cut between whole events and the beginning of the next. Only whole events are passed on, so that an error event
can follow at any moment without landing inside another. Does not read what events say, except for the end.
"""

from dataclasses import dataclass

MAX_EVENT_BYTES = 1 << 20
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventTooLong(ValueError):
    """A worker sent an event that does not end."""


@dataclass(slots=True)
class EventCutter:
    """Cuts a stream of bytes behind its last whole event. Keeps at most the beginning of one event."""

    rest: bytes = b""
    ended: bool = False  # the worker said that the answer is complete, or why it is not

    def feed(self, chunk: bytes) -> bytes:
        """Take what arrived and give back what may be passed on now: usually all of it, without a copy."""
        data = self.rest + chunk if self.rest else chunk
        cut = max(data.rfind(end) + len(end) if end in data else 0 for end in _ENDS)
        whole, self.rest = (data, b"") if cut == len(data) else (data[:cut], data[cut:])
        if len(self.rest) > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
        if last := last_event(whole):
            self.ended = ends_the_answer(last)
        return whole


def last_event(events: bytes) -> bytes:
    """The last of these whole events that is not a comment (heartbeats are comments); empty when there is none."""
    lines = events.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    blocks = (block.strip(b"\n") for block in reversed(lines.split(b"\n\n")))
    return next((block for block in blocks if block and not block.startswith(b":")), b"")


def ends_the_answer(event: bytes) -> bool:
    """Whether this event is OpenAI's end of a stream, or an error."""
    return event in (b"data: [DONE]", b"data:[DONE]") or event.startswith(
        (b'data: {"error"', b'data:{"error"', b"event: error")
    )
