"""The JSON schemas of what is sent and answered on port 8000.

Owns what a body may look like, by the bounds that the readers keep. Says what a schema can say: that a prompt fits into
the model, that a chat template knows tools, or that two fields do not contradict each other is checked by the readers
and answered with a 400. Null is a field that was not sent.
"""

from typing import Any

from gpumeter_worker.api.conversation import MAX_TOOLS
from gpumeter_worker.api.parameters import (
    LABELS,
    MAX_BIAS,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_COUNT,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    NEUTRAL,
)
from gpumeter_worker.api.requests import COMPLETION_TOKENS, GENERATE_TOKENS, MAX_PROMPTS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NULL: Schema = {"type": "null"}


def _or_null(schema: Schema) -> Schema:
    kind = schema.get("type")
    return {**schema, "type": [kind, "null"]} if isinstance(kind, str) else {"anyOf": [schema, _NULL]}


def _whole(lowest: int, highest: int, says: str = "") -> Schema:
    schema: Schema = {"type": ["integer", "null"], "minimum": lowest, "maximum": highest}
    return {**schema, "description": says} if says else schema


def _number(lowest: float, highest: float, says: str = "", *, above: bool = False) -> Schema:
    schema: Schema = {"type": ["number", "null"], "maximum": highest}
    schema["exclusiveMinimum" if above else "minimum"] = lowest
    return {**schema, "description": says} if says else schema


def _flag(says: str = "") -> Schema:
    return {"type": ["boolean", "null"], **({"description": says} if says else {})}


def _list(of: Schema, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": of, "minItems": least, **({} if most is None else {"maxItems": most})}


def _object(properties: dict[str, Schema], required: list[str], *, others: Schema | None = None) -> Schema:
    """An object; fields of other names are not allowed, unless they say nothing."""
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": _NULL if others is None else others,
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_STOP: Schema = {
    "anyOf": [
        {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_STOP_CHARS},
        _list({"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}, 0, MAX_STOP_STRINGS),
    ],
    "description": "Texts that end an answer; the text itself is not said.",
}
_DRAWING: dict[str, Schema] = {
    "temperature": _number(0, 2, "0 always takes the likeliest token."),
    "top_p": _number(0, 1, above=True),
    "top_k": _whole(-1, MAX_COUNT, "0 or -1 keep the whole vocabulary."),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, "1 is none."),
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "seed": _whole(-MAX_SEED, MAX_SEED, "The same seed gives the same tokens, whatever else is served."),
    "stop": _STOP,
}


def _shared(models: list[str]) -> dict[str, Schema]:
    return {
        "model": {"type": "string", "enum": models},
        **_DRAWING,
        "max_tokens": _whole(1, MAX_COUNT),
        "max_completion_tokens": _whole(1, MAX_COUNT, "The same as max_tokens."),
        "min_tokens": _whole(0, MAX_COUNT),
        "n": _whole(1, MAX_CHOICES, "Answers to each prompt; at most as many as the worker's largest batch."),
        "stop_token_ids": _or_null(_list({"type": "integer", "minimum": 0}, 0, MAX_STOP_IDS)),
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        },
        "ignore_eos": _flag("Go on after the token that ends an answer, until max_tokens."),
        "stream": _flag("Server-sent events instead of one object."),
        "stream_options": {
            **_object({"include_usage": _flag(), "include_obfuscation": {"enum": [False, None]}}, []),
            "type": ["object", "null"],
        },
        **{name: {"description": "A label; it changes nothing."} for name in LABELS},
        **{name: {"enum": [*values, None], "description": f"Else: {why}."} for name, (values, why) in NEUTRAL.items()},
    }


_CONTENT: Schema = {
    "anyOf": [
        _TEXT,
        _list(
            {"type": "object", "properties": {"type": {"const": "text"}, "text": _TEXT}, "required": ["type", "text"]}
        ),
    ]
}
_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": _or_null(_TEXT),
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "arguments": {"type": ["string", "object"], "description": "A JSON object, written as a text."},
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["function"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}


def _message(roles: list[str], more: dict[str, Schema], required: list[str]) -> Schema:
    properties: dict[str, Schema] = {"role": {"enum": roles}, "content": _CONTENT, "name": _or_null(_TEXT), **more}
    return _object(properties, ["role", *required], others={"enum": [None, []]})


_MESSAGE: Schema = {
    "anyOf": [
        _message(["system", "developer", "user", "assistant"], {}, ["content"]),
        _message(["tool"], {"tool_call_id": _or_null(_TEXT)}, ["content"]),
        _message(["assistant"], {"content": _or_null(_CONTENT), "tool_calls": _list(_CALL, 1)}, ["tool_calls"]),
        _message(["assistant"], {"tool_calls": _or_null(_list(_CALL))}, ["content"]),
    ]
}
_IDS: Schema = _list({"type": "integer", "minimum": 0}, 1)
_USAGE: Schema = _object(
    {
        "prompt_tokens": {"type": "integer", "description": "Each prompt once, however many answers it has."},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": _object({"cached_tokens": {"type": "integer"}}, ["cached_tokens"]),
        "gpu_seconds": {"type": "number", "description": "Exact to the nanosecond: what the session is billed for."},
    },
    ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "gpu_seconds"],
)
_BYTES: Schema = {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_TOP: dict[str, Schema] = {"token": _TEXT, "logprob": {"type": "number"}, "bytes": _BYTES}
_CHAT_LOGPROBS: Schema = _object(
    {
        "content": _list(
            _object(
                {**_TOP, "top_logprobs": _list(_object(_TOP, [*_TOP]), 0, MAX_TOP_LOGPROBS)}, [*_TOP, "top_logprobs"]
            )
        ),
        "refusal": _NULL,
    },
    ["content", "refusal"],
)
_NUMBERS: Schema = _list({"type": "number"})
_COMPLETION_LOGPROBS: Schema = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _NUMBERS,
        "top_logprobs": _list({"type": "object", "additionalProperties": {"type": "number"}}),
        "text_offset": _list({"type": "integer", "minimum": 0}),
    },
    ["tokens", "token_logprobs", "top_logprobs", "text_offset"],
)
_FINISH: Schema = {"enum": ["stop", "length"]}


