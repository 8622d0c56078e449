"""Why a request is not served: the one form of every error that the gateway itself answers.

Owns statuses, codes and OpenAI's error shape, as a body and as an event of a stream. Does not know who sends it.
"""

import json
from dataclasses import dataclass


@dataclass(eq=False)  # not frozen: Python writes the traceback into an exception
class Refusal(Exception):
    """One answer that is an error. `message` is a sentence that says what to do; `retry_after_s` 0 means: not told."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: int = 0

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """The field `type` of OpenAI's shape."""
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def body(refusal: Refusal) -> bytes:
    """OpenAI's error object, as every official client reads it."""
    error = {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def event(refusal: Refusal) -> bytes:
    """The same as the last event of a stream that can no longer change its status."""
    return b"data: " + body(refusal) + b"\n\n"
