"""Requests of several tenants from inside the node's network, one after the other, for as long as a story lasts.

Owns the threads. They do not go through the API server, so what they see is the service's doing alone. Everything that
is asked can be answered: whatever does not finish is a finding.
"""

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import cycle, islice
from types import TracebackType

from devcluster.namespaces import enter_network
from devcluster.processes import Process
from traffic.asks import Ask, Kind, asks
from traffic.exchange import Exchange, Outcome, exchange

LONGEST_TOKENS = 12
TIMEOUT_S = 180.0
PAUSE_S = 0.2
"""Between two requests of a tenant: two busy cores also have to load models meanwhile."""
_LONG = {"max_tokens": 64, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}


class Chat:
    """The traffic while the block runs; what came of it is in `exchanges`, in the order of the ends."""

    def __init__(self, node: Process, address: str, keys: Mapping[str, str], model: str, seed: int = 1) -> None:
        self.exchanges: list[Exchange] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []
        self._node = node
        self._address = address
        self._keys = keys
        self._model = model
        self._threads = [
            threading.Thread(target=self._follow, args=(tenant, key, _answerable(seed, tenant, model)), daemon=True)
            for tenant, key in keys.items()
        ]

    def __enter__(self) -> "Chat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let what runs end; what a thread died of is raised, unless the story itself failed."""
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        if self._failures and error is None:
            raise self._failures[0]

    def ask_at_once(self, count: int) -> None:
        """Ask for that many long answers together; they are followed beside everything else."""
        for number, (tenant, key) in enumerate(islice(cycle(self._keys.items()), count)):
            body = {**_LONG, "model": self._model, "messages": [{"role": "user", "content": f"Count from {number}."}]}
            talk = partial(self._follow, tenant, key, iter([Ask(number, Kind.STREAMED, body)]))
            self._threads.append(threading.Thread(target=talk, daemon=True))
            self._threads[-1].start()

    def finished(self) -> int:
        """How many requests were answered whole."""
        with self._lock:
            return sum(one.outcome is Outcome.FINISHED for one in self.exchanges)

    def _follow(self, tenant: str, key: str, source: Iterator[Ask]) -> None:
        try:
            enter_network(self._node)
            for ask in source:
                if self._over.is_set():
                    return
                one = exchange(self._address, 80, tenant, key, ask, timeout_s=TIMEOUT_S)
                with self._lock:
                    self.exchanges.append(one)
                self._over.wait(PAUSE_S)
        except BaseException as failure:
            self._failures.append(failure)
            raise


def _answerable(seed: int, tenant: str, model: str) -> Iterator[Ask]:
    every = asks(seed, tenant, model, LONGEST_TOKENS)
    return (one for one in every if one.kind in (Kind.PLAIN, Kind.STREAMED))
