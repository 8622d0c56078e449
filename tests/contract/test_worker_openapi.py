"""Schemathesis against a real worker: what its OpenAPI says is what it does; no 5xx, no hang, errors with a sentence.

The model is tiny and short, so that the time goes into many requests. What cannot be tried: that every
body that the schema allows is accepted, for whether a prompt fits or a template knows tools is in no schema.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from rigs.asking import ask, raw
from rigs.tinymodel import tiny_model
from rigs.worker import Ledger, WorkerProcess, hop_token, until, worker

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
ANSWER_TIMEOUT_S = 20
GENERATING = ("/v1/chat/completions", "/v1/completions", "/generate")
READING = ("/v1/models", "/v1/models/{model}", "/healthz", "/readyz", "/metrics")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    model = tiny_model(tmp_path_factory.mktemp("model"))
    changed = {
        "GPUMETER_MODEL_URI": f"file://{model}",
        "GPUMETER_MAX_MODEL_LEN": "64",
        "GPUMETER_MAX_QUEUE_LENGTH": "64",
    }
    with worker(tmp_path_factory.mktemp("worker"), changed) as process:
        yield process.ready()


@pytest.fixture(scope="module")
def described(served: WorkerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.fixture(scope="module")
def seen() -> Counter[int]:
    """How often each status came."""
    return Counter()


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *(("POST", path, mode) for path in GENERATING for mode in GenerationMode),
        *(("GET", path, GenerationMode.POSITIVE) for path in READING),
    ],
    ids=lambda value: getattr(value, "value", value),
)
def test_every_route_does_what_the_document_says(
    described: Any, method: str, path: str, mode: GenerationMode, seen: Counter[int]
) -> None:
    @settings(
        max_examples=60 if method == "POST" else 10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(described[path][method].as_strategy(generation_mode=mode))
    def holds(case: schemathesis.Case) -> None:
        headers = {"Authorization": f"Bearer {hop_token()}"}
        response = case.call_and_validate(headers=headers, timeout=ANSWER_TIMEOUT_S, checks=CHECKS)
        seen[response.status_code] += 1

    holds()


def test_requests_of_all_kinds_were_among_them(seen: Counter[int]) -> None:
    assert seen[200] > 50
    assert seen[400] > 100


def test_the_document_names_every_route_and_no_other(served: WorkerProcess) -> None:
    status, document = raw(served, None, "/openapi.json")
    assert status == 200
    assert set(document["paths"]) == {*GENERATING, *READING}
    for path in document["paths"]:
        (method,) = set(document["paths"][path]) - {"parameters"}
        asked = path.replace("{model}", "smollm2")
        if method == "post":
            assert raw(served, b"{}", asked)[0] == 400
        elif asked != "/metrics":
            assert raw(served, None, asked)[0] == 200
    assert raw(served, None, "/v1/embeddings")[0] == 404


def test_after_all_that_the_worker_serves_and_the_books_add_up(served: WorkerProcess) -> None:
    status, document = ask(served, "/generate", inputs="1, 2, 3, 4,", parameters={"max_new_tokens": 2})
    assert (status, document["usage"]["completion_tokens"]) == (200, 2)
    until(lambda: served.metrics()['vllm:num_requests_running{model_name="smollm2"}'] == 0, "nothing runs")
    assert "Traceback" not in served.log
    ledger = Ledger()
    served.collect(ledger)
    ledger.check()
