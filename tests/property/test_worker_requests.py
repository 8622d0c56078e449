"""Whatever a client sends is understood or refused with a parameter's name: nothing else comes out of the reader."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.requests import chat_request, completion_request, read_json

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("\ud800"), st.just(10**400)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.one_of(
    st.sampled_from(["model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options", "temperature"]),
    st.sampled_from(["top_p", "top_k", "max_tokens", "max_completion_tokens", "logit_bias", "tools", "user", "odd"]),
)
GOOD = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@given(st.dictionaries(NAMES, VALUES), st.booleans())
def test_any_object_is_read_or_refused_with_a_sentence(values: dict[str, Any], on_good: bool) -> None:
    for read in (chat_request, lambda given: completion_request(given, 1000)):
        try:
            read({**(GOOD if on_good else {}), **values})
        except Refused as refused:
            assert 400 <= refused.status < 500
            assert refused.message
            assert refused.param


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
    chat_request(read_json(json.dumps({**GOOD, **values}).encode()))


def test_text_parts_are_joined_and_developer_is_the_system() -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert chat_request({"model": "m", "messages": messages}).messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab"},
    ]