def _answer(kind: str, choice: dict[str, Schema]) -> Schema:
    whole = {"index": {"type": "integer", "minimum": 0}, "finish_reason": _FINISH, **choice}
    properties: dict[str, Schema] = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": _TEXT,
        "choices": _list(_object(whole, [*whole]), 1),
        "usage": _ref("Usage"),
    }
    return _object(properties, [*properties])


_SAID: Schema = _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": _NULL}, ["role", "content"])
_PLAIN_TOKEN: Schema = _object(
    {"id": {"type": "integer"}, "text": _TEXT, "logprob": {"type": "number"}, "special": {"type": "boolean"}},
    ["id", "text", "logprob", "special"],
)
_GENERATED: Schema = _object(
    {
        "generated_text": _TEXT,
        "details": _object(
            {
                "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
                "generated_tokens": {"type": "integer"},
                "seed": {"type": ["integer", "null"]},
                "prefill": _list({}, 0, 0),
                "tokens": _list(_PLAIN_TOKEN),
                "top_tokens": _list(_list(_PLAIN_TOKEN)),
            },
            ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"],
        ),
        "usage": {**_ref("Usage"), "description": "The whole call's, in the last object of a list."},
    },
    ["generated_text"],
)
_MODEL: Schema = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": _TEXT,
        "max_model_len": {"type": ["integer", "null"]},
    },
    ["id", "object", "created", "owned_by", "max_model_len"],
)
_ERROR: Schema = _object(
    {
        "error": _object(
            {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT},
            ["message", "type", "param", "code"],
        ),
        "usage": {**_ref("Usage"), "description": "Where the request had become a session."},
    },
    ["error"],
)


def schemas(models: list[str]) -> dict[str, Schema]:
    """Every schema by its name. `models` are the names that this worker answers to."""
    shared = _shared(models)
    return {
        "ChatCompletionRequest": _object(
            {
                "messages": _list(_MESSAGE, 1),
                "tools": _or_null(_list(_TOOL, 0, MAX_TOOLS)),
                "tool_choice": {"enum": ["none", "auto", None]},
                "parallel_tool_calls": _flag(),
                **shared,
                "logprobs": _flag(),
                "top_logprobs": _whole(0, MAX_TOP_LOGPROBS, "Only where logprobs is true."),
            },
            ["model", "messages"],
        ),
        "CompletionRequest": _object(
            {
                "prompt": {"anyOf": [_TEXT, _IDS, _list(_TEXT, 1, MAX_PROMPTS), _list(_IDS, 1, MAX_PROMPTS)]},
                **shared,
                "max_tokens": _whole(1, MAX_COUNT, f"{COMPLETION_TOKENS} where it is not said."),
                "logprobs": {
                    "anyOf": [_whole(0, MAX_TOP_LOGPROBS), {"const": False}],
                    "description": "How many of the likeliest tokens are listed beside the chosen one.",
                },
            },
            ["model", "prompt"],
        ),
        "GenerateRequest": _object(
            {
                "inputs": {"anyOf": [_TEXT, _list(_TEXT, 1, MAX_PROMPTS)]},
                "model": {"enum": [*models, None]},
                "parameters": {
                    **_object(
                        {
                            **_DRAWING,
                            "max_new_tokens": _whole(1, MAX_COUNT, f"{GENERATE_TOKENS} where it is not said."),
                            "do_sample": _flag("Else greedy, unless temperature, top_p, top_k or min_p is given."),
                            "details": _flag("Every token with its log probability, and why the text ended."),
                            "top_n_tokens": _whole(0, MAX_TOP_LOGPROBS),
                            "return_full_text": _flag("The input before the text."),
                        },
                        [],
                    ),
                    "type": ["object", "null"],
                },
            },
            ["inputs"],
            others={"enum": [None, False]},
        ),
        "ChatCompletion": _answer("chat.completion", {"message": _SAID, "logprobs": _or_null(_CHAT_LOGPROBS)}),
        "Completion": _answer("text_completion", {"text": _TEXT, "logprobs": _or_null(_COMPLETION_LOGPROBS)}),
        "Generated": {"anyOf": [_GENERATED, _list(_GENERATED, 1)]},
        "Usage": _USAGE,
        "Model": _MODEL,
        "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}, ["object", "data"]),
        "Error": _ERROR,
        "Readiness": _object(
            {
                "ready": {"type": "boolean"},
                "reason": _TEXT,
                "message": _TEXT,
                "attribution": _object({"reason": _TEXT, "message": _TEXT}, ["reason", "message"]),
            },
            ["ready", "reason", "message"],
        ),
    }
