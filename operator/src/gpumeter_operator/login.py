"""kopf's way to the API server: its own credentials, and a session whose writes pass the operator's gate.

Owns that session. kopf writes finalizers and annotations by itself, over connections of its own, so without this they
would be the only writes outside the Lease. Does not know what is written.
"""

from dataclasses import dataclass, field
from typing import Any

import aiohttp
import kopf

from gpumeter_operator.flow.tenure import Tenure

_READS = ("GET", "HEAD")
CONNECTIONS = 64
"""Of kopf to the API server: one for each object that it writes at a time, and a few watches. Without a limit five
thousand services that come together are five thousand handshakes, and each answer waits for all of them."""


@dataclass(frozen=True, kw_only=True)
class Session(kopf.AiohttpSession):  # type: ignore[misc]  # kopf's classes are Any to mypy
    """kopf compares new credentials with those that were refused, and must see that they are the same again."""

    aiohttp_session: aiohttp.ClientSession = field(compare=False)
    credentials: kopf.ConnectionInfo


def session_of(info: kopf.ConnectionInfo, tenure: Tenure) -> Session:
    """A session as kopf itself would make it (kopf._cogs.clients.auth.APIContext), and the gate. Needs a running loop.

    The API server's certificate and ours are read here; raises ssl.SSLError or OSError where they cannot be.
    """

    async def gate(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.method in _READS:
            return await send(request)
        async with tenure.writing():
            return await send(request)

    http = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=info.trust_env,
        middlewares=(gate,),
    )
    return Session(
        server=info.server,
        priority=info.priority,
        default_namespace=info.default_namespace,
        expiration=info.expiration,
        aiohttp_session=http,
        credentials=info,
    )


def login(tenure: Tenure | None, **kwargs: Any) -> Any:
    """kopf's own minimal logins; without a tenure (a bench that has no Lease) with kopf's own session."""
    # Neither the official client nor pykube is installed, by choice (30 MiB of memory).
    info = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
    return info if info is None or tenure is None else session_of(info, tenure)
