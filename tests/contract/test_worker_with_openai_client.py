"""The real openai client against a real worker with the real model."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpumeter_usage.record import Status
from rigs.asking import CAPITAL, client, raw
from rigs.worker import USAGE_TOKEN, Ledger, WorkerProcess, hop_token, session_id, until, worker


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with worker(tmp_path_factory.mktemp("worker")) as process:
        yield process.ready()


def collected(served: WorkerProcess, ledger: Ledger, session: str) -> Status:
    def look() -> Status | None:
        served.collect(ledger)
        return ledger.ended(session)

    status: Status = until(look, f"the session {session} has ended in the ledger")
    return status


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


def test_a_whole_answer_carries_its_exact_gpu_seconds_and_session(served: WorkerProcess, ledger: Ledger) -> None:
    session = session_id()
    answer = client(served, session).chat.completions.with_raw_response.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=20
    )
    document = json.loads(answer.text, parse_float=str)
    assert answer.headers["x-gpumeter-session"] == session
    assert document["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert document["choices"][0]["finish_reason"] == "stop"
    usage = document["usage"]
    assert collected(served, ledger, session) is Status.FINISHED
    slices = ledger.of_session(session)
    gpu_ns = sum(record.gpu_ns for record in slices)
    assert usage["gpu_seconds"] == f"{gpu_ns // 10**9}.{gpu_ns % 10**9:09d}"
    assert usage["prompt_tokens"] == sum(record.prompt_tokens for record in slices)
    assert usage["completion_tokens"] == sum(record.completion_tokens for record in slices) == 8
    assert {record.tenant for record in slices} == {"acme"}
    # At least the prompt's keys and values, for as long as its steps took: 30 layers, 3 heads of 64, in float32.
    token_bytes = 2 * 30 * 3 * 64 * 4
    held = sum(record.kv_byte_s for record in slices)
    assert held >= usage["prompt_tokens"] * token_bytes * gpu_ns // 10**9 // 2
    assert held <= (usage["prompt_tokens"] + 8) * token_bytes * (slices[-1].ended_at - slices[0].started_at) // 10**9


def test_a_worker_without_a_gpu_says_that_there_is_none_to_look_at(served: WorkerProcess) -> None:
    assert served.metrics()['gpumeter_nvml_up{reason="NoGpu"}'] == 0
    assert not any(name.startswith("gpumeter_gpu_utilization") for name in served.metrics())
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{served.usage}/usage/v1/status", headers={"Authorization": f"Bearer {USAGE_TOKEN}"}
        ),
        timeout=30,
    ) as answer:
        told = json.load(answer)["gpu"]
    assert told["absence"]["reason"] == "NoGpu"
    assert (told["sample"], told["energy_estimate"], told["comparison"]) == (None, None, None)


def test_a_stream_says_the_same_and_ends_with_its_usage(served: WorkerProcess) -> None:
    chunks = list(
        client(served).chat.completions.create(
            model="smollm2",
            messages=CAPITAL,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The capital of France is Paris."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8
    assert last.usage.model_extra is not None
    assert last.usage.model_extra["gpu_seconds"] > 0


def test_a_stream_that_did_not_ask_for_usage_gets_none(served: WorkerProcess) -> None:
    chunks = client(served).chat.completions.create(
        model="team-a/smollm2", messages=CAPITAL, temperature=0, max_tokens=2, stream=True
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_an_aborted_stream_is_billed_for_what_it_used_and_stops_the_engine(
    served: WorkerProcess, ledger: Ledger
) -> None:
    session = session_id()
    stream = client(served, session, tenant="leaver").chat.completions.create(
        model="smollm2", messages=CAPITAL, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(4), stream, strict=False):
        pass
    stream.close()
    assert collected(served, ledger, session) is Status.CANCELLED
    slices = ledger.of_session(session)
    assert sum(record.gpu_ns for record in slices) > 0
    assert 2 <= sum(record.completion_tokens for record in slices) < 300
    assert {record.tenant for record in slices} == {"leaver"}
    until(lambda: served.metrics()['vllm:num_requests_running{model_name="smollm2"}'] == 0, "the engine is free again")


def test_a_client_that_leaves_before_a_whole_answer_is_billed_too(served: WorkerProcess, ledger: Ledger) -> None:
    session = session_id()
    body = json.dumps({"model": "smollm2", "messages": CAPITAL, "max_tokens": 900, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", served.http)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: worker\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {hop_token(session=session)}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: served.metrics()['vllm:num_requests_running{model_name="smollm2"}'] > 0, "it runs")
    assert collected(served, ledger, session) is Status.CANCELLED
    assert sum(record.gpu_ns for record in ledger.of_session(session)) > 0


def test_a_stop_string_across_token_edges_ends_the_answer_as_finished(served: WorkerProcess, ledger: Ledger) -> None:
    session = session_id()
    answer = client(served, session).chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=20, stop=["nce is Pa"]
    )
    assert answer.choices[0].message.content == "The capital of Fra"
    assert answer.choices[0].finish_reason == "stop"
    assert collected(served, ledger, session) is Status.FINISHED


def test_max_tokens_ends_with_the_reason_length(served: WorkerProcess) -> None:
    answer = client(served).chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_completion_tokens=3
    )
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "The capital of")


def test_completions_take_text_or_token_ids(served: WorkerProcess) -> None:
    by_text = client(served).completions.create(model="smollm2", prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert by_text.choices[0].text.startswith(" 5")
    by_ids = client(served).completions.create(model="smollm2", prompt=[1, 2, 3], temperature=0, max_tokens=2)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3


def test_the_same_seed_gives_the_same_answer_whatever_else_runs(served: WorkerProcess) -> None:
    def ask(seed: int, session: str | None = None) -> str:
        answer = client(served, session).chat.completions.create(
            model="smollm2", messages=CAPITAL, temperature=1.3, top_p=0.95, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content or ""

    alone = ask(7)
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(ask, [1, 7, 2, 7, 3, 4]))
    assert together[1] == together[3] == alone
    assert len(set(together)) > 1


def test_the_model_is_listed(served: WorkerProcess) -> None:
    (model,) = client(served).models.list().data
    assert (model.id, model.owned_by) == ("smollm2", "team-a/smollm2")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"n": 0}, 400, "n"),
        ({"n": 9}, 400, "n"),
        ({"n": 2.0}, 400, "n"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"50000": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"stop_token_ids": [49152]}, 400, "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
        ({"min_p": 2}, 400, "min_p"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"best_of": 2}, 400, "best_of"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"echo": True}, 400, "echo"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"no_such_thing": 1}, 400, "no_such_thing"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        ({"model": "another"}, 404, "model"),
        ({"stop": [""]}, 400, "stop"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_cannot_be_done_is_refused_by_the_name_of_the_parameter(
    served: WorkerProcess, change: dict[str, Any], status: int, param: str
) -> None:
    answered, document = raw(served, json.dumps({"model": "smollm2", "messages": CAPITAL, **change}).encode())
    error = document["error"]
    assert (answered, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_bad_requests_never_hurt_the_good_one_that_runs_beside_them(served: WorkerProcess) -> None:
    def good() -> str:
        answer = client(served).chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=20)
        return answer.choices[0].message.content or ""

    bad = [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"model": "smollm2", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "smollm2", "messages": [{"role": "user", "content": "' + b"a" * 11 * 2**20 + b'"}]}', 413),
    ]
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(good) for _ in range(3)]
        for body, status in bad:
            assert raw(served, body)[0] == status
        body = json.dumps({"model": "smollm2", "prompt": [10**9]}).encode()
        assert raw(served, body, "/v1/completions")[0] == 400
        assert {answer.result() for answer in answers} == {"The capital of France is Paris."}


@pytest.mark.parametrize(
    "token",
    [
        "nothing",
        hop_token(key="another key that is long enough to sign with"),
        hop_token(exp=1),
        hop_token(aud="another service"),
        hop_token(iss="somebody"),
        hop_token(tenant="platform"),
        hop_token(tenant="Not A Label"),
        hop_token(session="chosen-by-a-client"),
    ],
    ids=[
        "no token",
        "other key",
        "expired",
        "other service",
        "other issuer",
        "reserved tenant",
        "bad tenant",
        "bad id",
    ],
)
def test_only_the_gateways_hop_token_opens_the_door(served: WorkerProcess, token: str) -> None:
    status, document = raw(served, json.dumps({"model": "smollm2", "messages": CAPITAL}).encode(), token=token)
    assert (status, document["error"]["type"]) == (401, "authentication_error")


def test_a_session_id_is_served_once(served: WorkerProcess) -> None:
    session = session_id()
    body = json.dumps({"model": "smollm2", "messages": CAPITAL, "max_tokens": 1}).encode()
    assert raw(served, body, token=hop_token(session=session))[0] == 200
    status, document = raw(served, body, token=hop_token("other", session=session))
    assert (status, document["error"]["code"]) == (409, "session_used")


def test_a_full_queue_is_told_at_the_door(served: WorkerProcess, ledger: Ledger) -> None:
    long = {"model": "smollm2", "messages": CAPITAL, "max_tokens": 900, "ignore_eos": True}
    streams = [
        client(served).chat.completions.create(
            model="smollm2", messages=CAPITAL, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in range(8 + 4)
    ]
    try:
        status, document = raw(served, json.dumps(long).encode())
        assert (status, document["error"]["code"]) == (429, "queue_full")
        until(lambda: served.metrics()['vllm:num_requests_waiting{model_name="smollm2"}'] == 4, "eight run, four wait")
    finally:
        for stream in streams:
            stream.close()
    until(lambda: served.metrics()['vllm:num_requests_waiting{model_name="smollm2"}'] == 0, "the queue is empty")


def test_usage_is_for_the_collector_alone(served: WorkerProcess) -> None:
    for token in ("", hop_token()):
        request = urllib.request.Request(
            f"http://127.0.0.1:{served.usage}/usage/v1/status", headers={"Authorization": f"Bearer {token}"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 401
        refused.value.close()


def test_the_log_holds_no_prompt_and_no_token(served: WorkerProcess) -> None:
    assert "capital" not in served.log
    assert "Bearer" not in served.log
    assert all(json.loads(line)["message"] for line in served.log.splitlines())


def test_every_record_of_all_this_adds_up(served: WorkerProcess, ledger: Ledger) -> None:
    until(lambda: served.metrics()['vllm:num_requests_running{model_name="smollm2"}'] == 0, "nothing runs")
    served.collect(ledger)
    ledger.check()
    accounts = {record.account for record in ledger.all()}
    assert {"init", "load", "warmup", "attributed", "idle"} <= accounts
