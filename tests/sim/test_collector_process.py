"""The collector's process tells its kubelet when it only seems to live."""

import asyncio
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.workers import Workers
from gpumeter_operator.cli.collector import Process
from gpumeter_operator.cli.collector_settings import Settings
from gpumeter_usage.period import Granularity
from rigs.ledger import open_ledger
from rigs.ports import hold_port


class Broken:
    """A cluster whose answers surprise the one who lists them."""

    async def list_at(self, *_: object) -> tuple[list[dict[str, Any]], str]:
        return [{"metadata": {}}], "1"  # an object without a name


async def test_a_mirror_that_ended_is_told_to_the_probe(tmp_path: Path) -> None:
    port, stop = hold_port(), asyncio.Event()
    settings = Settings("", Granularity.MINUTE, 100, 500, 1, 400, b"k" * 32, "127.0.0.1", port)
    workers, threads = Workers(), ThreadPoolExecutor(1)
    process = Process(settings, open_ledger(tmp_path / "ledger.db"), Broken(), workers, threads)  # type: ignore[arg-type]
    running = asyncio.create_task(process.run(stop))
    told = ""
    async with asyncio.timeout(10):
        while "has ended" not in told:
            told = await asyncio.to_thread(healthz, port)
    assert told.startswith("503 ")
    stop.set()
    await running
    await workers.close()
    threads.shutdown()


def healthz(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as refusal:
        return f"{refusal.code} {refusal.read().decode()}"
    except OSError:
        return ""
