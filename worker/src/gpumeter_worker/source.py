"""Where a model comes from: a directory, or a hub's repository that is copied into the cache first.

Owns the meaning of spec.model.uri. Does not know what is in a model.
"""

import asyncio
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gpumeter_worker.diagnosis import MODEL_NOT_FOUND, MODEL_SOURCE_UNSUPPORTED, StartupFailed

log = logging.getLogger(__name__)

_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_PROGRESS_S = 5.0


def local_path(uri: str) -> Path | None:
    """The directory that a uri names, or None when it must be fetched first. Raises StartupFailed."""
    parts = urlsplit(uri)
    match parts.scheme:
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise StartupFailed(
                    MODEL_SOURCE_UNSUPPORTED, f"{uri} names the host {parts.netloc}; write file:///path/to/model"
                )
            return Path(unquote(parts.path))
        case "hf":
            return None
        case scheme:
            kind = f"{scheme}:// is" if scheme else "a path without a scheme is"
            raise StartupFailed(
                MODEL_SOURCE_UNSUPPORTED,
                f"{kind} not a model source of this version ({uri}); use hf://, pvc:// or file://",
            )


def fetch(uri: str, revision: str, cache: Path) -> Path:
    """Copy a repository of the hub into the cache and return its directory; blocks. Raises StartupFailed.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured by the library that does it.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and most workers need it not
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    repository = uri.removeprefix("hf://").strip("/")
    log.info("fetching %s at %s into %s", repository, revision, cache)
    finished = threading.Event()
    threading.Thread(target=_show_progress, args=(cache, finished), daemon=True).start()
    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache / "hub", allow_patterns=_WANTED))
    except LocalEntryNotFoundError as error:
        raise StartupFailed(
            MODEL_NOT_FOUND,
            f"the hub cannot be reached and {repository} at {revision} is not in the cache {cache} "
            f"({_first_line(error)}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        raise StartupFailed(
            MODEL_NOT_FOUND,
            f"{repository} at {revision} cannot be fetched ({_first_line(error)}); check the name, the revision and "
            "HF_TOKEN",
        ) from None
    except OSError as error:
        raise StartupFailed(
            MODEL_NOT_FOUND, f"{repository} cannot be kept in {cache} ({_first_line(error)}); check the cache volume"
        ) from None
    finally:
        finished.set()


async def fetch_aside(uri: str, revision: str, cache: Path) -> Path:
    """`fetch` in a thread that does not keep the process from leaving: a download may take an hour."""
    loop = asyncio.get_running_loop()
    fetched: asyncio.Future[Path] = loop.create_future()

    def work() -> None:
        try:
            path = fetch(uri, revision, cache)
        except BaseException as error:
            outcome: BaseException | Path = error
        else:
            outcome = path
        with suppress(RuntimeError):  # the loop is closed: the worker left
            loop.call_soon_threadsafe(settle, outcome)

    def settle(outcome: BaseException | Path) -> None:
        if fetched.done():
            return
        if isinstance(outcome, BaseException):
            fetched.set_exception(outcome)
        else:
            fetched.set_result(outcome)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    return await fetched


def _show_progress(cache: Path, finished: threading.Event) -> None:
    started = time.monotonic()
    while not finished.wait(_PROGRESS_S):
        held = sum(_size(path) for path in cache.rglob("*") if not path.is_symlink())
        log.info("fetching the model: %d MB in the cache after %d s", held // 10**6, time.monotonic() - started)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:200]
