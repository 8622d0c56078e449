"""The worker's end of fetching: starts the process that does it, hears how far it is, ends it when the worker leaves.

Owns that process. Knows nothing of sources.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpumeter_worker.failure import MODEL_SOURCE_UNREACHABLE, StartupFailed, first_line
from gpumeter_worker.sources.location import Location

_LINE_BYTES = 2**16
_PROGRAM = (sys.executable, "-m", "gpumeter_worker.sources.process")


async def fetch_aside(
    location: Location, cache: Path, owner: str, told: Callable[[str], None], program: Sequence[str] = _PROGRAM
) -> Path:
    """The directory of the model; `told` gets a sentence about every second. Raises StartupFailed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES
        )
    except OSError as error:
        raise StartupFailed(
            MODEL_SOURCE_UNREACHABLE,
            f"the process that fetches {location.uri} cannot be started ({first_line(error)}); look at the container's "
            "limits of processes, open files and memory",
        ) from None
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
        with suppress(ConnectionError):  # it ended at once, and its status says how
            await process.stdin.drain()
        while line := await _line(process.stdout, location):
            answer = _answer(line, location)
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


async def _line(answers: asyncio.StreamReader, location: Location) -> bytes:
    try:
        return await answers.readline()
    except ValueError:  # longer than anything that it says
        raise _not_understood(location, b"") from None


def _answer(line: bytes, location: Location) -> dict[str, str]:
    try:
        said: Any = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not ({"path", "told"} & said.keys() or {"reason", "message"} <= said.keys()):
        raise _not_understood(location, line)
    return said


def _not_understood(location: Location, line: bytes) -> StartupFailed:
    said = line.decode(errors="replace").strip()[:80] or "a line without end"
    return StartupFailed(
        MODEL_SOURCE_UNREACHABLE,
        f"the process that fetches {location.uri} said something that is no answer ({said}); see the log above, and "
        "report it",
    )
