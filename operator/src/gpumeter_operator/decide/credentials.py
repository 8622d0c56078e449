"""Credentials of a service, derived from the release's master key.

Owns the derivation, so that operator, collector and gateway reckon the same values and none of them reads Secrets of
other namespaces. Does not know where the master key is kept.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal

Purpose = Literal["usage-token", "hop-key", "internal-token", "jupyter-token"]
MASTER_KEY_MIN_BYTES = 32  # as long as the HMAC's digest; a shorter key would be the weakest part


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one service's workers know: the collector's token, and the key that proves a request came by the gateway.

    The token of a notebook is another one, which they do not know.
    """

    usage_token: str
    hop_key: str
    jupyter_token: str = ""

    @property
    def fingerprint(self) -> str:
        """Tells two sets of credentials apart without telling them; workers roll over when it changes."""
        return hashlib.sha256(f"{self.usage_token}:{self.hop_key}".encode()).hexdigest()[:16]


def credentials_of(master_key: bytes, service_uid: str) -> Credentials:
    """Everything that the workers of one service are given."""
    return Credentials(
        usage_token=derive(master_key, "usage-token", service_uid),
        hop_key=derive(master_key, "hop-key", service_uid),
        jupyter_token=derive(master_key, "jupyter-token", service_uid),
    )


def internal_token(master_key: bytes) -> str:
    """What the gateway's internal port asks the operator for; of the release, not of a service."""
    return derive(master_key, "internal-token", "")


def derive(master_key: bytes, purpose: Purpose, service_uid: str) -> str:
    """hex(HMAC-SHA256(master_key, "<purpose>:<service uid>")): 64 hexadecimal digits.

    The uid, not the name: a service that is deleted and made anew under its old name gets new credentials.
    """
    return hmac.new(master_key, f"{purpose}:{service_uid}".encode(), hashlib.sha256).hexdigest()
