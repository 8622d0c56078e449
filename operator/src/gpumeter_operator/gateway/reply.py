"""What the client of one request gets: a worker's answer, heartbeats while it waits for one, or an error.

Owns the client's side of the connection from the first byte on: once a heartbeat has been sent, the status line has
gone, and whatever follows, errors too, is an event of the stream. Does not know where an answer comes from.
"""

import asyncio
import json
from collections.abc import Mapping

from aiohttp import web

from gpumeter_operator.gateway import hop, refusal
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.relay import Answer

# A comment of the event stream: every SSE reader passes over it, OpenAI's clients among them.
HEARTBEAT = b": waiting for a worker\n\n"
_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Reply:
    """The answer to one request, as far as it has gone."""

    def __init__(
        self, request: web.Request, headers: Mapping[str, str], *, stream: bool, write_timeout_s: float
    ) -> None:
        self._request = request
        self._headers = headers
        self._stream = stream
        self._write_timeout_s = write_timeout_s
        self._response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        """Whether the status line has been sent."""
        return self._response is not None

    async def beat(self) -> None:
        """Say that the request still waits, where the client asked for a stream; else its connection just stays."""
        if not self._stream:
            return
        await self._write(await self._begin(200, _STREAM), HEARTBEAT)

    async def pass_on(self, answer: Answer, read: bytes | None) -> web.StreamResponse:
        """A worker's answer, `read` where that was done already. Raises Refusal when a plain one breaks off."""
        if self.begun and not (answer.is_stream and answer.response.status == 200):
            return await self.end_with(_as_event(answer, await answer.whole() if read is None else read))
        headers = hop.headers_to_client(answer.response.headers)
        if not answer.is_stream:
            whole = await answer.whole() if read is None else read
            return web.Response(status=answer.response.status, body=whole, headers={**headers, **self._headers})
        response = await self._begin(answer.response.status, headers)
        async for events in answer.events():
            await self._write(response, events)
        await response.write_eof()
        return response

    async def end_with(self, event: bytes) -> web.StreamResponse:
        """End a stream that has begun with this event."""
        if self._response is None:
            raise RuntimeError("an answer that has not begun has a status, and needs no event")
        await self._write(self._response, event)
        await self._response.write_eof()
        return self._response

    async def _begin(self, status: int, headers: Mapping[str, str]) -> web.StreamResponse:
        if self._response is None:
            response = web.StreamResponse(status=status, headers={**headers, **self._headers})
            await response.prepare(self._request)
            self._response = response
        return self._response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None


def _as_event(answer: Answer, body: bytes) -> bytes:
    """A worker's plain answer to a request whose stream has begun: its error, as an event."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if isinstance(document, dict) and "error" in document:
        return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"
    message = f"The worker answered with status {answer.response.status} and no stream."
    return refusal.event(Refusal(502, "worker_broken", message))
