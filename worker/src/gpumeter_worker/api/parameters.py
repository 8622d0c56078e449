"""How an answer is to be generated: every parameter that chat completions and completions share, read and bounded.

Pure. Owns which parameters are understood, their bounds and their defaults. What it does not understand it refuses: a
parameter that is silently ignored is a wrong answer. Knows no prompt, no tokenizer and no HTTP.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_worker.api.errors import bad_parameter
from gpumeter_worker.api.fields import boolean, number, text, token_id, whole

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_SEED = 2**63 - 1
MAX_CHOICES = 16
"""Answers to one prompt; the model's largest batch may allow fewer."""

MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 10.0
"""Logits are divided by it: what is outside makes them infinite, sooner or later."""

LEAST_TEMPERATURE = 1e-4
"""Below it a difference of logits that a float can tell leaves one token: the likeliest, as with 0."""

MAX_COUNT = 2**31
"""Of tokens that are asked for and of top_k: what fits into the model is checked when the prompt is known."""

# Parameters of OpenAI's API that this version does not act on: the values with which they ask for nothing, and what to
# say to any other.
NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), "ask for n answers and choose among them"),
    "suffix": (("",), "this server continues texts and does not fill gaps"),
    "echo": ((False,), "put the prompt before the answer yourself"),
    "response_format": (({"type": "text"},), "answers are plain text; describe the format in the prompt"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tools"),
    "modalities": ((["text"],), "answers are text"),
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
# Labels that change nothing about the answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")

UNDERSTOOD = frozenset(
    {"model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "n", "ignore_eos"}
    | {"max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "logit_bias", "logprobs"}
    | {"repetition_penalty", "frequency_penalty", "presence_penalty"}
)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks for. `logprobs` as engine.sequence.Sampling has it."""

    model: str
    max_tokens: int | None = None
    usual_tokens: int | None = None
    """How many tokens there are at most where `max_tokens` was not said; None: as many as fit."""
    max_tokens_param: str = "max_tokens"
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False


def read_generation(
    values: Mapping[str, Any],
    own: frozenset[str],
    vocabulary: int,
    logprobs: int | None,
    usual_tokens: int | None = None,
) -> Generation:
    """Read what all routes share. `own` are the route's other fields, which it reads itself. Raises Refused."""
    refuse_what_is_not_understood(values, own)
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise bad_parameter("model", "model must name the model", "missing_required_parameter")
    max_tokens, max_tokens_param = _max_tokens(values)
    min_tokens = whole(values, "min_tokens", 0, 0, MAX_COUNT)
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad_parameter("min_tokens", f"min_tokens is {min_tokens}, more than {max_tokens_param} ({max_tokens})")
    stream = boolean(values, "stream")
    return Generation(
        model=model,
        max_tokens=max_tokens,
        usual_tokens=usual_tokens,
        max_tokens_param=max_tokens_param,
        min_tokens=min_tokens,
        logit_bias=_logit_bias(values.get("logit_bias"), vocabulary),
        n=whole(values, "n", 1, 1, MAX_CHOICES),
        stop_ids=_stop_ids(values.get("stop_token_ids"), vocabulary),
        logprobs=logprobs,
        stream=stream,
        include_usage=_include_usage(values.get("stream_options"), stream),
        ignore_eos=boolean(values, "ignore_eos"),
        **drawing(values),
    )


def drawing(values: Mapping[str, Any], at: str = "", temperature: float = 1.0) -> dict[str, Any]:
    """The fields of Generation that say how a token is chosen and which text ends it. Raises Refused."""

    def penalty(name: str) -> float:
        meaning = f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}"
        return number(values, name, 0.0, lambda value: -MAX_PENALTY <= value <= MAX_PENALTY, meaning, at=at)

    repetition = f"a number from {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}; 1 is none"
    heat = number(values, "temperature", temperature, lambda v: 0 <= v <= 2, "a number from 0 to 2", at=at)
    return {
        "temperature": heat if heat >= LEAST_TEMPERATURE else 0.0,
        "top_p": number(values, "top_p", 1.0, lambda v: 0 < v <= 1, "a number above 0, at most 1", at=at),
        "top_k": max(0, whole(values, "top_k", 0, -1, MAX_COUNT, at=at)),
        "min_p": number(values, "min_p", 0.0, lambda v: 0 <= v <= 1, "a number from 0 to 1", at=at),
        "repetition_penalty": number(
            values,
            "repetition_penalty",
            1.0,
            lambda v: MIN_REPETITION_PENALTY <= v <= MAX_REPETITION_PENALTY,
            repetition,
            at=at,
        ),
        "frequency_penalty": penalty("frequency_penalty"),
        "presence_penalty": penalty("presence_penalty"),
        "seed": whole(values, "seed", 0, -MAX_SEED, MAX_SEED, at=at) if values.get("seed") is not None else None,
        "stop": _stop_strings(values.get("stop"), f"{at}stop"),
    }


def refuse_what_is_not_understood(values: Mapping[str, Any], own: frozenset[str]) -> None:
    """Raises Refused for a parameter that would have to be ignored."""
    for name, value in values.items():
        if value is None or name in own or name in UNDERSTOOD or name in LABELS:
            continue
        if name not in NEUTRAL:
            hint = did_you_mean(name, own | UNDERSTOOD)
            told = f"the parameter {name:.64} is not supported{hint}"
            raise bad_parameter(f"{name:.64}", told, "unsupported_parameter")
        neutral, advice = NEUTRAL[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise bad_parameter(name, f"this value of {name} is not supported; {advice}", "unsupported_value")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The rest of a sentence about a name that is not known: the nearest one that is, or nothing."""
    near = difflib.get_close_matches(f"{name:.64}", sorted(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _stop_strings(value: object, at: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS:
        raise bad_parameter(at, f"{at} must be a text or a list of at most {MAX_STOP_STRINGS} texts")
    for one in stops:
        if not isinstance(one, str) or not 0 < len(one) <= MAX_STOP_CHARS:
            raise bad_parameter(at, f"every text of {at} must have 1 to {MAX_STOP_CHARS} characters")
        text(one, at)
    return tuple(stops)


def _max_tokens(values: Mapping[str, Any]) -> tuple[int | None, str]:
    given = [name for name in ("max_completion_tokens", "max_tokens") if values.get(name) is not None]
    if not given:
        return None, "max_tokens"
    found = {whole(values, name, 0, 1, MAX_COUNT) for name in given}
    if len(found) > 1:
        raise bad_parameter("max_tokens", "max_tokens and max_completion_tokens contradict each other")
    return found.pop(), given[0]


def _stop_ids(value: object, vocabulary: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOP_IDS:
        raise bad_parameter("stop_token_ids", f"stop_token_ids must be a list of at most {MAX_STOP_IDS} token ids")
    if not all(token_id(one, vocabulary) for one in value):
        raise bad_parameter(
            "stop_token_ids", f"the ids of stop_token_ids must be whole numbers from 0 to {vocabulary - 1}"
        )
    return tuple(value)


def _logit_bias(value: object, vocabulary: int) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise bad_parameter("logit_bias", f"logit_bias must be an object of at most {MAX_BIASES} token ids")
    biases = {}
    for name, bias in value.items():
        if not re.fullmatch("[0-9]{1,10}", name, re.ASCII) or int(name) >= vocabulary:
            raise bad_parameter(
                "logit_bias", f"the names in logit_bias must be token ids, whole numbers from 0 to {vocabulary - 1}"
            )
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise bad_parameter(
                "logit_bias", f"the values in logit_bias must be numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}"
            )
        biases[int(name)] = float(bias)
    return tuple(biases.items())


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise bad_parameter("stream_options", "stream_options is an object, and only allowed when stream is true")
    odd = sorted(
        name
        for name, value in options.items()
        if value is not None and name not in ("include_usage", "include_obfuscation")
    )
    if odd or options.get("include_obfuscation"):
        name = odd[0] if odd else "include_obfuscation"
        raise bad_parameter(f"stream_options.{name:.64}", f"{name:.64} is not supported", "unsupported_parameter")
    return boolean(options, "include_usage", "stream_options.")
