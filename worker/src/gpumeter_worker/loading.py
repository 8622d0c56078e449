"""How far the start of a worker's model is, as a sentence for readiness, log and status.

Owns the sentence while the engine loads; what is told while the model is fetched is passed on as it is. Times are
readings of the monotonic clock in seconds.
"""

from contextlib import suppress
from pathlib import Path

from gpumeter_worker.sources.progress import duration, megabytes


class Loading:
    """The last thing that is known."""

    def __init__(self) -> None:
        self._told = ""
        self._weights = 0
        self._began_s = 0.0

    def tell(self, sentence: str) -> None:
        """Pass on what who fetches says."""
        self._told = sentence

    def of(self, path: Path) -> None:
        """The model is on this machine, in this folder; from now on it is the engine that loads it."""
        self._told, self._weights = "", 0
        with suppress(OSError):  # whoever loads it says what is wrong with it
            self._weights = sum(
                file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".bin")
            )

    def begin(self, now_s: float) -> None:
        """The phase began."""
        self._began_s = now_s

    def text(self, now_s: float) -> str:
        """The sentence, empty where nothing is known."""
        if self._told or not self._weights:
            return self._told
        return f"loading {megabytes(self._weights)} MB of weights for {duration(now_s - self._began_s)}"
