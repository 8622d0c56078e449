"""Errors as OpenAI's clients read them.

Owns the shape and the codes. Does not know why something was refused: the one who refuses says so in a sentence.
"""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class Refused(Exception):
    """A request that gets an error instead of tokens. `param` names the field of the request that is to blame."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or {}


def bad_parameter(param: str, message: str, code: str = "invalid_value") -> Refused:
    """A 400 that names the parameter."""
    return Refused(400, code, message, param)


def unavailable(code: str, message: str, retry_after_s: int) -> Refused:
    """A 503: the same request may be sent again, here later or to another worker now."""
    return Refused(503, code, message, headers={"Retry-After": str(retry_after_s)})


def error_document(status: int, code: str, message: str, param: str | None = None) -> dict[str, object]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    sayable = message.encode(errors="replace").decode()  # what a client sent may be quoted, and may be no text
    named = None if param is None else param.encode(errors="replace").decode()
    return {"error": {"message": sayable, "type": kind, "param": named, "code": code}}


def error_response(refused: Refused) -> JSONResponse:
    """The HTTP answer to a refusal."""
    return JSONResponse(
        error_document(refused.status, refused.code, refused.message, refused.param),
        status_code=refused.status,
        headers=dict(refused.headers),
    )
