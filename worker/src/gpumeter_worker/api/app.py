"""Port 8000: OpenAI's routes, health, metrics.

Owns the routes and the order of checks: who calls, how large, what is asked, whether it fits, whether it is admitted.
Computes nothing itself.
"""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from gpumeter_worker.api.admission import choices
from gpumeter_worker.api.answer import Answer, ChoiceText
from gpumeter_worker.api.desk import Desk
from gpumeter_worker.api.errors import Refused, error_document, error_response
from gpumeter_worker.api.generate import BatchAnswer
from gpumeter_worker.api.identity import Caller, caller
from gpumeter_worker.api.openapi import openapi_document
from gpumeter_worker.api.parameters import Generation
from gpumeter_worker.api.requests import Prompt, chat_request, completion_request, generate_request, read_json
from gpumeter_worker.api.responses import CHAT, COMPLETION, EventStream, Shape, Wanted, WholeAnswer
from gpumeter_worker.metering.attribution import Costs
from gpumeter_worker.metering.capacity import capacity
from gpumeter_worker.metering.profiles import CALIBRATED

log = logging.getLogger(__name__)

_DISCARD_BYTES = 32 * 2**20
"""How much of a body that is too large is read and thrown away, because a client that is still sending when its
connection closes sees a reset instead of the reason."""

_BODY_IDLE_S = 20.0
"""How long a client may be silent in the middle of its body."""


