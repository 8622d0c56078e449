"""Reads requests to the three routes that generate: what is to be continued, and how.

Pure. Owns the routes' own fields and what they default to. Knows no model beyond the size of its vocabulary, and no
HTTP.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_worker.api.conversation import FIELDS, Conversation, read_conversation
from gpumeter_worker.api.errors import Refused, bad_parameter
from gpumeter_worker.api.fields import boolean, text, token_id, whole
from gpumeter_worker.api.parameters import (
    MAX_COUNT,
    MAX_TOP_LOGPROBS,
    Generation,
    did_you_mean,
    drawing,
    read_generation,
)

MAX_PROMPTS = 2048
"""In one request; how many of them the queue takes is the worker's to say."""

COMPLETION_TOKENS = 16
"""What OpenAI's completions give where max_tokens is not said. Chat completions give what fits."""

GENERATE_TOKENS = 100
GENERATE_PARAMETERS = frozenset(
    {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "do_sample", "seed", "stop", "details"}
    | {"repetition_penalty", "frequency_penalty", "presence_penalty", "top_n_tokens", "return_full_text"}
)

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue."""

    generation: Generation
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Texts, or their token ids, to continue."""

    generation: Generation
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A plain batch. `single`: one text was sent and no list, so one object is answered and no list."""

    generation: Generation
    prompts: list[Prompt]
    single: bool
    details: bool
    full_text: bool


def read_json(body: bytes) -> dict[str, Any]:
    """The request's object. Raises Refused; NaN and Infinity are not JSON."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(values, dict):
        raise Refused(400, "invalid_json", "the body must be a JSON object")
    return values


def chat_request(values: Mapping[str, Any], vocabulary: int) -> ChatRequest:
    """Raises Refused."""
    wanted = boolean(values, "logprobs")
    top = whole(values, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise bad_parameter("top_logprobs", "top_logprobs is only allowed when logprobs is true")
    generation = read_generation(values, FIELDS | {"top_logprobs"}, vocabulary, top if wanted else None)
    return ChatRequest(generation, read_conversation(values))


def completion_request(values: Mapping[str, Any], vocabulary: int) -> CompletionRequest:
    """Raises Refused."""
    logprobs = None
    if values.get("logprobs") is not None and values["logprobs"] is not False:  # 0 asks for the chosen token's
        logprobs = whole(values, "logprobs", 0, 0, MAX_TOP_LOGPROBS)
    generation = read_generation(values, frozenset({"prompt"}), vocabulary, logprobs, COMPLETION_TOKENS)
    return CompletionRequest(generation, _prompts(values.get("prompt"), vocabulary))


def generate_request(values: Mapping[str, Any], model: str) -> GenerateRequest:
    """The plain batch call; `model` is what is meant where none is named. Raises Refused."""
    for name, value in values.items():
        if name not in ("inputs", "parameters", "model") and value is not None and value is not False:
            known = did_you_mean(name, ("inputs", "parameters", "model"))
            advice = "; /v1/completions streams" if name == "stream" else known
            raise bad_parameter(
                f"{name:.64}", f"the field {name:.64} is not supported{advice}", "unsupported_parameter"
            )
    inputs, parameters = values.get("inputs"), values.get("parameters")
    named = model if values.get("model") is None else values["model"]
    if not isinstance(named, str):
        raise bad_parameter("model", "model must name the model")
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise bad_parameter("inputs", "inputs must be a text or a list of texts", "missing_required_parameter")
    if len(texts) > MAX_PROMPTS:
        raise bad_parameter("inputs", f"inputs holds {len(texts)} texts; at most {MAX_PROMPTS} are accepted")
    if not isinstance(parameters, dict | None):
        raise bad_parameter("parameters", "parameters must be an object")
    given = parameters or {}
    return GenerateRequest(
        _plain_generation(given, named),
        [text(one, "inputs") for one in texts],
        isinstance(inputs, str),
        details=boolean(given, "details", "parameters."),
        full_text=boolean(given, "return_full_text", "parameters."),
    )


def _plain_generation(given: Mapping[str, Any], model: str) -> Generation:
    """Greedy, unless something is said about how to draw: as text-generation-inference has it."""
    at = "parameters."
    for name, value in given.items():
        if value is not None and name not in GENERATE_PARAMETERS:
            told = f"{at}{name:.64} is not supported{did_you_mean(name, GENERATE_PARAMETERS)}"
            raise bad_parameter(f"{at}{name:.64}", told, "unsupported_parameter")
    draws = boolean(given, "do_sample", at) or any(
        given.get(name) is not None for name in ("temperature", "top_p", "top_k", "min_p")
    )
    top = whole(given, "top_n_tokens", 0, 0, MAX_TOP_LOGPROBS, at=at)
    return Generation(
        model=model,
        max_tokens=whole(given, "max_new_tokens", 0, 1, MAX_COUNT, at=at) or None,
        usual_tokens=GENERATE_TOKENS,
        max_tokens_param=f"{at}max_new_tokens",
        logprobs=top if boolean(given, "details", at) else None,
        **drawing(given, at, temperature=1.0 if draws else 0.0),
    )


def _prompts(prompt: object, vocabulary: int) -> list[Prompt]:
    """One text, one list of token ids, or a list of either; never a mixture."""
    if isinstance(prompt, str):
        return [text(prompt, "prompt")]
    if not isinstance(prompt, list) or not prompt:
        raise bad_parameter("prompt", "prompt must be a text, a list of token ids, or a list of such")
    if isinstance(prompt[0], str | list):
        if len(prompt) > MAX_PROMPTS:
            raise bad_parameter("prompt", f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are accepted")
        if all(isinstance(one, str) for one in prompt):
            return [text(one, "prompt") for one in prompt]
        return [_ids(one, vocabulary) for one in prompt]
    return [_ids(prompt, vocabulary)]


def _ids(ids: object, vocabulary: int) -> list[int]:
    if not isinstance(ids, list) or not all(token_id(one, vocabulary) for one in ids):
        raise bad_parameter("prompt", f"token ids must be whole numbers from 0 to {vocabulary - 1}")
    return ids


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
