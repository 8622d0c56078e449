"""The part of a request's body that the gateway must understand: `model` and `stream`.

Owns the reading of that part and the change of `model`. Everything else in the body is the worker's to judge: it is
looked at only as far as is needed to find its end, and its value travels unchanged, to the byte.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gpumeter_operator.gateway.refusal import Refusal

MAX_MODEL_CHARS = 512
_PROMPTS = ("messages", "prompt", "inputs")
MAX_FIELDS = 1_000  # OpenAI's API has about forty; every one costs an object here


class _Name:
    """A field's name. Equal to none but itself, so that a name that occurs twice is found twice.

    Not a dataclass: msgspec would read those by itself, from an object.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_Members = dict[_Name, msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked for. `members` are the body's fields in their order; the values are views into the body."""

    model: str
    stream: bool
    members: Mapping[_Name, msgspec.Raw]


def read(body: bytes) -> Ask:
    """Understand a body. Raises Refusal (400) with a sentence when it is not a JSON object that names a model.

    On the event loop on purpose: the scanner keeps the interpreter's lock, so a thread would not let others in. It
    makes no objects below the outermost fields, and 10 MiB take it a few hundredths of a second at most.
    """
    members = _members(body)
    model = _value(members, "model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "model_missing", "The field model must be the name of a model, as a string.", param="model")
    if len(model) > MAX_MODEL_CHARS:
        text_of_limit = f"The field model has {len(model)} characters; at most {MAX_MODEL_CHARS} are accepted."
        raise Refusal(400, "model_invalid", text_of_limit, param="model")
    stream = _value(members, "stream")
    if stream is not None and not isinstance(stream, bool):
        raise Refusal(400, "stream_invalid", "The field stream must be true or false.", param="stream")
    return Ask(model, bool(stream), members)


def body_for(ask: Ask, model: str, original: bytes) -> bytes:
    """The body for a worker that answers to `model`: the original bytes, or the same fields with the model's name."""
    if ask.model == model:
        return original
    fields = (
        b"%b:%b" % (msgspec.json.encode(name.text), json.dumps(model).encode() if name.text == "model" else value)
        for name, value in ask.members.items()
    )
    return b"{%b}" % b",".join(fields)


def prompt_prefix(ask: Ask, length: int) -> bytes | None:
    """The first `length` bytes of the prompt as it was written, a copy; None where nothing is asked for or there."""
    for name, value in ask.members.items() if length else ():
        if name.text in _PROMPTS:
            return bytes(memoryview(value)[:length])
    return None


def _members(body: bytes) -> _Members:
    found = 0

    def name(_: type, text: str) -> _Name:
        nonlocal found
        found += 1
        if found > MAX_FIELDS:
            raise Refusal(400, "too_many_fields", f"The body has more than {MAX_FIELDS} fields.")
        return _Name(text)

    try:
        return msgspec.json.decode(body, type=_Members, dec_hook=name)
    except (ValueError, RecursionError) as error:
        raise _invalid(error) from None


def _value(members: _Members, name: str) -> Any:
    """The value of a field, or None. Raises Refusal when it occurs twice or, being one value, cannot be read."""
    values = [value for each, value in members.items() if each.text == name]
    if len(values) > 1:  # which of the two counts would be the worker's guess, and the bill's
        raise Refusal(400, "invalid_json", f"The field {name} occurs twice in the body; send it once.", param=name)
    if not values:
        return None
    try:
        return msgspec.json.decode(values[0], type=str | bool | None)
    except msgspec.ValidationError:
        return ...  # another type, which the caller refuses
    except (ValueError, RecursionError) as error:
        raise _invalid(error) from None


def _invalid(error: Exception) -> Refusal:
    """Called with what the scanner raised; its words say what and where, in bytes."""
    if isinstance(error, UnicodeDecodeError):
        why = "a text in it is not UTF-8"
    elif isinstance(error, RecursionError):
        why = "it is nested too deeply"
    elif isinstance(error, msgspec.ValidationError):
        found = str(error).rpartition("got ")[2].strip("`")
        return Refusal(400, "invalid_json", f"The body must be a JSON object, not {found}.")
    elif "truncated" in str(error):
        why = "it ends too early"
    else:
        why = str(error).removeprefix("JSON is malformed: ")
    return Refusal(400, "invalid_json", f"The body is not valid JSON: {why}.")
