"""How far something slow has come, as a sentence for log, readiness and status.

Owns the arithmetic and the words. Written by the thread that works, read by others; knows nothing of what is done.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

_SAMPLE_S = 1.0
_SAMPLES = 10  # the rate is that of the last ten seconds: a stall shows


class Progress:
    """Bytes done of bytes wanted. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._what = "starting"
        self._done = 0
        self._total = 0
        self._moved = 0
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def begin(self, what: str, total: int = 0, done: int = 0) -> None:
        """Something new is being done; without a total there is nothing to count."""
        with self._lock:
            self._what, self._total, self._done = what, total, done
            self._samples.clear()
            self._samples.append((self._clock(), done))

    def advance(self, count: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self._done += count
            self._moved += count
            self._sample()

    def reach(self, done: int) -> None:
        """So many bytes are done in all."""
        with self._lock:
            self._moved += max(0, done - self._done)
            self._done = max(self._done, done)
            self._sample()

    @property
    def done(self) -> int:
        """Bytes that are done of what was begun last, those included that were there before."""
        return self._done

    @property
    def moved(self) -> int:
        """Bytes that were done in all, over everything that was begun."""
        return self._moved

    def text(self) -> str:
        """The sentence, for example `fetching the model: 1,234 of 4,000 MB (30 %), 85 MB/s, 33 s left`."""
        with self._lock:
            if not self._total:
                return self._what
            began_s, began = self._samples[0]
            elapsed_s = self._clock() - began_s
            rate = (self._done - began) / elapsed_s if elapsed_s > 0 else 0.0
            return sentence(self._what, min(self._done, self._total), self._total, rate)

    def _sample(self) -> None:
        now_s = self._clock()
        if now_s - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now_s, self._done))


def sentence(what: str, done: int, total: int, rate: float) -> str:
    """Bytes and bytes per second in words."""
    text = f"{what}: {megabytes(done)} of {megabytes(total)} MB ({100 * done // total} %)"
    if rate < 1:
        return text
    return f"{text}, {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s, {duration((total - done) / rate)} left"


def megabytes(count: int) -> str:
    """Bytes as whole MB (10^6), rounded up so that something never reads as nothing."""
    return f"{-(-count // 10**6):,}"


def duration(seconds: float) -> str:
    """A duration as a person says it."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"
