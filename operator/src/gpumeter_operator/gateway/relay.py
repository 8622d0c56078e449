"""From gateway to worker: sends a request to an endpoint and brings the answer back.

Owns the pooled connections to workers and the translation of the HTTP client's errors and of the worker's refusals.
Which endpoint, and whether a second attempt is made, routing decides. Does not know who the client is.
"""

import io
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp

from gpumeter_operator.gateway.endpoints import Endpoint
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.routing import Failure
from gpumeter_operator.gateway.sse import EventCutter, EventTooLong

# Far below the 75 seconds after which a worker closes an idle connection: a closing connection must not get a request,
# because nobody can tell whether one that broke on it was begun, and such a request is never sent twice.
_KEEP_IDLE_S = 4.0
_LARGE_BODY_BYTES = 1 << 20
_PLAIN_BYTES_MAX = 64 << 20  # a plain answer is read whole, so that it is never passed on cut off
# A worker whose node died says nothing ever again, and a plain answer may take minutes: only TCP itself can tell these
# apart. Ten seconds of silence, then three probes at five seconds; the same for what was sent and never acknowledged.
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(frozen=True, slots=True)
class Errand:
    """One request to a service, ready to be sent to any of its workers."""

    service: str
    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class Answer:
    """A worker's answer whose body has not been read. `sent_at_s` is in monotonic seconds."""

    response: aiohttp.ClientResponse
    sent_at_s: float

    @property
    def is_stream(self) -> bool:
        """Whether it comes as server-sent events."""
        return self.response.content_type == "text/event-stream"

    @property
    def may_be_a_refusal(self) -> bool:
        """Whether the worker may not have begun the request; its body, which is short then, tells."""
        return self.response.status in (401, 429, 503) and not self.is_stream

    def refused(self, whole: bytes) -> Failure | None:
        """How the worker refused to begin; None where this is its answer, and goes to the client as it is."""
        match self.response.status, _code(whole):
            case 401, _:
                return Failure.HOP_REFUSED  # the client's own key was right: this is between gateway and worker
            case 429, "queue_full":
                return Failure.FULL
            case 503, code if code != "cut_off" and "Retry-After" in self.response.headers:
                return Failure.UNAVAILABLE  # one that is cut off had begun, and is metered
        return None

    async def whole(self) -> bytes:
        """All of a plain answer. Raises Refusal when it breaks off."""
        try:
            parts = bytearray()
            async for part in self.response.content.iter_any():
                parts += part
                if len(parts) > _PLAIN_BYTES_MAX:
                    raise Refusal(502, "worker_broken", f"The worker's answer exceeds {_PLAIN_BYTES_MAX} bytes.")
        except _BROKEN as error:
            raise _broke_off(error) from None
        return bytes(parts)

    async def events(self) -> AsyncIterator[bytes]:
        """A stream's whole events as they come. Raises Refusal when it breaks off or ends without its end."""
        cutter = EventCutter()
        try:
            async for chunk in self.response.content.iter_any():
                if whole := cutter.feed(chunk):
                    yield whole
        except EventTooLong as error:
            raise Refusal(502, "worker_broken", f"The worker sent {error}.") from None
        except _BROKEN as error:
            raise _broke_off(error) from None
        if not cutter.ended:
            raise _broke_off(None)


class Relay:
    """The connections to all workers."""

    def __init__(self, *, connect_timeout_s: float, silence_timeout_s: float) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_note_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_IDLE_S, socket_factory=_probed
            ),  # in_flight_max is the limit
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=silence_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trace_configs=[trace],
        )
        self._open: set[aiohttp.ClientResponse] = set()

    @asynccontextmanager
    async def send(self, errand: Errand, endpoint: Endpoint) -> AsyncIterator[Answer | Failure]:
        """Send to one endpoint. Gives its answer, or how the attempt failed before there was one.

        Leaving the context before the answer is read closes the connection, by which the worker learns that nobody
        waits any more. Raises Refusal for what no other attempt could mend.
        """
        answer = await self._attempt(errand, endpoint)
        if not isinstance(answer, Answer):
            yield answer
            return
        self._open.add(answer.response)
        try:
            yield answer
        finally:
            self._open.discard(answer.response)
            answer.response.close()  # goes back to the pool by itself when it was read to its end

    def cut_off(self) -> None:
        """Break every answer that is still being read, so that its client gets an error instead of silence."""
        for response in tuple(self._open):
            response.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _attempt(self, errand: Errand, endpoint: Endpoint) -> Answer | Failure:
        notes = SimpleNamespace(sent_at_s=time.monotonic())
        try:
            response = await self._session.post(
                endpoint.origin + errand.path,
                # A large body as a file goes out in pieces; as bytes it would hold up everybody else's.
                data=errand.body if len(errand.body) < _LARGE_BODY_BYTES else io.BytesIO(errand.body),
                headers=errand.headers,
                allow_redirects=False,  # a redirect would carry the token to another address
                trace_request_ctx=notes,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Failure.NOT_CONNECTED
        except TimeoutError:
            raise Refusal(504, "worker_timeout", f"The worker of {errand.service} did not answer in time.") from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return Failure.LOST
        except aiohttp.ClientError as error:
            message = f"The worker of {errand.service} does not speak HTTP as expected ({type(error).__name__})."
            raise Refusal(502, "worker_broken", message) from None
        return Answer(response, notes.sent_at_s)


def _probed(address: tuple[Any, ...]) -> socket.socket:
    """A socket on which the kernel asks whether the other side is still there."""
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


async def _note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.sent_at_s = time.monotonic()


def _code(body: bytes) -> str:
    """The code of OpenAI's error shape; empty where there is none."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _broke_off(error: Exception | None) -> Refusal:
    if isinstance(error, TimeoutError):
        return Refusal(504, "worker_timeout", "The worker went silent in the middle of its answer.")
    return Refusal(
        502, "worker_lost", "The worker stopped in the middle of its answer; what it had computed is metered."
    )
