"""Chat completions and completions in OpenAI's shapes, whole or as server-sent events.

Owns what is written for the pieces of an answer. Does not know where they come from, nor how a session is metered.
"""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpumeter_usage.hop import SESSION_HEADER
from gpumeter_worker.api.answer import Answer, Piece, failure, send_whole, taken, while_connected, with_usage
from gpumeter_worker.api.compact import to_json
from gpumeter_worker.api.keeping import in_pieces
from gpumeter_worker.api.logprobs import Placed, chat_logprobs, completion_logprobs
from gpumeter_worker.api.sessions import entries


@dataclass(frozen=True, slots=True)
class Shape:
    """How one of OpenAI's routes writes its objects."""

    prefix: str
    whole: str
    chunk: str
    chat: bool

    def choice(self, index: int, text: str, logprobs: bytes, finish_reason: str) -> bytes:
        """A choice of a whole answer; `logprobs` is JSON."""
        body: dict[str, Any] = {"text": text}
        if self.chat:
            body = {"message": {"role": "assistant", "content": text, "refusal": None}}
        before, after = to_json({"index": index, **body}), to_json({"finish_reason": finish_reason})
        return b"".join((before[:-1], b',"logprobs":', logprobs, b",", after[1:]))

    def delta(self, text: str) -> str:
        """What a chunk says, as JSON."""
        written = encode_basestring(text)
        return f'"delta":{{"content":{written}}}' if self.chat else f'"text":{written}'


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", chat=False)
_ROLE = '"delta":{"role":"assistant","content":""}'


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of an answer is written, and how."""

    shape: Shape
    model: str
    logprobs: bool
    include_usage: bool

    def head(self, kind: str, session_id: str) -> dict[str, Any]:
        """What every object of an answer begins with."""
        return {
            "id": f"{self.shape.prefix}-{session_id.removeprefix('s-')}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def written_logprobs(self, answer: Answer, placed: Sequence[Placed]) -> dict[str, Any] | None:
        """The member `logprobs` of a chunk's choice."""
        if not self.logprobs:
            return None
        return self._logprobs(answer, placed)

    async def whole_logprobs(self, answer: Answer, placed: Sequence[Placed]) -> bytes:
        """The member `logprobs` of a whole answer's choice, as JSON."""
        return await in_pieces(partial(self._logprobs, answer), placed) if self.logprobs else b"null"

    def _logprobs(self, answer: Answer, placed: Sequence[Placed]) -> dict[str, Any]:
        return (chat_logprobs if self.shape.chat else completion_logprobs)(placed, answer.tokenizer.token)


class WholeAnswer(Response):
    """One JSON object, when the session has ended."""

    def __init__(self, answer: Answer, wanted: Wanted) -> None:
        super().__init__(media_type="application/json", headers={SESSION_HEADER: answer.session.session_id})
        self._answer = answer
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves first."""
        await while_connected(self._respond(send), receive, self._answer)

    async def _respond(self, send: Send) -> None:
        answer, wanted = self._answer, self._wanted
        texts: list[list[str]] = [[] for _ in answer.texts]
        placed: list[list[Placed]] = [[] for _ in answer.texts]
        reasons = ["stop" for _ in answer.texts]
        kept = 0
        async for pieces in answer.pieces():
            for piece in pieces:
                texts[piece.choice].append(piece.text)
                placed[piece.choice] += piece.placed
                kept += sum(entries(token) for token, _ in piece.placed)
                reasons[piece.choice] = piece.finish_reason or reasons[piece.choice]
            answer.keep(kept)
        end = answer.end
        failed = failure(end)
        if failed:
            status, body = failed[0], with_usage(failed[1], end.totals)
        else:
            choices = []
            for index, text in enumerate(texts):
                logprobs = await wanted.whole_logprobs(answer, placed[index])
                choices.append(wanted.shape.choice(index, "".join(text), logprobs, reasons[index]))
            head = to_json(wanted.head(wanted.shape.whole, answer.session.session_id))
            document = b"".join((head[:-1], b',"choices":[', b",".join(choices), b"]}"))
            status, body = 200, with_usage(document, end.totals)
        await send_whole(send, answer.session, status, body)


class EventStream(Response):
    """Server-sent events: a chunk for every piece of text, the reason for each end, the usage if asked for."""

    def __init__(self, answer: Answer, wanted: Wanted) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                SESSION_HEADER: answer.session.session_id,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            },
        )
        self._answer = answer
        self._wanted = wanted
        # Written once: a chunk's own part is short, and there is one for every token.
        self._head = wanted.head(wanted.shape.chunk, answer.session.session_id)
        self._before = to_json(self._head).decode()[:-1] + ',"choices":[{"index":'
        self._after = "}]" + (',"usage":null}' if wanted.include_usage else "}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream, until the client leaves."""
        await while_connected(self._stream(send), receive, self._answer)

    async def _stream(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for events in self._events():
            await taken(send({"type": "http.response.body", "body": events, "more_body": True}))
        await taken(send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}))

    async def _events(self) -> AsyncIterator[bytes]:
        answer, shape = self._answer, self._wanted.shape
        if shape.chat:
            yield "".join(self._chunk(index, _ROLE, None, None) for index in range(len(answer.texts))).encode()
        async for pieces in answer.pieces():
            yield "".join(map(self._written, pieces)).encode()
        if failed := failure(answer.end):
            yield b"data: " + with_usage(failed[1], answer.end.totals) + b"\n\n"
        elif self._wanted.include_usage:
            yield b"data: " + with_usage({**self._head, "choices": []}, answer.end.totals) + b"\n\n"

    def _written(self, piece: Piece) -> str:
        shape, logprobs = self._wanted.shape, self._wanted.written_logprobs(self._answer, piece.placed)
        events = ""
        if piece.text or piece.placed:
            events = self._chunk(piece.choice, shape.delta(piece.text), logprobs, None)
        if piece.finish_reason:
            nothing = '"delta":{}' if shape.chat else '"text":""'
            events += self._chunk(piece.choice, nothing, None, piece.finish_reason)
        return events

    def _chunk(self, index: int, says: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> str:
        written = "null" if logprobs is None else to_json(logprobs).decode()
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return f'data: {self._before}{index},{says},"logprobs":{written},"finish_reason":{reason}{self._after}\n\n'
