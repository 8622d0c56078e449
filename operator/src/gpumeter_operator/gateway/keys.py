"""API keys: which tenant a key belongs to.

Owns the form of a key's Secret and what makes one unacceptable. A key itself is never kept: Secrets hold its SHA-256,
and what a client presents is hashed before it is looked up, so a lookup's duration tells nothing about a key.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpumeter_operator.decide.names import TENANT_LABEL
from gpumeter_usage.tenant import tenant_problem

DIGEST_FIELD = "sha256"

_DIGEST = re.compile(r"[0-9a-f]{64}")


INVALID, SHARED = "ApiKeyInvalid", "ApiKeyShared"  # why a Secret is ignored: by itself, or beside others


@dataclass(frozen=True, slots=True, order=True)
class Ignored:
    """A Secret that was left out, and why: one CamelCase word and a sentence. Secrets may share a sentence."""

    reason: str
    message: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Keyring:
    """Tenants by the hex SHA-256 of their keys, and every Secret that was left out."""

    tenants: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()


def keyring_from(secrets: Iterable[Mapping[str, Any]]) -> Keyring:
    """Read the Secrets of API keys. One that is malformed is skipped, so that it cannot lock the others out."""
    ignored: list[Ignored] = []
    owners: dict[str, dict[str, list[_Named]]] = {}  # digest -> tenant -> Secrets
    for secret in secrets:
        metadata = secret.get("metadata", {})
        if metadata.get("deletionTimestamp"):
            continue  # revoked: a finalizer of somebody else must not keep a key alive
        named = _Named(metadata.get("namespace", ""), metadata.get("name", ""), metadata.get("uid", ""))
        tenant = (metadata.get("labels") or {}).get(TENANT_LABEL, "")
        digest = _digest_of(secret)
        if problem := _tenant_problem(tenant) or (digest is None and _NO_DIGEST) or "":
            ignored.append(Ignored(INVALID, f"The API key Secret {named} is ignored: {problem}", *named))
            continue
        owners.setdefault(digest or "", {}).setdefault(tenant, []).append(named)
    tenants: dict[str, str] = {}
    for digest, by_tenant in owners.items():
        if len(by_tenant) == 1:
            tenants[digest] = next(iter(by_tenant))
            continue
        alike = sorted(one for each in by_tenant.values() for one in each)
        message = (
            f"The API key Secrets {', '.join(map(str, alike))} are ignored: they hold the same key for the tenants "
            f"{', '.join(sorted(by_tenant))}, and a key can belong to one tenant only."
        )
        ignored += [Ignored(SHARED, message, *one) for one in alike]
    return Keyring(tenants, tuple(sorted(ignored)))


def tenant_of(keyring: Keyring, authorization: str) -> str | None:
    """The tenant whose key an Authorization header carries, or None."""
    scheme, _, key = authorization.strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return None
    return keyring.tenants.get(digest_of(key))


def digest_of(key: str) -> str:
    """What a Secret holds of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class _Named(NamedTuple):
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def _tenant_problem(tenant: str) -> str:
    if not tenant:
        return f"it has no label {TENANT_LABEL}."
    problem = tenant_problem(tenant)
    return f"its label {TENANT_LABEL} is wrong: {problem}." if problem else ""


_NO_DIGEST = f"its data has no valid field {DIGEST_FIELD}; it must be the key's SHA-256 as 64 hexadecimal digits."


def _digest_of(secret: Mapping[str, Any]) -> str | None:
    encoded = (secret.get("data") or {}).get(DIGEST_FIELD, "")
    try:
        digest = base64.b64decode(encoded, validate=True).decode("ascii").strip().lower()
    except (binascii.Error, ValueError, TypeError):
        return None
    return digest if _DIGEST.fullmatch(digest) else None
