"""The whole surface of chat completions, completions and /generate, by the real openai client where it can."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from gpumeter_usage.record import Status
from rigs.asking import CAPITAL, ask, client, raw
from rigs.worker import Ledger, WorkerProcess, session_id, until, worker

ANSWER = "The capital of France is Paris."
SAMPLED: dict[str, Any] = {"model": "smollm2", "messages": CAPITAL, "temperature": 1.2, "seed": 5, "max_tokens": 8}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with worker(tmp_path_factory.mktemp("worker")) as process:
        yield process.ready()


def streamed(served: WorkerProcess, **values: Any) -> tuple[dict[int, str], dict[int, list[Any]], list[Any]]:
    """Texts and log probabilities by choice, and all chunks."""
    texts: dict[int, str] = {}
    listed: dict[int, list[Any]] = {}
    chunks = list(client(served).chat.completions.create(**values, stream=True))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs:
                listed.setdefault(choice.index, []).extend(choice.logprobs.content or [])
    return texts, listed, chunks


def test_several_answers_differ_and_the_first_is_the_one_that_is_given_alone(served: WorkerProcess) -> None:
    alone = client(served).chat.completions.create(**SAMPLED).choices[0].message.content
    answer = client(served).chat.completions.create(**SAMPLED, n=4)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == alone
    assert len(set(texts)) == 4
    assert answer.usage is not None
    one = client(served).chat.completions.create(**SAMPLED).usage
    assert one is not None
    assert answer.usage.prompt_tokens == one.prompt_tokens
    assert answer.usage.completion_tokens == 32


def test_streamed_answers_come_interleaved_and_are_the_same_as_whole_ones(served: WorkerProcess) -> None:
    whole = client(served).chat.completions.create(**SAMPLED, n=3)
    texts, _, chunks = streamed(served, **SAMPLED, n=3, stream_options={"include_usage": True})
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    order = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert order != sorted(order), "the answers came one after another"
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["length"] * 3
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24


def test_a_stop_string_ends_one_answer_and_leaves_the_others(served: WorkerProcess) -> None:
    whole = client(served).chat.completions.create(**SAMPLED | {"max_tokens": 24}, n=3)
    texts = [choice.message.content or "" for choice in whole.choices]
    word = texts[0][4:8]
    assert not any(word in text for text in texts[1:])
    session = session_id()
    stopped = client(served, session).chat.completions.create(**SAMPLED | {"max_tokens": 24}, n=3, stop=word)
    assert [choice.message.content for choice in stopped.choices] == [texts[0].split(word)[0], *texts[1:]]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert whole.usage is not None
    assert stopped.usage.completion_tokens < whole.usage.completion_tokens
    ledger = Ledger()

    def ended() -> Status | None:
        served.collect(ledger)
        return ledger.ended(session)

    assert until(ended, "the session ended") is Status.FINISHED
    assert sum(one.completion_tokens for one in ledger.of_session(session)) == stopped.usage.completion_tokens


def test_log_probabilities_of_a_chat_are_openais_and_the_same_when_streamed(served: WorkerProcess) -> None:
    asked = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_tokens": 20}
    answer = client(served).chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content
    assert "".join(one.token for one in content) == answer.choices[0].message.content == ANSWER
    assert bytes(byte for one in content for byte in one.bytes or []).decode() == ANSWER
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0  # greedy: the likeliest
        assert one.top_logprobs[0].token == one.token
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1.0001
    _, listed, _ = streamed(served, **asked, logprobs=True, top_logprobs=3)
    assert [one.token for one in listed[0]] == [one.token for one in content]
    assert [one.logprob for one in listed[0]] == pytest.approx([one.logprob for one in content], abs=1e-3)
    without = client(served).chat.completions.create(**asked, logprobs=True)
    assert without.choices[0].logprobs is not None
    assert all(one.top_logprobs == [] for one in without.choices[0].logprobs.content or [])


def test_log_probabilities_of_a_completion_list_every_token_where_it_stands(served: WorkerProcess) -> None:
    asked = {"model": "smollm2", "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    choice = client(served).completions.create(**asked).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:at])) for at in range(len(found.tokens))]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2
    chunks = list(client(served).completions.create(**asked, stream=True))
    streamed_tokens = [
        token for chunk in chunks for one in chunk.choices if one.logprobs for token in one.logprobs.tokens or []
    ]
    assert streamed_tokens == found.tokens
    assert "".join(one.text for chunk in chunks for one in chunk.choices) == choice.text


def test_a_list_of_prompts_gets_its_answers_in_order(served: WorkerProcess) -> None:
    prompts = ["1, 2, 3, 4,", "a, b, c, d,"]
    alone = [
        client(served).completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=4).choices[0].text
        for prompt in prompts
    ]
    answer = client(served).completions.create(model="smollm2", prompt=prompts, temperature=0, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    ids = client(served).completions.create(model="smollm2", prompt=[[1, 2], [3]], temperature=0, max_tokens=1)
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 2)


def test_a_completion_without_max_tokens_has_sixteen(served: WorkerProcess) -> None:
    answer = client(served).completions.create(
        model="smollm2", prompt="1, 2, 3,", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_biases_penalties_and_cuts_change_what_is_said(served: WorkerProcess) -> None:
    def said(**values: Any) -> str:
        status, document = ask(
            served, model="smollm2", messages=CAPITAL, **{"temperature": 0, "max_tokens": 12, **values}
        )
        assert status == 200, document
        return str(document["choices"][0]["message"]["content"])

    _, document = ask(
        served, "/v1/completions", model="smollm2", prompt="x", max_tokens=1, logit_bias={"2": -100, "28": 100}
    )
    assert document["choices"][0]["text"] == ","
    assert said() == ANSWER
    assert said(temperature=2, top_k=1) == said(temperature=2, top_p=1e-9) == said(temperature=2, min_p=1) == ANSWER
    assert said(repetition_penalty=5) != ANSWER
    assert len(set(said(frequency_penalty=2, presence_penalty=2, max_tokens=40, ignore_eos=True).split())) > 5


def test_an_answer_ends_by_a_token_and_not_before_it_may(served: WorkerProcess) -> None:
    def tokens(**values: Any) -> tuple[str, int, str]:
        _, document = ask(served, model="smollm2", messages=CAPITAL, temperature=0, max_tokens=20, **values)
        (choice,) = document["choices"]
        return choice["message"]["content"], document["usage"]["completion_tokens"], choice["finish_reason"]

    assert tokens() == (ANSWER, 8, "stop")
    content, count, reason = tokens(min_tokens=15)
    assert content.startswith(ANSWER[:-1])
    assert (count >= 15, reason in ("stop", "length")) == (True, True)
    _, listed = ask(served, "/generate", inputs="1, 2,", parameters={"max_new_tokens": 3, "details": True})
    first, second = (token["id"] for token in listed["details"]["tokens"][:2])
    _, ended = ask(
        served, "/v1/completions", model="smollm2", prompt="1, 2,", temperature=0, max_tokens=9, stop_token_ids=[second]
    )
    assert first != second
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["text"] == listed["details"]["tokens"][0]["text"]
    assert ended["usage"]["completion_tokens"] == 2


def test_generate_answers_a_text_with_an_object_and_a_list_with_a_list(served: WorkerProcess) -> None:
    status, one = ask(served, "/generate", inputs="1, 2, 3, 4,", parameters={"max_new_tokens": 6})
    assert status == 200
    assert set(one) == {"generated_text", "usage"}
    assert one["generated_text"].startswith(" 5")
    inputs = ["1, 2, 3, 4,", "a, b, c, d,"]
    status, many = ask(
        served,
        "/generate",
        inputs=inputs,
        parameters={"max_new_tokens": 6, "details": True, "top_n_tokens": 2, "stop": ["6"], "return_full_text": True},
    )
    assert status == 200
    first, second = many
    assert first["generated_text"].startswith(inputs[0] + " 5")
    assert first["details"]["finish_reason"] == "stop_sequence"
    assert second["details"]["finish_reason"] == "length"
    assert second["details"]["generated_tokens"] == len(second["details"]["tokens"]) == 6
    assert all(len(top) == 2 for top in second["details"]["top_tokens"])
    assert inputs[1] + "".join(one["text"] for one in second["details"]["tokens"]) == second["generated_text"]
    assert "usage" not in first
    assert second["usage"]["completion_tokens"] >= first["details"]["generated_tokens"] + 6
    assert second["usage"]["gpu_seconds"] > 0


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [1]}, "inputs"),
        ({"inputs": ["x"] * 13}, "inputs"),
        ({"inputs": "x", "stream": True}, "stream"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 5000}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"typical_p": 0.5}}, "parameters.typical_p"),
        ({"inputs": "x", "parameters": {"temperature": 3}}, "parameters.temperature"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_generate_refuses_by_the_name_of_the_field(served: WorkerProcess, values: dict[str, Any], param: str) -> None:
    status, document = ask(served, "/generate", **values)
    assert (status, document["error"]["param"]) == (400, param)


def test_a_model_is_found_by_its_name_and_its_services(served: WorkerProcess) -> None:
    assert client(served).models.retrieve("smollm2").id == "smollm2"
    assert raw(served, None, "/v1/models/team-a/smollm2")[1]["id"] == "team-a/smollm2"
    status, document = raw(served, None, "/v1/models/another")
    assert (status, document["error"]["code"]) == (404, "model_not_found")


def test_what_the_client_sends_back_of_an_earlier_answer_is_understood(served: WorkerProcess) -> None:
    first = client(served).chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=20)
    again = client(served).chat.completions.create(
        model="smollm2",
        messages=[
            {"role": "developer", "content": "Be short."},
            *CAPITAL,
            first.choices[0].message,
            {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
        ],
        temperature=0,
        max_tokens=20,
    )
    assert "Rome" in (again.choices[0].message.content or "")
