"""The one exception of the local cluster: a sentence that a person can act on.

Owns how a failure is told, together with the last lines of the log that matters. Knows nothing of clusters.
"""

from pathlib import Path


class ClusterError(Exception):
    """Something that the user has to know or to do, as a plain sentence, and the log that shows why."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.log = log


def last_lines(log: Path, count: int = 15, width: int = 400) -> list[str]:
    """Return the last lines of a log, cut to a width that a terminal can show; empty when there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line[:width] for line in text.splitlines()[-count:]]
