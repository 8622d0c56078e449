"""Answers in OpenAI's shapes, whole or as server-sent events, while the client is still there.

Owns what is written for tokens as they come, and the exact GPU seconds of a session. A client that goes away takes its
session back from the engine at once. Does not know how a session is metered.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpumeter_usage.hop import SESSION_HEADER
from gpumeter_usage.record import Status
from gpumeter_worker.api.errors import error_document
from gpumeter_worker.api.sessions import End, Session
from gpumeter_worker.api.text import TextStream
from gpumeter_worker.engine.messages import Token
from gpumeter_worker.engine.sequence import Finish
from gpumeter_worker.metering.meter import Totals
from gpumeter_worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Shape:
    """How one of OpenAI's routes writes its objects."""

    prefix: str
    whole: str
    chunk: str
    chat: bool

    def choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """The only choice of a whole answer."""
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **body, "logprobs": None, "finish_reason": finish_reason}

    def delta(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        """The only choice of a chunk."""
        body: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": 0, **body, "logprobs": None, "finish_reason": finish_reason}


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", chat=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """A session whose tokens are to be written."""

    worker: Worker
    session: Session
    text: TextStream
    shape: Shape
    model: str
    include_usage: bool

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": f"{self.shape.prefix}-{self.session.session_id.removeprefix('s-')}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }


class WholeAnswer(Response):
    """One JSON object, when the session has ended."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(media_type="application/json", headers={SESSION_HEADER: answer.session.session_id})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves first."""
        await _while_connected(self._respond(scope, receive, send), receive, self._answer)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        text = "".join([piece async for piece in _pieces(answer)])
        end = _end(answer.session)
        headers = {SESSION_HEADER: answer.session.session_id}
        if _went_wrong(end):
            status, document = _failure(end)
            body = _with_usage(document, end.totals)
            await Response(body, status, headers, "application/json")(scope, receive, send)
            return
        document = answer.head(answer.shape.whole)
        document["choices"] = [answer.shape.choice(text, _finish_reason(answer))]
        await Response(_with_usage(document, end.totals), 200, headers, "application/json")(scope, receive, send)


class EventStream(Response):
    """Server-sent events: a chunk for every piece of text, the reason for the end, the usage if asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                SESSION_HEADER: answer.session.session_id,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            },
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream, until the client leaves."""
        await _while_connected(self._stream(send), receive, self._answer)

    async def _stream(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events():
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._answer
        if answer.shape.chat:
            yield self._chunk({"role": "assistant", "content": ""}, None)
        async for piece in _pieces(answer):
            yield self._chunk({"content": piece}, None)
        end = _end(answer.session)
        if _went_wrong(end):
            yield _with_usage(_failure(end)[1], end.totals)
            return
        yield self._chunk({}, _finish_reason(answer))
        if answer.include_usage:
            document = answer.head(answer.shape.chunk)
            document["choices"] = []
            yield _with_usage(document, end.totals)

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> bytes:
        answer = self._answer
        document = answer.head(answer.shape.chunk)
        document["choices"] = [answer.shape.delta(delta, finish_reason)]
        if answer.include_usage:
            document["usage"] = None
        return _json(document)


def gpu_seconds(gpu_ns: int) -> str:
    """Nanoseconds as a JSON number of seconds with nine decimals: exact, no float is involved."""
    return f"{gpu_ns // 10**9}.{gpu_ns % 10**9:09d}"


def _with_usage(document: dict[str, Any], totals: Totals) -> bytes:
    """The document with `usage` as its last member, written by hand because json would make gpu_seconds a float."""
    usage = {
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": totals.cached_tokens},
    }
    numbers = _json(usage)[:-1] + b',"gpu_seconds":' + gpu_seconds(totals.gpu_ns).encode() + b"}"
    return _json(document)[:-1] + b',"usage":' + numbers + b"}"


async def _pieces(answer: Answer) -> AsyncIterator[str]:
    """Text as it becomes certain, until the session's usage is final."""
    session, text = answer.session, answer.text
    while isinstance(item := await session.choices[0].line.get(), Token):
        piece = text.push(item.token)
        if piece:
            yield piece
        if text.stopped:
            answer.worker.take_back(session, Status.FINISHED)
    await session.over.wait()
    if rest := text.finish():
        yield rest


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive, answer: Answer) -> None:
    """Do the work while the client is there; whatever happens, the engine works for nobody who left."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        answer.worker.take_back(answer.session, Status.CANCELLED)
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled() and (error := working.exception()) is not None:
        raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _end(session: Session) -> End:
    if session.end is None:
        raise RuntimeError("a session's line closed before its end was known")
    return session.end


def _went_wrong(end: End) -> bool:
    return end.status is not Status.FINISHED


def _failure(end: End) -> tuple[int, dict[str, Any]]:
    if end.status is Status.CANCELLED:
        return 503, error_document(503, "cut_off", "the worker is stopping and cut this request off; send it again")
    return 500, error_document(500, "engine_failed", f"{end.message}; send the request again")


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.session.choices[0].finish is Finish.LENGTH and not answer.text.stopped else "stop"


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
