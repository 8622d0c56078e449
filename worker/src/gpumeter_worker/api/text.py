"""From tokens to text as it streams: never half a character, never a part of a stop string.

Owns what may be said already and what must be held back, and where in the text a token begins. Knows no model beyond a
`decode` function. A token costs the same at the end of a long answer as at its beginning.
"""

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 6
"""How many tokens of the prompt are decoded along, so that a first token keeps its leading space."""

_CHARACTER_TOKENS = 4
"""A character has at most four bytes, so no more tokens than these can be waiting for its end."""

_PATIENCE = 8
"""Tokens that end in no whole character for so long are no text, and what is sure of them is said."""

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns one sequence's tokens into text. After a stop string nothing more comes out.

    `seen` counts the characters that the tokens made so far, `said` those of them that came out.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])  # those that were said last, then those that were not
        self._fresh = len(self._tokens)  # where the latter begin
        self._stops = tuple(stops)
        self._held = ""
        self.seen = 0
        self.said = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        text = self._text(len(self._tokens))
        if text and not text.endswith(_REPLACEMENT):
            return self._take(len(self._tokens), text)
        if len(self._tokens) - self._fresh >= _PATIENCE:
            cut = self._edge(text)
            return self._take(cut, self._text(cut))
        return ""  # the bytes of a character are not complete yet

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._take(len(self._tokens), self._text(len(self._tokens)))
        held, self._held = self._held, ""
        self.said += len(held)
        return text + held

    def _text(self, end: int) -> str:
        before = self._decode(self._tokens[: self._fresh])
        return self._decode(self._tokens[:end])[len(before) :]

    def _edge(self, text: str) -> int:
        """Where the waiting tokens can be cut and no character is: decoded apart they are as long as together."""
        count = len(self._tokens)
        for cut in range(count - 1, count - _CHARACTER_TOKENS - 1, -1):
            if len(self._text(cut)) + len(self._decode(self._tokens[cut:])) == len(text):
                return cut
        return count - _CHARACTER_TOKENS

    def _take(self, end: int, text: str) -> str:
        self.seen += len(text)
        self._tokens = self._tokens[self._fresh :]
        self._fresh = end - self._fresh
        certain = self._pass(text)
        self.said += len(certain)
        return certain

    def _pass(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        at = min((found for stop in self._stops if (found := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