def api_app(worker: Desk) -> FastAPI:
    """The application of port 8000."""
    app = FastAPI(title="gpumeter worker", docs_url=None, redoc_url=None)
    document = openapi_document([worker.settings.model_name, worker.settings.service])
    app.openapi = lambda: document  # type: ignore[method-assign]
    translate_errors(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""
        called_by, values = await _asked(worker, request)
        engine, tokenizer = worker.refuse_unless_ready()
        asked = chat_request(values, engine.vocabulary)
        _refuse_other_model(asked.generation.model, worker)
        prompt = await tokenizer.conversation(asked.conversation, engine.max_model_len)
        answer = _admit(worker, called_by, asked.generation, [prompt], "messages")
        return _openai(answer, asked.generation, CHAT)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue a text, or several."""
        called_by, values = await _asked(worker, request)
        engine, _ = worker.refuse_unless_ready()
        asked = completion_request(values, engine.vocabulary)
        _refuse_other_model(asked.generation.model, worker)
        prompts = await _encoded(worker, asked.prompts, "prompt")
        answer = _admit(worker, called_by, asked.generation, prompts, "prompt")
        return _openai(answer, asked.generation, COMPLETION)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        """The plain batch call."""
        called_by, values = await _asked(worker, request)
        asked = generate_request(values, worker.settings.model_name)
        _refuse_other_model(asked.generation.model, worker)
        prompts = await _encoded(worker, asked.prompts, "inputs")
        return BatchAnswer(_admit(worker, called_by, asked.generation, prompts, "inputs", keeps=True), asked)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The one model that is served here."""
        caller(request.headers.get("authorization"), worker.settings)
        return JSONResponse({"object": "list", "data": [_model(worker, worker.settings.model_name)]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """The model by its name, or by the name of its service."""
        caller(request.headers.get("authorization"), worker.settings)
        _refuse_other_model(model, worker)
        return JSONResponse(_model(worker, model))

    @app.get("/healthz")
    async def healthz() -> Response:
        """The event loop turns."""
        return JSONResponse({"ok": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether work is admitted, and why not."""
        state = worker.readiness()
        document: dict[str, Any] = {"ready": state.ready, "reason": state.reason, "message": state.message}
        if (adopted := worker.attribution) is not None:
            document["attribution"] = {"reason": adopted.reason, "message": adopted.message}
        if state.ready and (figures := capacity_of(worker)) is not None:
            document["capacity"] = figures
        return JSONResponse(document, 200 if state.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(worker.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def capacity_of(worker: Desk) -> dict[str, Any] | None:
    """What this worker can do, where its steps were timed."""
    engine, adopted = worker.engine, worker.attribution
    if engine is None or adopted is None or adopted.reason != CALIBRATED:
        return None
    found = adopted.profile
    figures = capacity(
        Costs(found.t0_ps, found.phi_ps, found.lam_ps, found.kap_ps, found.alp_ps),
        batch_most=engine.max_batch_size,
        sequence_most=engine.max_model_len,
        cache_tokens=engine.cache_tokens,
        devices=worker.settings.ranks,
    )
    if figures is None:
        return None
    sample = worker.gpu.sample
    told = {"profileHash": found.hash, "gpuClass": worker.settings.gpu_class, **figures}
    if sample is not None and sample.memory_total_bytes is not None and sample.memory_used_bytes is not None:
        told["memoryHeadroomBytes"] = max(sample.memory_total_bytes - sample.memory_used_bytes, 0)
    return told


async def _asked(worker: Desk, request: Request) -> tuple[Caller, dict[str, Any]]:
    """Who asks, and the object that was sent. Raises Refused."""
    called_by = caller(request.headers.get("authorization"), worker.settings)
    return called_by, read_json(await read_body(request, worker.settings.max_body_bytes))


async def _encoded(worker: Desk, prompts: list[Prompt], param: str) -> list[list[int]]:
    engine, tokenizer = worker.refuse_unless_ready()
    return [
        await tokenizer.text(prompt, engine.max_model_len, param) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _admit(
    worker: Desk, called_by: Caller, asked: Generation, prompts: list[list[int]], param: str, *, keeps: bool = False
) -> Answer:
    """From here on the request is a session, and whoever gets it must see it to its end. Raises Refused."""
    engine, tokenizer = worker.refuse_unless_ready()
    wanted = choices(asked, prompts, engine, worker.settings.max_queue_length, param)
    session = worker.submit(called_by, wanted)
    texts = [ChoiceText(tokenizer, one, asked.stop, engine.eos_ids, keeps=keeps) for one in wanted]
    return Answer(worker, session, tokenizer, texts)


def _openai(answer: Answer, asked: Generation, shape: Shape) -> Response:
    wanted = Wanted(shape, asked.model, asked.logprobs is not None, asked.include_usage)
    return EventStream(answer, wanted) if asked.stream else WholeAnswer(answer, wanted)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; what is too large is refused before it is in memory. Raises Refused (413)."""
    too_large = Refused(413, "body_too_large", f"the body is larger than {limit} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit + _DISCARD_BYTES:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(_BODY_IDLE_S):
                chunk = await anext(stream, None)
        except TimeoutError:
            message = f"nothing of the body came for {_BODY_IDLE_S:.0f} s; send the request again, whole"
            raise Refused(408, "body_timeout", message, headers={"Connection": "close"}) from None
        if chunk is None:
            break
        size += len(chunk)
        if size > limit + _DISCARD_BYTES:
            raise too_large
        if size > limit:
            chunks.clear()
        else:
            chunks.append(chunk)
    if size > limit:
        raise too_large
    return b"".join(chunks)


def _refuse_other_model(model: str, worker: Desk) -> None:
    if model not in (worker.settings.model_name, worker.settings.service):
        raise Refused(
            404,
            "model_not_found",
            f"the model {model!r:.100} is not served here; this worker serves {worker.settings.model_name}",
            "model",
        )


def _model(worker: Desk, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": worker.settings.service,
        "max_model_len": worker.engine.max_model_len if worker.engine else None,
    }


def translate_errors(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)  # noqa: S101 - what the decorator says
        return error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it: the client left before its request was whole

    @app.exception_handler(HTTPException)
    async def not_routed(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return JSONResponse(
            error_document(error.status_code, code, str(error.detail)), error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        log.error("a request to %s failed", request.url.path, exc_info=error)
        return JSONResponse(error_document(500, "internal_error", "the worker failed on this request"), 500)
