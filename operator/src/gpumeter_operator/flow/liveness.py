"""Whether kopf still brings every service: its watch is the one loop that cannot be asked for its last tick.

Owns the comparison of what the mirror knows with what kopf has brought. Looks go by the operator's own
mirror (flow.looks), so a frozen watch of kopf shows in new services and in new generations only.
Does not know kopf.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any


class Deliveries:
    """Services of which kopf has not brought the newest generation, and since when."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._heard: dict[str, int] = {}
        self._since_s: dict[tuple[str, int], float] = {}
        self._progress_s = clock_s()

    def hear(self, uid: str, generation: int | None) -> None:
        """kopf has brought this generation of a service, or None: that it is gone."""
        if generation is None:
            self._heard.pop(uid, None)
        else:
            self._heard[uid] = generation

    def late(self, services: Iterable[dict[str, Any]], limit_s: float) -> str | None:
        """A sentence when some have waited for longer than `limit_s`, and none of those that wait was brought since.

        A long queue is no frozen watch: as long as it gets shorter, everybody has time. One that is being deleted is
        left out: kopf brings an object's next event when its handlers have ended, and the release waits for workers.
        """
        now_s = self._clock_s()
        waiting: dict[tuple[str, int], str] = {}
        for service in services:
            metadata = service["metadata"]
            if "deletionTimestamp" in metadata:
                continue
            generation = int(metadata.get("generation", 0))
            if self._heard.get(metadata["uid"], -1) < generation:
                waiting[metadata["uid"], generation] = f"{metadata['namespace']}/{metadata['name']}"
        if self._since_s.keys() - waiting.keys() or not waiting:
            self._progress_s = now_s
        self._since_s = {key: self._since_s.get(key, now_s) for key in waiting}
        if not waiting:
            return None
        oldest = min(self._since_s, key=lambda key: self._since_s[key])
        age_s = now_s - max(self._since_s[oldest], self._progress_s)
        if age_s <= limit_s:
            return None
        return (
            f"The watch of InferenceServices has brought nothing for {age_s:.0f} s, but {len(waiting)} of them are "
            f"new or edited (the first: {waiting[oldest]})."
        )
