"""Log probabilities in OpenAI's two shapes.

Pure. Owns the shapes; the numbers are the engine's, natural logarithms of the probabilities before temperature and
cuts. Lists the tokens of the text that is said: not the one that ended the answer, nor those of a stop string.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpumeter_worker.api.tokenizer import TokenText
from gpumeter_worker.engine.messages import Token

LEAST = -9999.0
"""What OpenAI writes for a token that has no probability; JSON has no infinity."""


class Placed(NamedTuple):
    """A token, and how many characters the answer had before it."""

    token: Token
    offset: int


def chat_logprobs(placed: Sequence[Placed], text_of: Callable[[int], TokenText]) -> dict[str, Any]:
    """The `logprobs` of a choice of chat completions, or of a chunk's."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = text_of(token)
        return {
            "token": text.text,
            "logprob": finite(logprob),
            "bytes": None if text.raw is None else list(text.raw),
        }

    return {
        "content": [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}
            for token, _ in placed
        ],
        "refusal": None,
    }


def completion_logprobs(placed: Sequence[Placed], text_of: Callable[[int], TokenText]) -> dict[str, Any]:
    """The `logprobs` of a choice of completions, or of a chunk's. Offsets count from the beginning of its text."""
    return {
        "tokens": [text_of(token.token).text for token, _ in placed],
        "token_logprobs": [finite(token.logprob) for token, _ in placed],
        "top_logprobs": [
            {text_of(one).text: finite(logprob) for one, logprob in (*token.top, (token.token, token.logprob))}
            for token, _ in placed
        ],
        "text_offset": [offset for _, offset in placed],
    }


def finite(logprob: float | None) -> float:
    """A log probability that JSON can say."""
    if logprob is None:
        raise RuntimeError("the engine gave no log probability where one was asked for")
    return max(logprob, LEAST)
