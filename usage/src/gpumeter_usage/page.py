"""The page in which records travel from a worker to the collector, and the worker's own summary of its journal.

Owns the wire format of port 8001 in both directions. Knows no HTTP: it turns data into bytes and back.

    GET  /usage/v1/status                                   -> JournalStatus
    GET  /usage/v1/records?boot=ID&after=SEQ&limit=N         -> Page
    POST /usage/v1/acknowledge   Acknowledgement             -> 204
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gpumeter_usage.chain import Link

MAX_PAGE_RECORDS = 5000
MAX_PAGE_BYTES = 64 * 2**20
"""What one page may hold at most. A reader stops there, so that a broken worker cannot fill its memory."""


class PageInvalid(ValueError):
    """Bytes that are not a page; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot's chain as the journal holds it: the last record, what was acknowledged, and whether it is sealed.

    `acknowledged_hash` is that of the last record that was acknowledged, to which the next one is chained; "" where it
    is not known (a worker of an earlier build, which does not tell it).
    """

    boot_id: str
    head_seq: int
    head_hash: str
    acknowledged_seq: int
    sealed: bool
    acknowledged_hash: str = ""


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """Every boot whose records are still in the journal, oldest first; all usage that ended at or before
    `watermark_ns` (UTC) is in it."""

    worker_uid: str
    service: str
    watermark_ns: int
    boots: tuple[Boot, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive records of one boot, from `after` + 1 on. `watermark_ns` was read before the records."""

    worker_uid: str
    service: str
    boot_id: str
    after: int
    watermark_ns: int
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Everything up to `seq` is committed; `hash` is that record's, so that a worker never trims a foreign chain."""

    boot_id: str
    seq: int
    hash: str


def encode_page(page: Page) -> bytes:
    """One JSON line that describes the page, then one line `hash body` a record, byte for byte as journaled."""
    head = {
        "worker_uid": page.worker_uid,
        "service": page.service,
        "boot_id": page.boot_id,
        "after": page.after,
        "watermark_ns": page.watermark_ns,
        "count": len(page.links),
    }
    lines = [json.dumps(head, separators=(",", ":")).encode()]
    lines += [link.hash.encode() + b" " + link.body for link in page.links]
    return b"\n".join(lines) + b"\n"


def decode_page(data: bytes) -> Page:
    """The inverse of `encode_page`. Raises PageInvalid; a page cut short on its way is one of these."""
    if len(data) > MAX_PAGE_BYTES:
        raise PageInvalid(f"a page of {len(data)} bytes; at most {MAX_PAGE_BYTES} are accepted")
    head_line, *lines = data.split(b"\n")
    head = _json_object(head_line, "a page's first line")
    if not lines or lines.pop() != b"":
        raise PageInvalid("the page was cut short: its last line does not end")
    count = _integer(head, "count")
    if len(lines) != count:
        raise PageInvalid(f"the page announces {count} records and holds {len(lines)}")
    if count > MAX_PAGE_RECORDS:
        raise PageInvalid(f"the page holds {count} records; at most {MAX_PAGE_RECORDS} are accepted")
    return Page(
        worker_uid=_string(head, "worker_uid"),
        service=_string(head, "service"),
        boot_id=_string(head, "boot_id"),
        after=_integer(head, "after"),
        watermark_ns=_integer(head, "watermark_ns"),
        links=tuple(_link(line) for line in lines),
    )


def encode_status(status: JournalStatus, beside: Mapping[str, object] | None = None) -> bytes:
    """A JSON object; `boots` is a list of objects. What stands `beside` is for people, and no reader depends on it."""
    return json.dumps({**(beside or {}), **asdict(status)}, separators=(",", ":")).encode()


def decode_status(data: bytes) -> JournalStatus:
    """The inverse of `encode_status`. Raises PageInvalid."""
    values = _json_object(data, "a journal's status")
    boots = values.get("boots")
    if not isinstance(boots, list) or not all(isinstance(boot, dict) for boot in boots):
        raise PageInvalid("a journal's status holds no list of boots")
    return JournalStatus(
        worker_uid=_string(values, "worker_uid"),
        service=_string(values, "service"),
        watermark_ns=_integer(values, "watermark_ns"),
        boots=tuple(
            Boot(
                boot_id=_string(boot, "boot_id"),
                head_seq=_integer(boot, "head_seq"),
                head_hash=_string(boot, "head_hash"),
                acknowledged_seq=_integer(boot, "acknowledged_seq"),
                sealed=boot.get("sealed") is True,
                acknowledged_hash=_string({"acknowledged_hash": "", **boot}, "acknowledged_hash"),
            )
            for boot in boots
        ),
    )


def encode_acknowledgement(acknowledgement: Acknowledgement) -> bytes:
    """A JSON object."""
    return json.dumps(asdict(acknowledgement), separators=(",", ":")).encode()


def decode_acknowledgement(data: bytes) -> Acknowledgement:
    """The inverse of `encode_acknowledgement`. Raises PageInvalid."""
    values = _json_object(data, "an acknowledgement")
    return Acknowledgement(_string(values, "boot_id"), _integer(values, "seq"), _string(values, "hash"))


def _link(line: bytes) -> Link:
    digest, space, body = line.partition(b" ")
    if len(digest) != 64 or not space or not body:
        raise PageInvalid("a line of the page is not a hash and a record")
    return Link(digest.decode("ascii", "replace"), body)


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PageInvalid(f"{what} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PageInvalid(f"{what} is not a JSON object")
    return values


def _integer(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 0:
        raise PageInvalid(f"{name} is {value!r:.60}; it must be a whole number that is not negative")
    return value


def _string(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if type(value) is not str:
        raise PageInvalid(f"{name} is {value!r:.60}; it must be a string")
    return value
