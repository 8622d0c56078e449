"""hf://: a repository of the Hugging Face hub, or of whatever HF_ENDPOINT names.

Owns the translation of the hub's refusals into sentences. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
to huggingface_hub, which does the fetching. No repository's own code is ever run.
"""

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from gpumeter_worker.failure import MODEL_ACCESS_DENIED, MODEL_NOT_FOUND, StartupFailed, first_line
from gpumeter_worker.sources.location import Location
from gpumeter_worker.sources.progress import Progress
from gpumeter_worker.sources.remote import RemoteFile, Snapshot, Unreachable
from gpumeter_worker.sources.wanted import wanted

T = TypeVar("T")

_PARALLEL = 4
_ASK_TIMEOUT_S = 30.0
_LOOK_S = 0.5
_LIBRARY = ".cache"  # where the library keeps files that are not whole yet, and goes on with them


class Hub:
    """One repository at one revision."""

    def __init__(self, location: Location, *, offline: bool, environment: Mapping[str, str]) -> None:
        self.uri = location.uri
        self.revision = location.revision
        self.resumed = _LIBRARY
        self.pinned = location.revision if re.fullmatch(r"[0-9a-f]{40}", location.revision) else ""
        self._repository = location.uri.removeprefix("hf://").strip("/")
        self.allow_pickle = location.allow_pickle
        self._offline = offline
        self._endpoint = environment.get("HF_ENDPOINT") or None
        self._token = environment.get("HF_TOKEN") or None

    def look(self) -> Snapshot:
        """Ask the hub for the commit and its files."""
        if self._offline:
            raise Unreachable(
                f"HF_HUB_OFFLINE is set and {self._name} is not in the cache; fetch it once with the hub in reach, "
                "or remove HF_HUB_OFFLINE",
                may_pass=False,
            )

        def ask() -> Snapshot:
            api = HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(self._repository, revision=self.revision, files_metadata=True, timeout=_ASK_TIMEOUT_S)
            held = {one.rfilename: one for one in info.siblings or []}
            files = tuple(
                RemoteFile(name, held[name].size or 0, _digest(held[name]))
                for name in wanted(held, allow_pickle=self.allow_pickle)
            )
            if not files:
                raise StartupFailed(MODEL_NOT_FOUND, f"{self._name} holds no file of a model; check spec.model.uri")
            return Snapshot(info.sha or self.revision, sum(file.size for file in files), files)

        return self._translated(ask)

    def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        """Several files at a time; how far they are is read from the folder, whichever way the library writes them."""
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_LOOK_S):
                progress.reach(_size(folder))

        def get(name: str) -> None:
            hf_hub_download(
                self._repository,
                name,
                revision=snapshot.version,
                local_dir=folder,
                endpoint=self._endpoint,
                token=self._token,
            )

        threading.Thread(target=watch, name="watch", daemon=True).start()
        missing = [file.name for file in snapshot.files if not _is_whole(folder / file.name, file.size)]
        pool = ThreadPoolExecutor(_PARALLEL)
        try:
            for done in [pool.submit(self._translated, partial(get, name)) for name in missing]:
                done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            finished.set()

    def elsewhere(self) -> Path | None:
        """Where the library's own cache (HF_HOME) holds the repository, filled by hand, for example."""
        try:
            return Path(snapshot_download(self._repository, revision=self.revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            return None

    @property
    def _name(self) -> str:
        return f"{self._repository} at {self.revision}"

    def _translated(self, ask: Callable[[], T]) -> T:
        at = self._endpoint or "the hub"
        try:
            return ask()
        except GatedRepoError as error:
            raise StartupFailed(
                MODEL_ACCESS_DENIED,
                f"{self._name} is gated ({first_line(error)}); accept its licence at the hub and give a token that may "
                "read it as HF_TOKEN in spec.template",
            ) from None
        except RevisionNotFoundError:
            raise StartupFailed(
                MODEL_NOT_FOUND, f"{self._repository} has no revision {self.revision}; correct spec.model.revision"
            ) from None
        except RepositoryNotFoundError:
            token = "HF_TOKEN may not read it" if self._token else "there is no HF_TOKEN"
            raise StartupFailed(
                MODEL_NOT_FOUND,
                f"{at} has no {self._repository}, or it is private and {token}; correct spec.model.uri, or give a "
                "token that may read it as HF_TOKEN in spec.template",
            ) from None
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError, ConnectionError) as error:
            cause = error.__cause__ or error
            raise Unreachable(
                f"{at} cannot be reached for {self._name} ({first_line(cause)}); check the network, its proxy settings "
                "and HF_ENDPOINT"
            ) from None
        except HfHubHTTPError as error:
            raise self._refused(error, at) from None
        except HFValidationError as error:
            raise StartupFailed(MODEL_NOT_FOUND, f"{first_line(error)}; correct spec.model.uri") from None

    def _refused(self, error: HfHubHTTPError, at: str) -> StartupFailed:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            return StartupFailed(
                MODEL_ACCESS_DENIED,
                f"{at} does not let this worker read {self._name} (status {status}); give a token that may read it as "
                "HF_TOKEN in spec.template",
            )
        if status == 404:
            return StartupFailed(MODEL_NOT_FOUND, f"{at} has no {self._name}; correct spec.model.uri")
        return Unreachable(f"{at} answered {status} for {self._name} ({first_line(error)}); try again later")


def _digest(file: RepoSibling) -> str:
    if file.lfs is not None:
        return f"sha256:{file.lfs.sha256}"
    return f"git:{file.blob_id}" if file.blob_id else ""


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # renamed meanwhile
    return total
