"""A session's answer as it comes: text and log probabilities of every choice, in the order in which they come.

Owns what of a token's text is said when, why a choice ended, and that the engine works for nobody who left. Does not
know how an answer is written.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.types import Receive, Send

from gpumeter_usage.hop import SESSION_HEADER
from gpumeter_usage.record import Status
from gpumeter_worker.api.compact import to_json
from gpumeter_worker.api.desk import Clerk
from gpumeter_worker.api.errors import error_document
from gpumeter_worker.api.logprobs import Placed
from gpumeter_worker.api.sessions import Choice, End, Finished, Session, entries
from gpumeter_worker.api.text import TextStream
from gpumeter_worker.api.tokenizer import Tokenizer
from gpumeter_worker.engine.messages import Token
from gpumeter_worker.engine.sequence import Finish
from gpumeter_worker.metering.running import Totals

log = logging.getLogger(__name__)

_BURST = 256
"""How many tokens are written at once when they have piled up; others want the event loop, too."""


_PIECE_BYTES = 2**16
_TAKEN_S = 60.0
"""How long a client may take nothing of what is written to it."""


class Piece(NamedTuple):
    """Something certain of one choice. `finish_reason` comes with its last piece: stop or length."""

    choice: int
    text: str
    placed: list[Placed]
    finish_reason: str | None


class ChoiceText:
    """The text of one choice so far. `tokens` are all that it got, where log probabilities were asked for and whoever
    writes it `keeps` them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        choice: Choice,
        stops: tuple[str, ...],
        eos_ids: frozenset[int],
        *,
        keeps: bool = False,
    ) -> None:
        self._text = TextStream(tokenizer.decode, choice.prompt, stops)
        sampling = choice.sampling
        self._endings = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self._placed: deque[Placed] | None = None if sampling.logprobs is None else deque()
        self._keeps = keeps
        self.tokens: list[Token] = []
        self.kept = 0
        """How much it takes to keep them, in entries."""
        self.count = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._text.stopped

    def push(self, token: Token) -> tuple[str, list[Placed]]:
        """What is certain now. The token that ends a sequence is no text."""
        self.count += 1
        if self._placed is None:
            return ("" if token.token in self._endings else self._text.push(token.token)), []
        if self._keeps:
            self.tokens.append(token)
            self.kept += entries(token)
        if token.token in self._endings:
            return "", []
        self._placed.append(Placed(token, self._text.seen))
        return self._text.push(token.token), self._release(self._text.said)

    def finish(self) -> tuple[str, list[Placed]]:
        """What was held back, now that nothing follows."""
        rest = self._text.finish()
        return rest, self._release(self._text.said if self.stopped else self._text.seen + 1)

    def _release(self, before: int) -> list[Placed]:
        released = []
        while self._placed and self._placed[0].offset < before:
            released.append(self._placed.popleft())
        return released


@dataclass(frozen=True, slots=True)
class Answer:
    """A session whose tokens are to be written."""

    worker: Clerk
    session: Session
    tokenizer: Tokenizer
    texts: list[ChoiceText] = field(default_factory=list)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What became certain, as soon as it did, until the session's usage is final.

        A choice in which a stop string came is taken back alone; when one fails, so do all.
        """
        line, left = self.session.line, len(self.session.choices)
        while left:
            pieces: list[Piece] = []
            items = [await line.get()]
            while not line.empty() and len(items) < _BURST:
                items.append(line.get_nowait())
            for item in items:
                if isinstance(item, Finished):
                    left -= 1
                    self._finish(item, pieces)
                else:
                    self._push(item, pieces)
            if pieces:
                yield pieces
        await self.session.over.wait()

    def _push(self, token: Token, pieces: list[Piece]) -> None:
        text = self.texts[token.choice]
        if text.stopped:
            return  # tokens of the step that ran when it was taken back
        said, placed = text.push(token)
        if said or placed:
            pieces.append(Piece(token.choice, said, placed, None))
        if text.stopped:
            self.worker.take_back(self.session, Status.FINISHED, token.choice)

    def _finish(self, finished: Finished, pieces: list[Piece]) -> None:
        text = self.texts[finished.choice]
        if finished.finish is Finish.FAILED and not text.stopped:
            self.worker.take_back(self.session, Status.CANCELLED)
        elif finished.finish is not Finish.CANCELLED or text.stopped:
            said, placed = text.finish()
            length = finished.finish is Finish.LENGTH and not text.stopped
            pieces.append(Piece(finished.choice, said, placed, "length" if length else "stop"))

    def keep(self, count: int) -> None:
        """So many log probabilities are kept of it now; what is too much for the memory is cut off, whosever it is."""
        for session, why in self.worker.keeping.keep(self.session, count):
            self.worker.cut_off(session, why)

    @property
    def end(self) -> End:
        """How the session ended; known when there are no more pieces."""
        if self.session.end is None:
            raise RuntimeError("a session's line closed before its end was known")
        return self.session.end


class NotTaken(Exception):
    """The client is there, and takes nothing of what is written."""


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive, answer: Answer) -> None:
    """Do the work while the client is there; whatever happens, the engine works for nobody who left."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        answer.worker.take_back(answer.session, Status.CANCELLED)
        answer.worker.keeping.release(answer.session)
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled() and (error := working.exception()) is not None:
        if not isinstance(error, NotTaken):
            raise error
        log.warning("the client of session %s took nothing for %.0f s", answer.session.session_id, _TAKEN_S)


def failure(end: End) -> tuple[int, dict[str, Any]] | None:
    """The HTTP status and the error of a session that got no answer, or not all of it."""
    if end.status is Status.FINISHED:
        return None
    if end.cut_off is not None:
        return end.cut_off.status, error_document(end.cut_off.status, end.cut_off.code, end.cut_off.message)
    if end.status is Status.CANCELLED:
        return 503, error_document(503, "cut_off", "the worker is stopping and cut this request off; send it again")
    return 500, error_document(500, "engine_failed", f"{end.message}; send the request again")


def gpu_seconds(gpu_ns: int) -> str:
    """Nanoseconds as a JSON number of seconds with nine decimals: exact, no float is involved."""
    return f"{gpu_ns // 10**9}.{gpu_ns % 10**9:09d}"


def with_usage(document: dict[str, Any] | bytes, totals: Totals) -> bytes:
    """The document, or its JSON, with `usage` as its last member, written by hand because json would make gpu_seconds
    a float."""
    usage = {
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": totals.cached_tokens},
    }
    numbers = to_json(usage)[:-1] + b',"gpu_seconds":' + gpu_seconds(totals.gpu_ns).encode() + b"}"
    written = document if isinstance(document, bytes) else to_json(document)
    return b"".join((memoryview(written)[:-1], b',"usage":', numbers, b"}"))


async def taken(sending: Awaitable[None], timeout_s: float = _TAKEN_S) -> None:
    """Wait until a client has room for what is sent to it. Raises NotTaken."""
    try:
        async with asyncio.timeout(timeout_s):
            await sending
    except TimeoutError:
        raise NotTaken from None


async def send_whole(send: Send, session: Session, status: int, body: bytes) -> None:
    """One JSON document, a piece at a time, so that a client that takes nothing holds none of it. Raises NotTaken."""
    headers = {"content-type": "application/json", "content-length": str(len(body)), SESSION_HEADER: session.session_id}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    for at in range(0, len(body), _PIECE_BYTES):
        more = at + _PIECE_BYTES < len(body)
        piece = body[at : at + _PIECE_BYTES]
        await taken(send({"type": "http.response.body", "body": piece, "more_body": more}))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
