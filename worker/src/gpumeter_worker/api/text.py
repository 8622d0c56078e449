"""From tokens to text as it streams: never half a character, never a part of a stop string.

Owns what may be said already and what must be held back. Knows no model beyond a `decode` function.
"""

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 6
"""How many tokens of the prompt are decoded along, so that a first token keeps its leading space."""

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns one session's tokens into text. After a stop string nothing more comes out."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._before = 0
        self._said = len(self._tokens)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):  # the bytes of a character are not complete yet
            return ""
        self._before, self._said = self._said, len(self._tokens)
        return self._pass(text)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._pass(self._new_text())
        self._before = self._said = len(self._tokens)
        held, self._held = self._held, ""
        return "" if self.stopped else text + held

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._before : self._said])
        return self._decode(self._tokens[self._before :])[len(before) :]

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
