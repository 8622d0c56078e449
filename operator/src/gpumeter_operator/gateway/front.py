"""The front door's handlers: from a client's request to a worker's answer.

Owns the order of things: tenant, body, service, seat at a worker, answer; and that every request ends with exactly one
outcome in metrics and log. Decisions are made elsewhere (keys, ask, models, doorman, hop). Does not know the cluster.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gpumeter_operator.gateway import ask, hop, models, refusal
from gpumeter_operator.gateway.budget import Budget, Hold
from gpumeter_operator.gateway.doorman import Doorman, Visit
from gpumeter_operator.gateway.endpoints import Endpoint
from gpumeter_operator.gateway.keys import tenant_of
from gpumeter_operator.gateway.models import Service
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.relay import Answer, Errand, Relay
from gpumeter_operator.gateway.reply import Reply
from gpumeter_operator.gateway.routing import Failure, Retry
from gpumeter_operator.gateway.settings import Settings
from gpumeter_operator.gateway.telemetry import Telemetry
from gpumeter_operator.gateway.world import World
from gpumeter_usage.hop import SESSION_HEADER, new_session

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # as nginx writes it; nobody receives it

HopKeyOf = Callable[[str], str]  # service uid -> key that its workers verify with


@dataclass(slots=True)
class Trip:
    """What becomes of one request, for metrics and log."""

    session: str
    request_id: str
    started_at_s: float
    tenant: str = ""
    service: str = ""
    code: int = 0
    note: str = ""
    read_at_s: float = 0.0
    waited_s: float = 0.0  # for a worker

    def headers(self) -> dict[str, str]:
        """What every answer carries, errors too."""
        named = {SESSION_HEADER: self.session}
        if self.request_id:
            named[hop.REQUEST_ID_HEADER] = self.request_id
        return named


class Front:
    """All routes of the gateway."""

    def __init__(
        self,
        world: World,
        doorman: Doorman,
        relay: Relay,
        telemetry: Telemetry,
        *,
        settings: Settings,
        hop_key_of: HopKeyOf,
    ) -> None:
        self._world = world
        self._doorman = doorman
        self._relay = relay
        self._telemetry = telemetry
        self._settings = settings
        self._hop_key_of = hop_key_of
        self._budget = Budget(held_max=settings.held_bytes_max, tenant_held_max=settings.tenant_held_bytes_max)
        telemetry.watch_held(lambda: self._budget.held)
        self.stopping = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @web.middleware
    async def around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """What holds for every route: one shape of errors, and no kept connections while the gateway stops."""
        response = await _in_openais_shape(request, handler)
        if self.stopping:
            response.force_close()  # the client's next request opens a connection to a gateway that stays
        return response

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions, /v1/completions and /generate, which all name their model in the field model."""
        trip = Trip(new_session(), hop.request_id(request.headers), time.monotonic())
        self.in_flight += 1
        self.idle.clear()
        try:
            response = await self._complete(request, trip)
            trip.code = trip.code or response.status
        except Refusal as why:
            trip.code, trip.note = why.status, why.code
            response = _refuse(why, trip)
        except (asyncio.CancelledError, ConnectionError):
            trip.code, trip.note = CLIENT_GONE, "client went away"
            raise
        except BaseException:
            trip.code, trip.note = 500, "failed"
            raise
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self.idle.set()
            self._telemetry.ended(trip.tenant, trip.service, trip.code)
            _log(trip)
        return response

    async def list_models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        self._tenant(request)
        return web.json_response({"object": "list", "data": models.listing(self._world.catalogue())})

    async def get_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/NAME; a qualified name brings a slash along."""
        self._tenant(request)
        catalogue = self._world.catalogue()
        return web.json_response(models.describe(catalogue, models.resolve(catalogue, request.match_info["model"])))

    async def healthz(self, _: web.Request) -> web.Response:
        """GET /healthz: the process answers, and its mirrors are alive.

        An API server that is away is no reason to restart, for requests still work; a mirror that is stuck is one.
        """
        if (sentence := self._world.silent()) is not None:
            return web.Response(status=503, text=f"{sentence}\n")
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """GET /readyz: all three mirrors are complete, and this gateway is not about to stop."""
        if self.stopping:
            return web.Response(status=503, text="stopping\n")
        if not self._world.synced:
            return web.Response(status=503, text="waiting for the first list of services, endpoints and keys\n")
        return web.Response(text="ok\n")

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics in Prometheus' text format."""
        return web.Response(
            body=generate_latest(self._telemetry.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _complete(self, request: web.Request, trip: Trip) -> web.StreamResponse:
        trip.tenant = self._tenant(request)  # before the body: a stranger must not make this process hold one
        if self.in_flight > self._settings.in_flight_max:
            raise Refusal(503, "gateway_busy", "The gateway has as many requests as it may hold.", retry_after_s=1)
        with self._budget.hold(trip.tenant) as hold:
            body = await self._body(request, hold)
            trip.read_at_s = time.monotonic()
            asked = ask.read(body)
            service = models.resolve(self._world.catalogue(), asked.model)
            trip.service = service.qualified
            body = ask.body_for(asked, service.model, body)
            prefix = ask.prompt_prefix(asked, self._settings.prefix_affinity_bytes)
            reply = Reply(request, trip.headers(), stream=asked.stream, write_timeout_s=self._settings.write_timeout_s)
            del asked  # it keeps the client's bytes; from here on only those for the worker are held
            try:
                with self._doorman.visit(service, trip.tenant, len(body), prefix) as visit:
                    return await self._serve(request, trip, visit, reply, body)
            except Refusal as why:
                if not reply.begun:
                    raise
                trip.code, trip.note = why.status, why.code  # the status line has been sent: an event tells the error
                return await reply.end_with(refusal.event(why))

    async def _serve(
        self, request: web.Request, trip: Trip, visit: Visit, reply: Reply, body: bytes
    ) -> web.StreamResponse:
        """Bring the request to a worker, however long that takes; what one may have begun is never sent again."""
        while True:
            sought_s = time.monotonic()
            while (endpoint := await visit.seat(self._settings.heartbeat_s)) is None:
                await reply.beat()
            trip.waited_s += time.monotonic() - sought_s
            errand = self._errand(request, trip, visit.service, body)  # now: its token lives for a minute
            async with self._relay.send(errand, endpoint) as answer:
                if isinstance(answer, Answer):
                    whole = await answer.whole() if answer.may_be_a_refusal else None
                    failure = answer.refused(whole) if whole is not None else None
                    if failure is None:
                        visit.worked()
                        trip.code = answer.response.status
                        self._telemetry.added(max(0.0, answer.sent_at_s - trip.read_at_s - trip.waited_s))
                        return await reply.pass_on(answer, whole)
                    _log_refusal(trip, failure, endpoint, whole or b"")
                else:
                    failure = answer
            decision = visit.failed(failure)
            if not decision.allowed:
                raise _lost(trip, failure, decision)

    def _tenant(self, request: web.Request) -> str:
        if not self._world.synced:
            raise Refusal(503, "gateway_starting", "The gateway is starting; try again.", retry_after_s=1)
        tenant = tenant_of(self._world.keyring(), request.headers.get("Authorization", ""))
        if tenant is None:
            message = "The API key is missing or not known. Send it as: Authorization: Bearer KEY."
            raise Refusal(401, "invalid_api_key", message)
        return tenant

    async def _body(self, request: web.Request, hold: Hold) -> bytes:
        """The body. What has arrived is what counts: bytes that are announced and not sent take no room."""
        limit = self._settings.body_bytes_max
        too_large = Refusal(413, "request_too_large", f"The body is too large; at most {limit} bytes are accepted.")
        if (request.content_length or 0) > limit:
            raise too_large
        hold.require(request.content_length or 0)
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while part := await request.content.readany():
                    if len(body) + len(part) > limit:
                        raise too_large
                    hold.take(len(part))
                    body += part
        except TimeoutError:
            message = f"The body did not arrive within {self._settings.body_timeout_s:g} s."
            raise Refusal(408, "request_timeout", message) from None
        except web.RequestPayloadError:
            raise Refusal(400, "invalid_body", "The body cannot be read as its headers announce it.") from None
        return bytes(body)

    def _errand(self, request: web.Request, trip: Trip, service: Service, body: bytes) -> Errand:
        claim = hop.Hop(trip.tenant, trip.session, service.uid)
        token = hop.token(claim, self._hop_key_of(service.uid), int(time.time()))
        return Errand(service.qualified, request.path, body, hop.headers_to_worker(request.headers, token))


def _lost(trip: Trip, failure: Failure, decision: Retry) -> Refusal:
    if failure is Failure.HOP_REFUSED:
        message = f"The worker of {trip.service} does not accept this gateway; its operator must look at both."
        return Refusal(502, "hop_refused", message)
    message = f"The worker of {trip.service} stopped before it answered. {decision.reason} Send it again if you like."
    return Refusal(502, "worker_lost", message)


async def _in_openais_shape(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as why:
        return _refuse(why, None)
    except web.HTTPNotFound:
        return _refuse(Refusal(404, "not_found", f"There is no route {request.method} {request.path[:128]}."), None)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _refuse(Refusal(405, "method_not_allowed", f"{request.path[:128]} accepts {allowed}."), None)
        response.headers["Allow"] = allowed
        return response
    except Exception as error:
        if isinstance(error, ConnectionError | web.HTTPException):
            raise
        logger.exception("a request failed")
        return _refuse(Refusal(500, "internal_error", "The gateway failed; its log says why."), None)


def _refuse(why: Refusal, trip: Trip | None) -> web.Response:
    headers = trip.headers() if trip else {}
    if why.retry_after_s:
        headers["Retry-After"] = str(why.retry_after_s)
    if why.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(status=why.status, body=refusal.body(why), headers=headers, content_type="application/json")


def _log_refusal(trip: Trip, failure: Failure, endpoint: Endpoint, told: bytes) -> None:
    level = logging.ERROR if failure is Failure.HOP_REFUSED else logging.INFO
    said = told[:300].decode(errors="replace")
    logger.log(level, "%s: %s at %s: %s", trip.service, failure, endpoint.origin, said)


def _log(trip: Trip) -> None:
    logger.info(
        "session=%s tenant=%s service=%s code=%d ms=%.0f request_id=%r%s",
        trip.session,
        trip.tenant or "-",
        trip.service or "-",
        trip.code,
        (time.monotonic() - trip.started_at_s) * 1000,
        trip.request_id,
        f" note={trip.note}" if trip.note else "",
    )
