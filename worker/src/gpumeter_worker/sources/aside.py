"""The worker's end of fetching: starts the process that does it, hears how far it is, ends it when the worker leaves.

Owns that process. Knows nothing of sources.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gpumeter_worker.failure import MODEL_SOURCE_UNREACHABLE, StartupFailed
from gpumeter_worker.sources.location import Location

_LINE_BYTES = 2**16


async def fetch_aside(location: Location, cache: Path, owner: str, told: Callable[[str], None]) -> Path:
    """The directory of the model; `told` gets a sentence about every second. Raises StartupFailed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gpumeter_worker.sources.process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
    )
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 - pipes were asked for
    request = {
        "uri": location.uri,
        "revision": location.revision,
        "allow_pickle": location.allow_pickle,
        "cache": str(cache),
        "owner": owner,
    }
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()
        async for line in process.stdout:
            answer = json.loads(line)
            if "path" in answer:
                return Path(answer["path"])
            if "reason" in answer:
                raise StartupFailed(answer["reason"], answer["message"])
            told(answer["told"])
        status = await process.wait()
        raise StartupFailed(
            MODEL_SOURCE_UNREACHABLE,
            f"the process that fetched {location.uri} ended with status {status} and without a word; see the log above",
        )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
