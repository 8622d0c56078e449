"""Runs a worker: two HTTP servers, the signals, and the way out.

Owns the process: sockets, SIGTERM, exit codes. Everything in between is the worker's.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from gpumeter_worker import failure as failures
from gpumeter_worker.api.app import api_app
from gpumeter_worker.api.usage import usage_app
from gpumeter_worker.metering.clock import Anchor
from gpumeter_worker.settings import Settings
from gpumeter_worker.worker import Worker

log = logging.getLogger(__name__)

_BACKLOG = 1024
_LAST_RESPONSES_S = 5
_CLOSE_S = 2.0


def serve(
    settings: Settings,
    path: Path | None,
    started_ns: int,
    told_to_stop_s: list[float],
    read_anchor: Callable[[], Anchor] = Anchor.now,
) -> int:
    """Serve until SIGTERM, or until only a new boot can go on; returns the exit code.

    `told_to_stop_s` holds when signals came before the loop ran; a kubelet counts from the first.
    """
    try:
        return asyncio.run(_serve(settings, path, started_ns, told_to_stop_s, read_anchor))
    except failures.StartupFailed as failure:
        return failures.report(failure)
    except Exception as error:
        log.exception("the worker ends")
        how = f"{type(error).__name__}: {failures.first_line(error)}"
        sentence = f"the worker ended by an error of its own ({how}); see its log, and report it"
        return failures.report(failures.StartupFailed(failures.WORKER_FAILED, sentence))


async def _serve(
    settings: Settings,
    path: Path | None,
    started_ns: int,
    told_to_stop_s: list[float],
    read_anchor: Callable[[], Anchor],
) -> int:
    stop, stop_now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wanted() -> None:
        told_to_stop_s.append(time.monotonic())
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wanted)
    if told_to_stop_s:
        stop.set()
    worker = Worker(settings, started_ns, read_anchor)
    servers = [
        (_Server(api_app(worker)), _listen(settings.http_host, settings.http_port)),
        (_Server(usage_app(worker)), _listen(settings.http_host, settings.usage_port)),
    ]
    for name, (_, listening) in zip(("http", "usage"), servers, strict=True):
        log.info("%s on port %d", name, listening.getsockname()[1])
    serving = [asyncio.create_task(server.serve([listening])) for server, listening in servers]
    running = asyncio.create_task(worker.run(path))
    leaving = [asyncio.create_task(event.wait()) for event in (stop, worker.wants_to_leave)]
    try:
        await asyncio.wait((running, *leaving), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await worker.flusher.keep()
            running.result()  # raises what went wrong
        await worker.drain(stop_now, told_to_stop_s[0] if told_to_stop_s else time.monotonic())
        return 0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)  # what it raised is on its way up already
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*serving, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await worker.journal.close()


class _Server(uvicorn.Server):
    """uvicorn without its own idea of signals: a worker drains, seals and then leaves."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                log_level="warning",
                lifespan="off",
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=75,  # longer than the gateway keeps a connection idle
                timeout_graceful_shutdown=_LAST_RESPONSES_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them to the worker."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), backlog=_BACKLOG)
    except OSError as error:
        raise failures.StartupFailed(
            failures.SETTINGS_INVALID,
            f"port {port} on {host} cannot be opened ({os.strerror(error.errno or 0)}); choose another by "
            "GPUMETER_HTTP_PORT or GPUMETER_USAGE_PORT",
        ) from None
    listening.setblocking(False)
    return listening
