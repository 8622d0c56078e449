"""The model's tokenizer and chat template, without torch.

Owns the translation between text and token ids. Encoding runs in threads of its own and without the interpreter's
lock, because a long prompt takes longer than a step; decoding a token is short and runs in the event loop.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpumeter_worker.api.conversation import Conversation
from gpumeter_worker.api.errors import Refused, bad_parameter
from gpumeter_worker.failure import MODEL_INVALID, StartupFailed

_THREADS = 2
"""One long prompt leaves a thread for the others."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token by itself. `raw` are its bytes, which may be a part of a character; None where nobody knows them."""

    text: str
    raw: bytes | None


class Tokenizer:
    """A loaded tokenizer. Its Rust part is only read, so that threads can share it."""

    def __init__(self, path: Path) -> None:
        """Blocks for a second or two. Raises StartupFailed."""
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - a second of import

        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the Rust part raises plain Exception for a damaged file
            raise StartupFailed(
                MODEL_INVALID, f"the tokenizer in {path} cannot be loaded ({error!s:.120}); copy the model again"
            ) from None
        self._core: Any = self._tokenizer.backend_tokenizer
        self._core.no_padding()
        self._core.no_truncation()
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._longest = max(map(len, self._core.get_vocab()), default=1)
        self._neighbour: list[int] = self._core.encode("a", add_special_tokens=False).ids
        self._texts: dict[int, TokenText] = {}  # at most one for every token of the vocabulary
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizer")

    async def conversation(self, conversation: Conversation, max_tokens: int) -> list[int]:
        """The token ids of a conversation, ready to be answered. Raises Refused."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, self._conversation, conversation, max_tokens)

    async def text(self, text: str, max_tokens: int, param: str) -> list[int]:
        """The token ids of a plain text that came in the field `param`. Raises Refused."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, self._encode, text, True, max_tokens, param)

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, without special ones."""
        text: str = self._core.decode(tokens, skip_special_tokens=True)
        return text

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark and no text."""
        return token in self._special

    def token(self, token: int) -> TokenText:
        """A token by itself, as log probabilities name it; special ones too."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._look_at(token)
        return found

    def _look_at(self, token: int) -> TokenText:
        # Behind a neighbour, because some decoders drop the space that a text begins with.
        before: str = self._core.decode(self._neighbour, skip_special_tokens=False)
        both: str = self._core.decode([*self._neighbour, token], skip_special_tokens=False)
        text = both[len(before) :]
        raw = text.encode() if _REPLACEMENT not in text else _bytes(self._core.id_to_token(token) or "")
        if raw is not None and _REPLACEMENT in text:
            text = _readable(raw)
        return TokenText(text, raw)

    def _conversation(self, conversation: Conversation, max_tokens: int) -> list[int]:
        from jinja2.exceptions import TemplateError  # noqa: PLC0415

        tokenizer, tools = self._tokenizer, conversation.tools or None
        if not tokenizer.chat_template:
            raise Refused(400, "no_chat_template", "this model has no chat template; use /v1/completions")
        try:
            text: str | None = None
            if not conversation.speaks_of_tools or self._takes_tools(tools):
                text = tokenizer.apply_chat_template(
                    conversation.messages, tools=tools, tokenize=False, add_generation_prompt=True
                )
        except Exception as error:
            # What a template does with messages that it was not written for is its own affair: some raise by name,
            # others trip over a type. The messages are the client's in any case.
            why = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise bad_parameter("messages", f"the model's chat template refuses these messages: {why:.200}") from None
        if text is None:
            raise bad_parameter(
                "tools" if tools else "messages",
                "this model's chat template knows no tools; leave out tools, tool_calls and messages of the role tool",
                "unsupported_value",
            )
        return self._encode(text, False, max_tokens, "messages")

    def _takes_tools(self, tools: list[dict[str, Any]] | None) -> bool:
        from jinja2 import Environment  # noqa: PLC0415

        # Read and never run. A template with tags of its own cannot be parsed here, but it can be cut into words.
        words = Environment(autoescape=True).lex(self._tokenizer.get_chat_template(None, tools))
        return any(kind == "name" and word == "tools" for _, kind, word in words)

    def _encode(self, text: str, special: bool, max_tokens: int, param: str) -> list[int]:
        least = len(text) // self._longest
        if least > max_tokens:  # no need to count them
            raise bad_parameter(
                param,
                f"the prompt has {len(text)} characters, at least {least} tokens; this model holds {max_tokens}",
                "context_length_exceeded",
            )
        try:
            # Only the call for batches lets other threads run: measured on a text of 1 MB, `encode` stops them for a
            # second, this for 0.03 s.
            ids: list[int] = self._core.encode_batch([text], add_special_tokens=special)[0].ids
        except (UnicodeEncodeError, TypeError):
            raise bad_parameter(param, f"{param} holds half of a surrogate pair, which is no text") from None
        return ids


def _bytes(token: str) -> bytes | None:
    """The bytes of a token that is no text by itself: `<0xE2>`, or bytes written as letters (GPT-2's way)."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    try:
        return bytes(_LETTERS[letter] for letter in token) or None
    except KeyError:
        return None


def _readable(raw: bytes) -> str:
    """Bytes as OpenAI writes those that are no text; a true replacement character is text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_LETTERS = _letters()
