"""Whatever a client sends is understood or refused with a parameter's name: nothing else comes out of the reader."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.api.admission import choices
from gpumeter_worker.api.errors import Refused, error_response
from gpumeter_worker.api.parameters import LABELS, MAX_SEED, NEUTRAL, UNDERSTOOD, Generation
from gpumeter_worker.api.requests import (
    GENERATE_PARAMETERS,
    chat_request,
    completion_request,
    generate_request,
    read_json,
)
from gpumeter_worker.engine.messages import Ready

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("\ud800"), st.just(10**400)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.sampled_from(
    [
        *UNDERSTOOD,
        *NEUTRAL,
        *LABELS,
        *("messages", "prompt", "inputs", "parameters", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs"),
        *("odd", "\ud800"),
    ]
)
VOCABULARY = 1000
GOOD = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@given(st.dictionaries(NAMES, VALUES), st.booleans())
def test_any_object_is_read_or_refused_with_a_sentence(values: dict[str, Any], on_good: bool) -> None:
    for read in (
        lambda given: chat_request(given, VOCABULARY),
        lambda given: completion_request(given, VOCABULARY),
        lambda given: generate_request(given, "m"),
    ):
        read_or_refused(read, {**(GOOD if on_good else {}), **values})


@given(st.dictionaries(st.sampled_from([*GENERATE_PARAMETERS, "odd", "\ud800"]), VALUES))
def test_any_parameters_of_a_plain_call_are_read_or_refused(parameters: dict[str, Any]) -> None:
    read_or_refused(lambda given: generate_request(given, "m"), {"inputs": "x", "parameters": parameters})


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "type", "function", "odd"]),
            VALUES | st.sampled_from(["user", "assistant", "tool", [{"function": {"name": "f", "arguments": "{"}}]]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_messages_are_read_or_refused(messages: list[dict[str, Any]]) -> None:
    read_or_refused(lambda given: chat_request(given, VOCABULARY), {"model": "m", "messages": messages})


def read_or_refused(read: Callable[[dict[str, Any]], object], values: dict[str, Any]) -> None:
    try:
        read(values)
    except Refused as refused:
        assert 400 <= refused.status < 500
        assert refused.message
        assert refused.param
        assert json.loads(error_response(refused).body)["error"]["message"]


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        assert isinstance(read_json(body), dict)
    except Refused as refused:
        assert refused.status == 400


@pytest.mark.parametrize(
    "values",
    [
        {"n": 1, "user": "me", "frequency_penalty": 0, "logit_bias": {}, "tools": [], "logprobs": False},
        {"temperature": 0, "top_p": 1, "seed": -5, "stop": "x", "max_tokens": 5, "max_completion_tokens": 5},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"temperature": None, "stop": None, "n": None, "odd": None},
    ],
)
def test_what_asks_for_nothing_special_is_accepted(values: dict[str, Any]) -> None:
    chat_request(read_json(json.dumps({**GOOD, **values}).encode()), VOCABULARY)


def test_text_parts_are_joined_and_developer_is_the_system() -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert chat_request({"model": "m", "messages": messages}, VOCABULARY).conversation.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab"},
    ]


def test_a_call_of_a_tool_reaches_the_template_as_an_object_and_its_result_by_its_id() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
    ]
    read = chat_request({"model": "m", "messages": messages}, VOCABULARY).conversation
    assert read.speaks_of_tools
    assert read.messages[1] == {
        "role": "assistant",
        "tool_calls": [{**call, "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
        "content": "",
    }
    assert read.messages[2] == {"role": "tool", "content": "12 °C", "tool_call_id": "c1"}


@pytest.mark.parametrize(("sent", "meant"), [(None, None), (False, None), (0, 0), (3, 3)])
def test_no_log_probabilities_and_those_of_no_other_tokens_are_two_things(sent: object, meant: int | None) -> None:
    asked = completion_request({"model": "m", "prompt": "x", "logprobs": sent}, VOCABULARY)
    assert asked.generation.logprobs == meant


def test_tools_that_may_not_be_called_are_not_shown_to_the_model() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice, shown in ((None, tools), ("auto", tools), ("none", [])):
        read = chat_request({**GOOD, "tools": tools, "tool_choice": choice}, VOCABULARY)
        assert read.conversation.tools == shown


def engine(max_batch_size: int = 8, max_model_len: int = 64) -> Ready:
    return Ready(0, max_model_len, max_batch_size, VOCABULARY, frozenset({2}), "a CPU", "", "float32", 512)


def test_choices_stand_prompt_by_prompt_and_each_prompt_counts_once() -> None:
    made = choices(Generation("m", max_tokens=4, n=2, seed=7), [[1, 2], [3]], engine(), 4, "prompt")
    assert [(one.prompt, one.counts_prompt) for one in made] == [
        ([1, 2], True),
        ([1, 2], False),
        ([3], True),
        ([3], False),
    ]
    assert [one.sampling.seed for one in made[:2]] == [one.sampling.seed for one in made[2:]]
    assert made[0].sampling.seed == 7 != made[1].sampling.seed


@pytest.mark.parametrize(
    ("generation", "prompts", "param"),
    [
        (Generation("m", n=9), [[1]], "n"),
        (Generation("m", n=4), [[1]] * 4, "prompt"),
        (Generation("m"), [[1], []], "prompt"),
        (Generation("m"), [[1] * 64], "prompt"),
        (Generation("m", max_tokens=60), [[1] * 5], "max_tokens"),
        (Generation("m", max_tokens=60, max_tokens_param="max_completion_tokens"), [[1] * 5], "max_completion_tokens"),
        (Generation("m", min_tokens=60), [[1] * 5], "min_tokens"),
    ],
)
def test_what_the_worker_can_never_hold_is_refused_by_the_field(
    generation: Generation, prompts: list[list[int]], param: str
) -> None:
    with pytest.raises(Refused) as refused:
        choices(generation, prompts, engine(), 4, "prompt")
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_route_gives_its_usual_number_of_tokens_or_what_fits() -> None:
    def given(prompt: int, **more: int) -> int:
        (choice,) = choices(Generation("m", **more), [[1] * prompt], engine(), 4, "prompt")
        return choice.sampling.max_tokens

    assert given(4) == 60
    assert given(4, usual_tokens=16) == 16
    assert given(60, usual_tokens=16) == 4
    assert given(4, usual_tokens=16, min_tokens=20) == 20
    assert given(4, usual_tokens=16, max_tokens=30) == 30


@given(st.integers(-MAX_SEED, MAX_SEED), st.integers(-MAX_SEED, MAX_SEED), st.integers(1, 4))
def test_different_seeds_are_different_to_the_engine_negative_ones_too(one: int, other: int, n: int) -> None:
    engine = Ready(0, 64, 8, VOCABULARY, frozenset(), "", "", "", 64)

    def seeds(seed: int) -> list[int]:
        made = choices(Generation("m", seed=seed, n=n), [[1]], engine, 0, "prompt")
        return [choice.sampling.seed or 0 for choice in made]

    for seed in (one, -one, other):
        assert min(seeds(seed)) >= 0, "Python's generator drops a sign"
    assert seeds(abs(one))[0] == abs(one)
    for left, right in ((one, other), (one, -one)):
        assert left == right or not {*seeds(left)} & {*seeds(right)}
