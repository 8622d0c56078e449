"""/openapi.json: the routes of port 8000, what they take and what they answer, errors included.

Owns the document. Written by hand, because the routes read bodies themselves; a test holds it against the routes, and
schemathesis holds it against a worker.
"""

from typing import Any

from gpumeter_usage.hop import SESSION_HEADER
from gpumeter_worker.api.schema import schemas

_REFUSALS = {
    400: "The request cannot be understood or does not fit; `param` names the field that is to blame.",
    401: "The caller did not prove who it is.",
    404: "Another model than the one that is served here.",
    408: "The body stopped coming.",
    409: "The session was served already.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The engine failed while it served this request.",
    503: "The worker does not serve now, or was stopped while it served this; `Retry-After` says when to try again.",
}
_EVENTS = (
    "Server-sent events, where `stream` is true: a chunk of one choice in every event, then the usage if "
    "`stream_options.include_usage` is true, then `[DONE]`. A request that fails on the way ends with an error."
)


def openapi_document(models: list[str]) -> dict[str, Any]:
    """The document of a worker that answers to these names."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gpumeter worker",
            "version": "1",
            "description": "OpenAI's API for one model, metered. Called through the gateway, which signs who pays.",
        },
        "paths": {
            "/v1/chat/completions": _generating("Continue a conversation.", "ChatCompletionRequest", "ChatCompletion"),
            "/v1/completions": _generating("Continue a text, or several.", "CompletionRequest", "Completion"),
            "/generate": _generating("The plain batch call.", "GenerateRequest", "Generated", streams=False),
            "/v1/models": _reading("The one model that is served here.", "Models", [401]),
            "/v1/models/{model}": {
                **_reading("The model by its name, or by the name of its service.", "Model", [401, 404]),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                ],
            },
            "/healthz": {"get": {"summary": "The process answers.", "responses": {"200": _json({"type": "object"})}}},
            "/readyz": {
                "get": {
                    "summary": "Whether work is admitted, and why not.",
                    "responses": {"200": _json(_ref("Readiness")), "503": _json(_ref("Readiness"))},
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Prometheus' text format.",
                    "responses": {
                        "200": {
                            "description": "The metrics.",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": schemas(models),
            "securitySchemes": {
                "hop": {"type": "http", "scheme": "bearer", "description": "The gateway's token: tenant and session."}
            },
        },
    }


def _generating(summary: str, request: str, answer: str, *, streams: bool = True) -> dict[str, Any]:
    answered = _json(_ref(answer))
    answered["headers"] = {
        SESSION_HEADER: {"description": "The id that the session is metered under.", "schema": {"type": "string"}}
    }
    if streams:
        # The schema of one event, as readers of such documents take it.
        answered["content"]["text/event-stream"] = {
            "schema": {"type": "object", "description": _EVENTS, "properties": {"data": {"type": "string"}}}
        }
    return {
        "post": {
            "summary": summary,
            "security": [{"hop": []}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
            "responses": {"200": answered, **{str(status): _refusal(status) for status in _REFUSALS}},
        }
    }


def _reading(summary: str, answer: str, refusals: list[int]) -> dict[str, Any]:
    responses = {"200": _json(_ref(answer)), **{str(status): _refusal(status) for status in refusals}}
    return {"get": {"summary": summary, "security": [{"hop": []}], "responses": responses}}


def _refusal(status: int) -> dict[str, Any]:
    return {**_json(_ref("Error")), "description": _REFUSALS[status]}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "As asked.", "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
