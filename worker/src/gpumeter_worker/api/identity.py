"""Who calls: the gateway, by a hop token that names tenant and session; the collector, by the usage token.

Owns how a token is checked. A client that reaches the worker directly cannot claim a tenant. Does not know how tokens
are made.
"""

import hmac
from dataclasses import dataclass

import jwt

from gpumeter_usage.hop import ALGORITHM, CLAIMS, ISSUER, is_session, new_session
from gpumeter_usage.tenant import tenant_problem
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.settings import DEV_TENANT, Settings

_CLOCK_SKEW_S = 10


@dataclass(frozen=True, slots=True)
class Caller:
    """Who pays, and the id under which this request is metered. Both are the server's, never the client's."""

    tenant: str
    session_id: str


def caller(authorization: str | None, settings: Settings) -> Caller:
    """The caller of port 8000. Raises Refused (401)."""
    if settings.credentials is None:
        return Caller(DEV_TENANT, new_session())
    token = _bearer(authorization)
    if token is None:
        raise _unauthorized(settings, "the request carries no hop token")
    try:
        claims = jwt.decode(
            token,
            settings.credentials.hop_key,
            algorithms=[ALGORITHM],
            audience=settings.service_uid,
            issuer=ISSUER,
            leeway=_CLOCK_SKEW_S,
            options={"require": list(CLAIMS)},
        )
    except jwt.InvalidTokenError as error:
        raise _unauthorized(settings, f"the hop token is not valid ({error!s:.100})") from None
    tenant, session_id = claims["tenant"], claims["session"]
    if not isinstance(tenant, str) or tenant_problem(tenant):
        raise _unauthorized(settings, "the hop token names no usable tenant")
    if not isinstance(session_id, str) or not is_session(session_id):
        raise _unauthorized(settings, "the hop token names no usable session")
    return Caller(tenant, session_id)


def is_collector(authorization: str | None, settings: Settings) -> bool:
    """Whether the caller of port 8001 may read usage; compared in constant time."""
    if settings.credentials is None:
        return True
    token = _bearer(authorization) or ""
    return hmac.compare_digest(token.encode(), settings.credentials.usage_token.encode())


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _unauthorized(settings: Settings, problem: str) -> Refused:
    where = f" at {settings.gateway_url}" if settings.gateway_url else ""
    return Refused(
        401,
        "invalid_hop_token",
        f"{problem}; a worker is called through the gateway{where}",
        headers={"WWW-Authenticate": "Bearer"},
    )
