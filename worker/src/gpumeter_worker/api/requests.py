"""Reads OpenAI's requests: what is asked for, checked, or refused with the name of the parameter.

Pure. Owns which parameters are understood. What it does not understand it refuses: a parameter that is silently
ignored is a wrong answer. Knows no model, no tokens and no HTTP.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_worker.api.errors import Refused, bad_parameter

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_SEED = 2**63 - 1

# Parameters of OpenAI's API that this version does not act on, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Labels that change nothing about the answer.
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
_UNDERSTOOD = frozenset(
    {"model", "stream", "stream_options", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens"}
    | {"seed", "stop", "ignore_eos"}
)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks for. `max_tokens` None: as many as fit."""

    model: str
    max_tokens: int | None
    max_tokens_param: str
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue."""

    generation: Generation
    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A text, or its token ids, to continue."""

    generation: Generation
    prompt: str | list[int]


def read_json(body: bytes) -> dict[str, Any]:
    """The request's object. Raises Refused; NaN and Infinity are not JSON."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(values, dict):
        raise Refused(400, "invalid_json", "the body must be a JSON object")
    return values


def chat_request(values: Mapping[str, Any]) -> ChatRequest:
    """Raises Refused."""
    generation = _generation(values, frozenset({"messages"}))
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_parameter("messages", "messages must be a list of at least one message", "missing_required_parameter")
    return ChatRequest(generation, [_message(message, f"messages[{index}]") for index, message in enumerate(messages)])


def completion_request(values: Mapping[str, Any], vocabulary: int) -> CompletionRequest:
    """Raises Refused."""
    generation = _generation(values, frozenset({"prompt"}))
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return CompletionRequest(generation, _text(prompt, "prompt"))
    if not isinstance(prompt, list) or not prompt:
        raise bad_parameter("prompt", "prompt must be one text or one list of token ids")
    if isinstance(prompt[0], str | list):
        raise bad_parameter(
            "prompt", "this version takes one prompt a request; send several requests", "unsupported_value"
        )
    if not all(type(token) is int and 0 <= token < vocabulary for token in prompt):
        raise bad_parameter("prompt", f"token ids must be whole numbers from 0 to {vocabulary - 1}")
    return CompletionRequest(generation, prompt)


def _generation(values: Mapping[str, Any], own: frozenset[str]) -> Generation:
    for name, value in values.items():
        if value is None or name in own or name in _UNDERSTOOD or name in _LABELS:
            continue
        if name not in _NEUTRAL:
            raise bad_parameter(f"{name:.64}", f"the parameter {name:.64} is not supported", "unsupported_parameter")
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]
        ):
            raise bad_parameter(name, f"this value of {name} is not supported", "unsupported_value")
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise bad_parameter("model", "model must name the model", "missing_required_parameter")
    max_tokens, max_tokens_param = _max_tokens(values)
    stream = _boolean(values, "stream")
    return Generation(
        model=model,
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        temperature=_number(values, "temperature", 1.0, lambda value: 0 <= value <= 2, "a number from 0 to 2"),
        top_p=_number(values, "top_p", 1.0, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
        top_k=max(0, _whole(values, "top_k", 0, -1, 2**31)),
        seed=_whole(values, "seed", 0, -MAX_SEED, MAX_SEED) if values.get("seed") is not None else None,
        stop=_stop(values.get("stop")),
        stream=stream,
        include_usage=_include_usage(values.get("stream_options"), stream),
        ignore_eos=_boolean(values, "ignore_eos"),
    )


def _max_tokens(values: Mapping[str, Any]) -> tuple[int | None, str]:
    given = [name for name in ("max_completion_tokens", "max_tokens") if values.get(name) is not None]
    if not given:
        return None, "max_tokens"
    found = {_whole(values, name, 0, 1, 2**31) for name in given}
    if len(found) > 1:
        raise bad_parameter("max_tokens", "max_tokens and max_completion_tokens contradict each other")
    return found.pop(), given[0]


def _message(message: object, at: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_parameter(at, f"{at} must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise bad_parameter(f"{at}.role", f"{at}.role must be system, developer, user or assistant")
    odd = sorted(
        name for name, value in message.items() if name not in ("role", "content", "name") and value is not None
    )
    if odd:
        raise bad_parameter(
            f"{at}.{odd[0]:.64}", f"{odd[0]:.64} in a message is not supported", "unsupported_parameter"
        )
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise bad_parameter(f"{at}.content", f"{at}.content must be a text")
    return {"role": "system" if role == "developer" else role, "content": _text(content, f"{at}.content")}


def _part(part: object, at: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise bad_parameter(at, f"{at} must be a part of type text; other kinds are not supported", "unsupported_value")
    text: str = part["text"]
    return text


def _text(text: str, at: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_parameter(at, f"{at} holds half of a surrogate pair, which is no text") from None
    return text


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS:
        raise bad_parameter("stop", f"stop must be a text or a list of at most {MAX_STOP_STRINGS} texts")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise bad_parameter("stop", f"every stop text must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise bad_parameter("stream_options", "stream_options is an object, and only allowed when stream is true")
    odd = sorted(set(options) - {"include_usage", "include_obfuscation"})
    if odd or options.get("include_obfuscation"):
        name = odd[0] if odd else "include_obfuscation"
        raise bad_parameter(f"stream_options.{name:.64}", f"{name:.64} is not supported", "unsupported_parameter")
    return _boolean(options, "include_usage")


def _boolean(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_parameter(name, f"{name} must be true or false")
    return bool(value)


def _whole(values: Mapping[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not int or not lowest <= value <= highest:
        raise bad_parameter(name, f"{name} must be a whole number from {lowest} to {highest}")
    return value


def _number(
    values: Mapping[str, Any], name: str, default: float, allowed: Callable[[float], bool], meaning: str
) -> float:
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not allowed(value):
        raise bad_parameter(name, f"{name} must be {meaning}")
    return float(value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
