"""One page of thousands of servers, read every two seconds over connections that are kept.

Owns the connections: one is kept for each address between two questions. Bytes are made an answer by llhttp (httptools,
as in uvicorn). It is what aiohttp's client leaves when everything is taken away that a page of metrics does not need
(redirects, cookies, encodings, proxies, TLS, a timer a request): half of its time, and five hundred questions a
second are most of what an operator of a thousand services does. Does not know what is asked, how often, or for how
long an answer may take: who waits no longer cancels.
"""

import asyncio
from collections.abc import Collection
from typing import cast

import httptools

HEAD_BYTES_MAX = 2**16  # of all that is not the body: headers, what frames chunks; who sends more is not one of ours


class Unanswered(Exception):
    """No whole answer came; the message says why."""


class Scraper:
    """Reads `path` at `port` of any address."""

    def __init__(self, port: int, path: str, bytes_max: int) -> None:
        self._port = port
        self._path = path
        self._bytes_max = bytes_max
        self._kept: dict[str, _Line] = {}

    async def get(self, address: str) -> bytes:
        """The page of the server at this IP address. Raises Unanswered for anything but an answer of status 200 and
        `bytes_max` bytes at most, and OSError where nobody can be reached."""
        line = self._kept.pop(address, None)
        if line is not None and not line.closed:
            try:
                return await self._ask(line, address)
            except _Closed:
                pass  # between two questions, as a server may at any time: it has not begun to answer this one
        return await self._ask(await self._connect(address), address)

    def keep(self, addresses: Collection[str]) -> None:
        """Close the connections to all others."""
        for address in self._kept.keys() - set(addresses):
            self._kept.pop(address).close()

    def close(self) -> None:
        """Close all connections."""
        self.keep(())

    async def _connect(self, address: str) -> "_Line":
        host = f"[{address}]" if ":" in address else address
        request = f"GET {self._path} HTTP/1.1\r\nHost: {host}:{self._port}\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(lambda: _Line(request, self._bytes_max), address, self._port)
        return line

    async def _ask(self, line: "_Line", address: str) -> bytes:
        try:
            page = await line.ask()
        except BaseException:
            line.close()  # what still comes would be taken for the answer to the next question
            raise
        if line.closed or address in self._kept:
            line.close()
        else:
            self._kept[address] = line
        return page


class _Closed(Unanswered):
    """The server closed the connection before the first byte of an answer."""


class _Line(asyncio.Protocol):
    """A connection on which one question at a time is asked, always the same. The methods on_... are llhttp's."""

    def __init__(self, request: bytes, bytes_max: int) -> None:
        self.closed = False
        self._request = request
        self._bytes_max = bytes_max
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None  # of a question that has none yet
        self._body = bytearray()
        self._fed_bytes = 0
        self._begun = False

    def ask(self) -> asyncio.Future[bytes]:
        """The body of the answer; fails with Unanswered."""
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._begun, self._fed_bytes = False, 0
        if self._transport is None or self.closed:
            self._fail(_Closed("the connection is closed"))
        else:
            self._transport.write(self._request)
        return answer

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # an answer to no question
            return
        self._begun = True
        self._fed_bytes += len(data)
        if self._fed_bytes > self._bytes_max + HEAD_BYTES_MAX:  # before the parser, which keeps a header until it ends
            self._fail(Unanswered(f"its answer is longer than {self._bytes_max} bytes"))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Unanswered(f"what answered does not speak HTTP ({type(error).__name__})"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        how = "in the middle of its answer" if self._begun else "before it answered"
        self._fail((Unanswered if self._begun else _Closed)(f"the server closed the connection {how}"))

    def on_message_begin(self) -> None:
        self._body.clear()
        if self._answer is None or self._answer.done():
            self.close()  # a second answer, which the next question must not get

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > self._bytes_max:
            self._body.clear()
            self._fail(Unanswered(f"its answer is longer than {self._bytes_max} bytes"))

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # 100 Continue and its kind come before the answer
        if not self._parser.should_keep_alive():
            self.close()
        # Not kept until the next question: a page each is what thousands of connections would take most memory for.
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            if status == 200:
                answer.set_result(bytes(self._body))
            else:
                answer.set_exception(Unanswered(f"it answered with status {status}"))
        self._body.clear()

    def _fail(self, why: Unanswered) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(why)
