"""Digests of the ledger: what is signed, in which bytes, and how an entry binds the one before it.

Owns the form of an entry, of a fact's line and of an exported line, and the check of a chain of entries. Pure; does not
know how facts are read or kept, or when a digest is due. docs/audit.md says the same for somebody without this code.

One chain for the whole ledger, not one a service: whoever keeps its last digest has anchored every service at once, and
that a service was taken out whole shows as well. It costs no waiting, because an entry is made whenever a period of
any service is Final, and covers that period only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

from gpumeter_operator.billing.signing import Keyring
from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.chain import GENESIS
from gpumeter_usage.record import MAX_INTEGER

FORMAT = "gpumeter-digest/1"
"""Stands in the signed bytes, so that a signature under them can be taken for nothing else."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one digest states. Times in nanoseconds since 1970, hashes in hex.

    `records_root` is the Merkle root over the hashes of the records that are booked in the period, in the order of
    (worker_uid, boot_id, seq), compared as bytes; a leaf is a hash as 32 bytes. `facts_root` is the one over the lines
    (see `fact_line`) of all other facts that no entry before covers, in the order in which they are kept. An entry
    without a period (service "") covers facts only.
    """

    seq: int
    previous: str
    namespace: str
    service: str
    period_start_ns: int
    period_end_ns: int
    records: int
    records_root: str
    facts: int
    facts_root: str
    made_ns: int
    key_id: str
    format: str = FORMAT


@dataclass(frozen=True, slots=True)
class Digest:
    """An entry as it is kept and exported: its bytes, their SHA-256, and the signature under the bytes."""

    body: bytes
    digest: str
    signature: str


class DigestInvalid(ValueError):
    """What was read is no digest; the message is a sentence without its end."""


_TYPES = {field.name: field.type for field in fields(Entry)}


def canonical_entry(entry: Entry) -> bytes:
    """The bytes that are hashed and signed: JSON in UTF-8, sorted keys, no spaces, integers and strings."""
    return canonical_json(asdict(entry))


def entry_of(body: bytes) -> Entry:
    """Read an entry from its bytes. Raises DigestInvalid."""
    values = _object(body, "a digest's body")
    if values.keys() != _TYPES.keys():
        odd = ", ".join(sorted(values.keys() ^ _TYPES.keys()))
        raise DigestInvalid(f"a digest has missing or unknown fields: {odd:.200}")
    for name, value in values.items():
        right = type(value) is int and 0 <= value <= MAX_INTEGER if _TYPES[name] is int else type(value) is str
        if not right:
            raise DigestInvalid(f"{name} of a digest is {value!r:.60}")
    if values["format"] != FORMAT:
        raise DigestInvalid(f"a digest of the format {values['format']!r:.60}; this version knows {FORMAT}")
    entry = Entry(**values)
    if canonical_entry(entry) != body:
        raise DigestInvalid("a digest whose bytes are not in the canonical form")
    return entry


def fact_line(table: str, row: Mapping[str, Any]) -> bytes:
    """The bytes that stand for a row of facts: {"columns": {...}, "table": ...}, canonical. A column that holds bytes
    is stated as "sha256:" and the hash of them."""
    columns = {
        name: "sha256:" + sha256(value).hexdigest() if isinstance(value, bytes | memoryview) else value
        for name, value in row.items()
    }
    return canonical_json({"columns": columns, "table": table})


def columns_of(line: bytes) -> dict[str, Any]:
    """The columns that a fact's line states. Raises DigestInvalid."""
    columns = _object(line, "a fact's line").get("columns")
    if not isinstance(columns, dict):
        raise DigestInvalid("a fact's line states no columns")
    return columns


def export_line(digest: Digest) -> bytes:
    """One line of an exported file, without its end. Canonical too: the same ledger gives the same file."""
    return canonical_json({"body": digest.body.decode(), "digest": digest.digest, "signature": digest.signature})


def digest_of_line(line: bytes) -> Digest:
    """Read an exported line. Raises DigestInvalid."""
    values = _object(line, "the line")
    if values.keys() != {"body", "digest", "signature"} or not all(type(value) is str for value in values.values()):
        raise DigestInvalid("the line is not an object of the strings body, digest and signature")
    return Digest(values["body"].encode("utf-8", "surrogatepass"), values["digest"], values["signature"])


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a digest: a word, and a sentence."""

    reason: str
    message: str


def check_chain(digests: Iterable[Digest], keys: Keyring) -> Iterator[tuple[Digest, Entry | None, list[Fault]]]:
    """Each digest with what it states (None where it cannot be read) and all that is wrong with it.

    Begins at entry 1: a chain whose beginning is missing is a chain that was cut.
    """
    previous, expected = GENESIS, 1
    for given in digests:
        found = sha256(given.body).hexdigest()
        try:
            entry = entry_of(given.body)
        except DigestInvalid as problem:
            yield given, None, [Fault("DigestUnreadable", f"digest {expected}: {problem}.")]
            previous, expected = found, expected + 1
            continue
        name = f"digest {entry.seq}"
        faults = []
        if given.digest != found:
            faults.append(
                Fault("DigestChanged", f"{name}: its bytes have the hash {found}, it is kept as {given.digest:.64}.")
            )
        if not keys.knows(entry.key_id):
            faults.append(
                Fault("KeyUnknown", f"{name}: it names the key {entry.key_id:.64}, which is not among the public keys.")
            )
        elif not keys.verifies(entry.key_id, given.signature, given.body):
            faults.append(
                Fault("SignatureInvalid", f"{name}: its signature is not that of key {entry.key_id} under its bytes.")
            )
        if entry.seq != expected:
            faults.append(
                Fault(
                    "DigestMissing",
                    f"{name}: follows digest {expected - 1}; what is between is missing, or stands twice.",
                )
            )
        if entry.previous != previous:
            faults.append(
                Fault(
                    "DigestChainBroken",
                    f"{name}: it binds {entry.previous:.64} as the digest before it, which is {previous}.",
                )
            )
        yield given, entry, faults
        previous, expected = found, entry.seq + 1


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DigestInvalid(f"{what} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DigestInvalid(f"{what} is not a JSON object")
    return values
