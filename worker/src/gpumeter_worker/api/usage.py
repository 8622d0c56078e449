"""Port 8001: the usage protocol, for the collector alone.

Owns the routes of gpumeter_usage.page and their errors. Does not know what the records say.
"""

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from gpumeter_usage.page import (
    MAX_PAGE_RECORDS,
    PageInvalid,
    decode_acknowledgement,
    encode_page,
    encode_status,
)
from gpumeter_worker.api.app import read_body, translate_errors
from gpumeter_worker.api.desk import UsageDesk
from gpumeter_worker.api.errors import Refused, bad_parameter
from gpumeter_worker.api.identity import is_collector
from gpumeter_worker.metering.journal import AcknowledgementRefused
from gpumeter_worker.metering.journalfile import JournalUnusable
from gpumeter_worker.metering.journalpages import RecordsGone

_MAX_ACKNOWLEDGEMENT_BYTES = 4096


def usage_app(worker: UsageDesk) -> FastAPI:
    """The application of port 8001."""
    app = FastAPI(title="gpumeter worker usage", docs_url=None, redoc_url=None, openapi_url=None)
    translate_errors(app)

    @app.get("/usage/v1/status")
    async def status(request: Request) -> Response:
        """Every boot in the journal, and beside it what is known of the GPU: signals and estimates, never a bill."""
        _refuse_others(request, worker)
        try:
            status = encode_status(await worker.journal.status(), {"gpu": worker.gpu.facts()})
            return Response(status, media_type="application/json")
        except JournalUnusable as error:
            raise _unusable(error) from None

    @app.get("/usage/v1/records")
    async def records(request: Request) -> Response:
        """Records of one boot, in order, as they are on disk."""
        _refuse_others(request, worker)
        query = request.query_params
        boot_id = query.get("boot", "")
        after = _whole(query.get("after", "0"), "after")
        limit = _whole(query.get("limit", str(MAX_PAGE_RECORDS)), "limit")
        try:
            page = await worker.journal.page(boot_id, after, max(1, limit))
        except JournalUnusable as error:
            raise _unusable(error) from None
        except RecordsGone as error:
            raise Refused(410, "records_gone", str(error), "after") from None
        if page is None:
            raise Refused(404, "unknown_boot", f"the journal holds no boot {boot_id!r:.60}", "boot")
        return Response(encode_page(page), media_type="application/x-ndjson")

    @app.get("/usage/v1/profile")
    async def profile(request: Request) -> Response:
        """The parameters behind every profile_hash that this journal's records name, and which are in use."""
        _refuse_others(request, worker)
        return JSONResponse(worker.profiles.document())

    @app.post("/usage/v1/acknowledge")
    async def acknowledge(request: Request) -> Response:
        """Everything up to a record is in the ledger."""
        _refuse_others(request, worker)
        try:
            given = decode_acknowledgement(await read_body(request, _MAX_ACKNOWLEDGEMENT_BYTES))
            await worker.journal.acknowledge(given)
        except PageInvalid as error:
            raise Refused(400, "invalid_acknowledgement", str(error)) from None
        except AcknowledgementRefused as error:
            raise Refused(409, "acknowledgement_refused", str(error)) from None
        except JournalUnusable as error:
            raise _unusable(error) from None
        return Response(status_code=204)

    return app


def _refuse_others(request: Request, worker: UsageDesk) -> None:
    if not is_collector(request.headers.get("authorization"), worker.settings):
        raise Refused(
            401,
            "invalid_usage_token",
            "usage is read with the service's usage token",
            None,
            {"WWW-Authenticate": "Bearer"},
        )


def _unusable(error: JournalUnusable) -> Refused:
    return Refused(503, "journal_unusable", str(error), headers={"Retry-After": "5"})


def _whole(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise bad_parameter(name, f"{name} must be a whole number that is not negative")
    return int(text)
