"""The plain batch call: texts in, texts out, in the shape of text-generation-inference's /generate.

Owns that shape: `{"generated_text", "details"}` for a text, a list of them for a list. `details` come where they were
asked for. `usage` is the whole call's and stands in the one object, or in the last one of a list: once, so that whoever
adds up a list's usage gets the call's. Does not stream.
"""

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpumeter_usage.hop import SESSION_HEADER
from gpumeter_worker.api.answer import Answer, failure, send_whole, while_connected, with_usage
from gpumeter_worker.api.compact import to_json
from gpumeter_worker.api.keeping import in_pieces
from gpumeter_worker.api.logprobs import finite
from gpumeter_worker.api.requests import GenerateRequest
from gpumeter_worker.engine.messages import Token


class BatchAnswer(Response):
    """All texts of a batch, when the session has ended."""

    def __init__(self, answer: Answer, asked: GenerateRequest) -> None:
        super().__init__(media_type="application/json", headers={SESSION_HEADER: answer.session.session_id})
        self._answer = answer
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves first."""
        await while_connected(self._respond(send), receive, self._answer)

    async def _respond(self, send: Send) -> None:
        answer = self._answer
        texts = [[str(prompt)] if self._asked.full_text else [] for prompt in self._asked.prompts]
        reasons = ["" for _ in texts]
        async for pieces in answer.pieces():
            for piece in pieces:
                texts[piece.choice].append(piece.text)
                reasons[piece.choice] = piece.finish_reason or reasons[piece.choice]
            answer.keep(sum(text.kept for text in answer.texts))
        end = answer.end
        if failed := failure(end):
            status, body = failed[0], with_usage(failed[1], end.totals)
        else:
            status = 200
            written = [await self._written(index, "".join(text), reasons[index]) for index, text in enumerate(texts)]
            last = with_usage(written.pop(), end.totals)
            body = last if self._asked.single else b"[" + b",".join([*written, last]) + b"]"
        await send_whole(send, answer.session, status, body)

    async def _written(self, index: int, text: str, reason: str) -> bytes:
        if not self._asked.details:
            return to_json({"generated_text": text})
        made, generation = self._answer.texts[index], self._asked.generation
        details: dict[str, Any] = {
            "finish_reason": "stop_sequence" if made.stopped else {"stop": "eos_token"}.get(reason, reason),
            "generated_tokens": made.count,
            "seed": generation.seed,
            "prefill": [],
        }
        listed = await in_pieces(self._listed, made.tokens)
        before = to_json({"generated_text": text, "details": details})
        return b"".join((before[:-2], b",", listed[1:], b"}"))

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any]:
        listed: dict[str, Any] = {"tokens": [self._token(token.token, token.logprob) for token in tokens]}
        if self._asked.generation.logprobs:
            listed["top_tokens"] = [self._top(token) for token in tokens]
        return listed

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._token(*one) for one in token.top]

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = self._answer.tokenizer
        return {
            "id": token,
            "text": tokenizer.token(token).text,
            "logprob": finite(logprob),
            "special": tokenizer.is_special(token),
        }
