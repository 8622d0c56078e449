"""The hop from gateway to worker: what a hop token states, and the form of a session's id.

Owns the names and limits that the gateway writes and the worker checks. Does not sign, does not verify, knows no clock.
"""

import re
import secrets

ISSUER = "gpumeter-gateway"
ALGORITHM = "HS256"
LIFETIME_S = 60  # the worker checks it once, on arrival; a request may run for as long as it likes
CLAIMS = ("iss", "aud", "tenant", "session", "iat", "exp")  # aud is the uid of the InferenceService
SESSION_HEADER = "X-Gpumeter-Session"

_SESSION = re.compile(r"s-[0-9a-f]{32}")


def new_session() -> str:
    """A session's id is the server's own: two requests never share one, whatever their clients send."""
    return f"s-{secrets.token_hex(16)}"


def is_session(text: str) -> bool:
    """Whether this can be the id of a session."""
    return _SESSION.fullmatch(text) is not None
