"""The model's tokenizer and chat template, without torch.

Owns the translation between text and token ids. Encoding runs in a thread of its own, because a long prompt takes
longer than a step; decoding a token is short and runs in the event loop.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpumeter_worker.api.errors import Refused, bad_parameter
from gpumeter_worker.diagnosis import MODEL_INVALID, StartupFailed


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
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation, ready to be answered. Raises Refused."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._conversation, messages)

    async def text(self, text: str) -> list[int]:
        """The token ids of a plain text."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, text, True)

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, without special ones."""
        text: str = self._core.decode(tokens, skip_special_tokens=True)
        return text

    def _conversation(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2.exceptions import TemplateError  # noqa: PLC0415

        if not self._tokenizer.chat_template:
            raise Refused(400, "no_chat_template", "this model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise bad_parameter(
                "messages", f"the model's chat template refuses these messages: {error!s:.200}"
            ) from None
        return self._encode(text, False)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._core.encode(text, add_special_tokens=special).ids
        return ids
