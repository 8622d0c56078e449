"""Asks workers for their journals over HTTP: the collector's side of port 8001.

Owns timeouts, how much of an answer is read, and the translation of every failure into one sentence. Does not judge
what is in a page.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from gpumeter_operator.decide.names import USAGE_PORT
from gpumeter_usage.page import (
    MAX_PAGE_BYTES,
    MAX_PAGE_RECORDS,
    Acknowledgement,
    JournalStatus,
    Page,
    decode_page,
    decode_status,
    encode_acknowledgement,
)
from gpumeter_usage.record import MAX_BODY_BYTES

CONNECT_TIMEOUT_S = 3.0  # on a cluster's network a connection takes milliseconds, or the node is gone
ANSWER_TIMEOUT_S = 20.0  # a page of 16 MB over a slow link; a turn of a worker may last no longer, see flow.collect
STATUS_BYTES_MAX = 2**20  # thousands of boots; a broken worker must not fill our memory
PROFILES_BYTES_MAX = 2**18  # hundreds of profiles; a worker has one a calibration
REFUSAL_BYTES_MAX = 2**12  # a sentence
HEAD_BYTES_MAX = 2**12  # a page's first line
LINK_BYTES = 66  # a record's hash, a space and the end of its line


class WorkerSilent(Exception):
    """The worker did not answer, or not in time; it may be starting, or gone. The message is a sentence."""


class WorkerRefuses(Exception):
    """The worker answered with a refusal; the message is a sentence that quotes it."""


def page_bytes_max(records: int) -> int:
    """The most bytes that a page of so many records can have."""
    return min(MAX_PAGE_BYTES, HEAD_BYTES_MAX + records * (MAX_BODY_BYTES + LINK_BYTES))


@dataclass(frozen=True, slots=True)
class Target:
    """Where a worker is asked, and with what token."""

    host: str
    token: str = field(repr=False)
    port: int = USAGE_PORT

    @property
    def url(self) -> str:
        """The root of its usage API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/usage/v1"


class Workers:
    """A pool of connections to all workers."""

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # Identity only: a compressed answer could unfold beyond every limit.
        headers = {"Accept-Encoding": "identity"}
        self._session = aiohttp.ClientSession(timeout=timeout, headers=headers, auto_decompress=False)

    async def status(self, target: Target) -> JournalStatus:
        """What is in a worker's journal. Raises WorkerSilent, WorkerRefuses, PageInvalid."""
        async with self._ask("GET", target, "/status") as response:
            return decode_status(await _read(response, STATUS_BYTES_MAX))

    async def page(self, target: Target, boot_id: str, after: int, limit: int = MAX_PAGE_RECORDS) -> Page:
        """The records of a boot that follow `after`, at most `limit`, and of the answer no more than so many can be.
        Raises as `status` does."""
        query = {"boot": boot_id, "after": str(after), "limit": str(limit)}
        async with self._ask("GET", target, "/records", params=query) as response:
            return decode_page(await _read(response, page_bytes_max(limit)))

    async def acknowledge(self, target: Target, acknowledgement: Acknowledgement) -> None:
        """Tell a worker what is committed; from then on it may forget it. Raises as `status` does."""
        body = encode_acknowledgement(acknowledgement)
        async with self._ask("POST", target, "/acknowledge", data=body):
            return

    async def profiles(self, target: Target) -> bytes:
        """The parameters by which a worker splits steps, as it tells them. Raises WorkerSilent, WorkerRefuses."""
        async with self._ask("GET", target, "/profile") as response:
            return await _read(response, PROFILES_BYTES_MAX)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        target: Target,
        path: str,
        params: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {target.token}"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with self._session.request(
                method, target.url + path, params=params, data=data, headers=headers, allow_redirects=False
            ) as response:
                if response.status not in (200, 204):
                    told = (await _read(response, REFUSAL_BYTES_MAX)).decode("utf-8", "replace").strip()
                    raise WorkerRefuses(f"{method} {path} was answered with {response.status}: {told:.300}")
                yield response
        except TimeoutError:
            raise WorkerSilent(f"{target.host} did not answer {path} in time") from None
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise WorkerSilent(f"{target.host} cannot be reached: {error}") from error


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > most_bytes:
            raise WorkerRefuses(f"its answer is larger than {most_bytes} bytes")
    return bytes(data)
