"""The hop from gateway to worker: who a request belongs to, stated so that only the gateway can state it.

Owns the making of the hop token (with a key that is derived for the service), and which headers travel. What a client
says about identity never does: only named headers pass. What a token states is the contract of gpumeter_usage.hop.
"""

import base64
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from gpumeter_usage.hop import ALGORITHM, ISSUER, LIFETIME_S

REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID_CHARS = 128

# Lists of what passes, not of what is taken away: the next proxy's new identity header is stripped without our doing.
_TO_WORKER = ("Accept", "User-Agent", "traceparent", "tracestate")
_TO_CLIENT = ("Content-Type", "Content-Encoding", "Cache-Control", "Retry-After", "X-Accel-Buffering")


@dataclass(frozen=True, slots=True)
class Hop:
    """Everything that a hop token states."""

    tenant: str
    session: str
    service_uid: str


def token(hop: Hop, hop_key: str, now_s: int) -> str:
    """The signed statement that a worker accepts for the next LIFETIME_S seconds."""
    claims = {
        "iss": ISSUER,
        "aud": hop.service_uid,
        "tenant": hop.tenant,
        "session": hop.session,
        "iat": now_s,
        "exp": now_s + LIFETIME_S,
    }
    # RFC 7515's compact form, written out: a library that looks at the key's form first takes ten times as long, and
    # every request pays it. The worker verifies with the library.
    signed = _HEADER + b"." + _base64url(json.dumps(claims, separators=(",", ":")).encode())
    return (signed + b"." + _base64url(hmac.digest(hop_key.encode(), signed, "sha256"))).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


_HEADER = _base64url(json.dumps({"alg": ALGORITHM, "typ": "JWT"}, separators=(",", ":")).encode())


def headers_to_worker(client: Mapping[str, str], hop_token: str) -> dict[str, str]:
    """The headers of the request to the worker. `client` must ignore case, as HTTP's headers do."""
    headers = {name: client[name] for name in _TO_WORKER if name in client}
    headers["Content-Type"] = "application/json"  # the body has been read as JSON
    headers["Accept-Encoding"] = "identity"  # events must pass as they come
    headers["Authorization"] = f"Bearer {hop_token}"
    return headers


def headers_to_client(worker: Mapping[str, str]) -> dict[str, str]:
    """The headers of the worker's answer that a client gets."""
    return {name: worker[name] for name in _TO_CLIENT if name in worker}


def request_id(client: Mapping[str, str]) -> str:
    """The client's own name for its request: logged and sent back, never a key."""
    given = client.get(REQUEST_ID_HEADER, "")
    return given[:MAX_REQUEST_ID_CHARS] if given.isascii() and given.isprintable() else ""
