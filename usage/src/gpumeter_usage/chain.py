"""The hash chain over a boot's records: makes a lost, changed, doubled or reordered record visible.

Owns how two neighbours are linked. Works on bytes alone, so an auditor needs nothing but SHA-256.
"""

from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

GENESIS = "0" * 64
"""The hash before the first record of every boot."""


class Link(NamedTuple):
    """One record's canonical bytes and the hash that binds them to everything before them."""

    hash: str
    body: bytes


class ChainBroken(ValueError):
    """A record that does not continue the chain; the message says where."""


def link(previous_hash: str, body: bytes) -> Link:
    """Append `body` to the chain that ends in `previous_hash` (64 hex digits): SHA-256(previous_hash || body)."""
    return Link(_hash(previous_hash, body), body)


def verify(previous_hash: str, links: Iterable[Link]) -> str:
    """Check that `links` continue the chain from `previous_hash`; returns the new head. Raises ChainBroken."""
    for index, (given, body) in enumerate(links):
        expected = _hash(previous_hash, body)
        if given != expected:
            raise ChainBroken(f"record {index} of the page has hash {given:.16}…, the chain requires {expected:.16}…")
        previous_hash = given
    return previous_hash


def _hash(previous_hash: str, body: bytes) -> str:
    return sha256(previous_hash.encode() + body).hexdigest()
