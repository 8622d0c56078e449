"""Port 8000: OpenAI's routes, health, metrics.

Owns the routes and the order of checks: who calls, how large, what is asked, whether it fits, whether it is admitted.
Computes nothing itself.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from gpumeter_worker.api.errors import Refused, bad_parameter, error_document, error_response
from gpumeter_worker.api.identity import Caller, caller
from gpumeter_worker.api.requests import Generation, chat_request, completion_request, read_json
from gpumeter_worker.api.responses import CHAT, COMPLETION, Answer, EventStream, Shape, WholeAnswer
from gpumeter_worker.api.sessions import Choice
from gpumeter_worker.api.text import TextStream
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metrics import exposition
from gpumeter_worker.worker import Worker

log = logging.getLogger(__name__)

_DISCARD_BYTES = 32 * 2**20
"""How much of a body that is too large is read and thrown away, because a client that is still sending when its
connection closes sees a reset instead of the reason."""


def api_app(worker: Worker) -> FastAPI:
    """The application of port 8000."""
    app = FastAPI(title="gpumeter worker", docs_url=None, redoc_url=None)
    translate_errors(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""

        async def read(values: dict[str, Any]) -> tuple[Generation, list[int]]:
            _, tokenizer = worker.refuse_unless_ready()
            asked = chat_request(values)
            _refuse_other_model(asked.generation, worker)
            return asked.generation, await tokenizer.conversation(asked.messages)

        return await _generate(worker, request, CHAT, read)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue a text."""

        async def read(values: dict[str, Any]) -> tuple[Generation, list[int]]:
            engine, tokenizer = worker.refuse_unless_ready()
            asked = completion_request(values, engine.vocabulary)
            _refuse_other_model(asked.generation, worker)
            prompt = asked.prompt
            return asked.generation, await tokenizer.text(prompt) if isinstance(prompt, str) else prompt

        return await _generate(worker, request, COMPLETION, read)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The one model that is served here."""
        caller(request.headers.get("authorization"), worker.settings)
        model = {
            "id": worker.settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": worker.settings.service,
            "max_model_len": worker.engine.max_model_len if worker.engine else None,
        }
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/healthz")
    async def healthz() -> Response:
        """The event loop turns."""
        return JSONResponse({"ok": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether work is admitted, and why not."""
        state = worker.readiness()
        document = {"ready": state.ready, "reason": state.reason, "message": state.message}
        return JSONResponse(document, 200 if state.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(exposition(worker), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _generate(
    worker: Worker,
    request: Request,
    shape: Shape,
    read: Callable[[dict[str, Any]], Awaitable[tuple[Generation, list[int]]]],
) -> Response:
    called_by: Caller = caller(request.headers.get("authorization"), worker.settings)
    body = await read_body(request, worker.settings.max_body_bytes)
    generation, prompt = await read(read_json(body))
    engine, tokenizer = worker.refuse_unless_ready()
    sampling = _sampling(generation, prompt, engine.max_model_len)
    session = worker.submit(called_by, [Choice(prompt, sampling)])
    text = TextStream(tokenizer.decode, prompt, generation.stop)
    answer = Answer(worker, session, text, shape, generation.model, generation.include_usage)
    return EventStream(answer) if generation.stream else WholeAnswer(answer)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; what is too large is refused before it is in memory. Raises Refused (413)."""
    too_large = Refused(413, "body_too_large", f"the body is larger than {limit} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit + _DISCARD_BYTES:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
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


def _sampling(generation: Generation, prompt: list[int], max_model_len: int) -> Sampling:
    """Refuses what does not fit, at the door."""
    if not prompt:
        raise bad_parameter("prompt", "the prompt has no tokens")
    room = max_model_len - len(prompt)
    wanted = generation.max_tokens or 1
    if room < wanted:
        more = f" and {wanted} more are asked for" if generation.max_tokens else ""
        raise bad_parameter(
            generation.max_tokens_param if room > 0 and generation.max_tokens else "messages",
            f"the prompt has {len(prompt)} tokens{more}; this model holds {max_model_len}",
            "context_length_exceeded",
        )
    return Sampling(
        max_tokens=generation.max_tokens or room,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        seed=generation.seed,
        ignore_eos=generation.ignore_eos,
    )


def _refuse_other_model(generation: Generation, worker: Worker) -> None:
    if generation.model not in (worker.settings.model_name, worker.settings.service):
        raise Refused(
            404,
            "model_not_found",
            f"the model {generation.model!r:.100} is not served here; this worker serves {worker.settings.model_name}",
            "model",
        )


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
