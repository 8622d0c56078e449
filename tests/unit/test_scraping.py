"""A page read again and again over a kept connection, from servers that behave in every way that a server can."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from gpumeter_operator.adapters.scraping import HEAD_BYTES_MAX, Scraper, Unanswered

HERE = "127.0.0.1"
PAGE = b"vllm:num_requests_waiting 3.0\n" * 40
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n3\r\nend\r\n0\r\n\r\n" % (len(PAGE), PAGE)

Answer = Callable[["Server", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers each request as the test says, and counts connections and requests."""

    answer: Answer
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    ended: int = 0
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self.answer(self, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ended += 1
            writer.close()


def saying(*parts: bytes, close: bool = False) -> Answer:
    async def answer(_: Server, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            raise ConnectionResetError

    return answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    one = Server(saying(WHOLE))
    running = await asyncio.start_server(one.serve, HERE, 0)
    one.port = running.sockets[0].getsockname()[1]
    yield one
    running.close()


@pytest.fixture
def scraper(server: Server) -> Scraper:
    return Scraper(server.port, "/metrics", 10_000)


async def test_one_connection_serves_many_questions(server: Server, scraper: Scraper) -> None:
    for _ in range(5):
        assert await scraper.get(HERE) == PAGE
    assert server.connections == 1
    assert server.requests == [b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.port] * 5
    scraper.close()
    await eventually(lambda: server.ended == 1)


async def test_a_connection_that_is_kept_does_not_keep_the_page_that_came_over_it(server: Server) -> None:
    """Of five thousand connections the pages alone would be 50 MiB."""
    server.answer = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + 1_000_000 * b"x")
    scraper = Scraper(server.port, "/metrics", 1_000_000)
    await scraper.get(HERE)
    gc.collect()
    tracemalloc.start()
    try:
        await scraper.get(HERE)
        await asyncio.sleep(0.01)  # the loop itself holds it until this task's next step
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 500_000
    finally:
        tracemalloc.stop()
        scraper.close()


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize(("sent", "page"), [(WHOLE, PAGE), (CHUNKED, PAGE + b"end")])
async def test_an_answer_is_the_same_however_it_is_cut(
    server: Server, scraper: Scraper, sent: bytes, page: bytes, size: int
) -> None:
    server.answer = saying(*(sent[at : at + size] for at in range(0, len(sent), size)))
    assert [await scraper.get(HERE) for _ in range(2)] == [page, page]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "status 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + 20_000 * b"x", "longer than 10000 bytes"),
        (b"HTTP/1.1 200 OK\r\n" + HEAD_BYTES_MAX * b"a: b\r\n" + b"Content-Length: 0\r\n\r\n", "longer than 10000"),
        (b"HTTP/1.1 200 OK\r\na: " + (HEAD_BYTES_MAX + 10_000) * b"b", "longer than 10000 bytes"),
    ],
)
async def test_what_is_no_page_is_told_and_the_next_question_is_answered(
    server: Server, scraper: Scraper, sent: bytes, why: str
) -> None:
    server.answer = saying(sent)
    with pytest.raises(Unanswered, match=why):
        await scraper.get(HERE)
    server.answer = saying(WHOLE)
    assert await scraper.get(HERE) == PAGE


async def test_a_connection_that_ends_between_two_questions_costs_no_answer(server: Server, scraper: Scraper) -> None:
    server.answer = saying(WHOLE, close=True)
    assert [await scraper.get(HERE) for _ in range(3)] == 3 * [PAGE]

    server.answer = saying(WHOLE)
    await scraper.get(HERE)

    async def once(of: Server, writer: asyncio.StreamWriter) -> None:
        of.answer = saying(WHOLE)
        raise ConnectionResetError

    server.answer = once  # it closes as the question comes
    before = server.connections
    assert await scraper.get(HERE) == PAGE
    assert server.connections == before + 1


async def test_one_that_says_close_is_not_asked_again_on_the_same_connection(server: Server, scraper: Scraper) -> None:
    server.answer = saying(WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert [await scraper.get(HERE) for _ in range(2)] == [PAGE, PAGE]
    assert server.connections == 2


async def test_a_connection_that_ends_in_the_middle_is_no_answer(server: Server, scraper: Scraper) -> None:
    server.answer = saying(WHOLE[:-10], close=True)
    with pytest.raises(Unanswered, match="in the middle"):
        await scraper.get(HERE)
    assert server.connections == 1, "it had begun to answer: to ask again would hide that it is not well"


async def test_what_comes_before_the_answer_and_after_it_is_not_taken_for_it(server: Server, scraper: Scraper) -> None:
    server.answer = saying(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", WHOLE)
    assert await scraper.get(HERE) == PAGE
    later = asyncio.Event()

    async def twice(_: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await later.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale")

    server.answer = twice
    assert await scraper.get(HERE) == PAGE
    later.set()
    await eventually(lambda: server.ended == 1)  # what comes between two questions ends the connection
    server.answer = saying(WHOLE)
    assert await scraper.get(HERE) == PAGE

    surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsta"
    server.answer = saying(WHOLE + surplus)  # in one packet with the answer, and its end only after the next question
    assert await scraper.get(HERE) == PAGE
    server.answer = saying(b"le" + WHOLE)
    before = server.connections
    with suppress(Unanswered):
        assert await scraper.get(HERE) != b"stale"
    assert server.connections == before + 1


async def test_an_answer_that_comes_too_late_is_not_the_next_questions(server: Server, scraper: Scraper) -> None:
    server.answer = saying(WHOLE[:-10])
    asking = asyncio.create_task(scraper.get(HERE))
    await eventually(lambda: len(server.requests) == 1)
    asking.cancel()  # as a timeout does
    await asyncio.wait((asking,))
    assert asking.cancelled()
    await eventually(lambda: server.ended == 1)
    server.answer = saying(WHOLE)
    assert await scraper.get(HERE) == PAGE
    assert server.connections == 2


async def test_two_questions_to_one_address_at_a_time_have_a_connection_each(server: Server, scraper: Scraper) -> None:
    assert await asyncio.gather(scraper.get(HERE), scraper.get(HERE)) == [PAGE, PAGE]
    assert server.connections == 2
    await eventually(lambda: server.ended == 1)  # one of the two is kept


async def test_connections_to_those_that_are_gone_are_closed(server: Server, scraper: Scraper) -> None:
    await scraper.get(HERE)
    scraper.keep([HERE])
    assert server.ended == 0
    scraper.keep(["127.0.0.2"])
    await eventually(lambda: server.ended == 1)


async def test_nobody_there_is_an_oserror(scraper: Scraper, server: Server) -> None:
    with pytest.raises(OSError, match="Connect call failed"):
        await Scraper(1, "/metrics", 100).get(HERE)


async def eventually(seen: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not seen():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
