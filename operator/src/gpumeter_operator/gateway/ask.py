"""The part of a request's body that the gateway must understand: `model` and `stream`.

Owns the reading of that part and the change of `model`. Everything else in the body is the worker's to judge and
travels unchanged, to the byte.
"""

import json
from dataclasses import dataclass
from json.decoder import JSONDecoder
from typing import Any

from gpumeter_operator.gateway.refusal import Refusal

MAX_MODEL_CHARS = 512
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked for. `model_at` is where the value of `model` stands in `text`, as (start, end)."""

    model: str
    stream: bool
    text: str
    model_at: tuple[int, int]


def read(body: bytes) -> Ask:
    """Understand a body. Raises Refusal (400) with a sentence when it is not a JSON object that names a model."""
    try:
        text = body.decode("utf-8")
        members = _members(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {_plainly(error)}.") from None
    seen = [name for name, _, _, _ in members]
    for name in ("model", "stream"):
        if seen.count(name) > 1:  # which of the two counts would be the worker's guess, and the bill's
            raise Refusal(400, "invalid_json", f"The field {name} occurs twice in the body; send it once.", param=name)
    found = {name: (value, start, end) for name, value, start, end in members}
    model, start, end = found.get("model", (None, 0, 0))
    if not isinstance(model, str) or not model:
        raise Refusal(400, "model_missing", "The field model must be the name of a model, as a string.", param="model")
    if len(model) > MAX_MODEL_CHARS:
        text_of_limit = f"The field model has {len(model)} characters; at most {MAX_MODEL_CHARS} are accepted."
        raise Refusal(400, "model_invalid", text_of_limit, param="model")
    stream = found.get("stream", (None, 0, 0))[0]
    if stream is not None and not isinstance(stream, bool):
        raise Refusal(400, "stream_invalid", "The field stream must be true or false.", param="stream")
    return Ask(model, bool(stream), text, (start, end))


def body_for(ask: Ask, model: str, original: bytes) -> bytes:
    """The body for a worker that answers to `model`: the original bytes, with at most the model's name replaced."""
    if ask.model == model:
        return original
    start, end = ask.model_at
    return (ask.text[:start] + json.dumps(model) + ask.text[end:]).encode("utf-8")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = JSONDecoder(parse_constant=_refuse_constant)


def _members(text: str) -> list[tuple[str, Any, int, int]]:
    """The members of the outermost object as (name, value, start, end), with the places of their values."""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("it must be an object")
    members: list[tuple[str, Any, int, int]] = []
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}" or members:
        if text[at : at + 1] != '"':
            raise ValueError(f"a field's name is expected at character {at}")
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"a colon is expected at character {at}")
        start = _skip(text, at + 1)
        value, end = _DECODER.raw_decode(text, start)
        members.append((name, value, start, end))
        at = _skip(text, end)
        if text[at : at + 1] == "}":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"a comma or the end of the object is expected at character {at}")
        at = _skip(text, at + 1)
    if _skip(text, at + 1) != len(text):
        raise ValueError(f"something follows the object at character {at + 1}")
    return members


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _plainly(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".")
