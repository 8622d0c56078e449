"""Asks the gateways what waits: one long poll to each of their pods, merged into figures per service.

Owns who is asked (the addresses in the EndpointSlices of the gateway's Service, ready or not: one that drains still has
requests), what an answer must look like, and when the figures of a gateway that fell silent no longer count. Does not
know what is done with the figures.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import msgspec

from gpumeter_operator.adapters.kubernetes import ENDPOINT_SLICES
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.adapters.mirror import Source as Cluster
from gpumeter_operator.decide.names import INTERNAL_PORT, SLICE_OF_LABEL

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 25.0  # a gateway holds a poll for 20 s
OVERDUE_S = 30.0
SILENCE_MAX_S = 30.0  # one poll that was not answered; then what was told last says nothing about now
BACKOFF_S = (0.05, 0.2, 0.5, 1.0, 2.0)  # the first is short: a start from zero waits for it
ANSWER_BYTES_MAX = 8 << 20  # a hundred bytes a service

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a service at all gateways together. `waiting_since_ms`: Unix time by this process's clock."""

    waiting: int = 0
    in_flight: int = 0
    waiting_since_ms: int | None = None


class _Told(msgspec.Struct, frozen=True):
    waiting: int
    inflight: int
    waiting_since_ms: int | None = None


class _Answer(msgspec.Struct, frozen=True):
    version: int
    whole: bool
    now_ms: int
    services: dict[str, _Told]


class Endpoints(Protocol):
    """Where the gateways are: adapters.mirror.Mirror of their Service's EndpointSlices."""

    @property
    def objects(self) -> Mapping[tuple[str, str], Any]:
        """EndpointSlices as plain dicts."""


OnChange = Callable[[frozenset[str]], None]
"""Called with the services (`namespace/name`) whose figures have changed. Must not block; exceptions are logged."""


def mirror_of(cluster: Cluster, namespace: str, service: str, on_change: Callable[[], None] | None = None) -> Mirror:
    """The EndpointSlices of the gateway's Service, kept up to date while its `run` runs."""
    return Mirror(cluster, ENDPOINT_SLICES, namespace=namespace, labels={SLICE_OF_LABEL: service}, on_change=on_change)


def addresses(slices: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Every gateway pod's first address, whatever its conditions say; a dual-stack pod's once."""
    found: dict[str, str] = {}
    for item in sorted(slices, key=lambda one: (one.get("addressType", ""), one["metadata"].get("name", ""))):
        for endpoint in item.get("endpoints") or ():
            if endpoint.get("addresses") and item.get("addressType") != "FQDN":
                pod = (endpoint.get("targetRef") or {}).get("uid") or endpoint["addresses"][0]
                found.setdefault(pod, endpoint["addresses"][0])
    return frozenset(found.values())


class Gateways:
    """The figures of all gateways, kept up to date while `run` runs.

    `targets` gives "host:port" of every gateway of now; call `look` when they may have changed.
    """

    def __init__(
        self,
        targets: Callable[[], Iterable[str]],
        token: str,
        on_change: OnChange,
        *,
        silence_max_s: float = SILENCE_MAX_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._silence_max_s = silence_max_s
        self._answer_timeout_s = answer_timeout_s
        self._targets = targets
        self._on_change = on_change
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
        self._moved = asyncio.Event()
        self._ticked_s = time.monotonic()
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, dict[str, Asked]] = {}  # target -> service
        self._heard_s: dict[str, float] = {}
        self._asked: dict[str, Asked] = {}

    def asked(self) -> Mapping[str, Asked]:
        """What is asked of each service now; one of which nothing is asked is absent. A live view, not to be kept."""
        return self._asked

    def silent(self) -> tuple[str, ...]:
        """A sentence for each gateway whose figures do not count, because it has not answered for a while."""
        now_s = time.monotonic()
        return tuple(
            f"The gateway at {target} has not answered for {now_s - heard_s:.0f} s."
            for target, heard_s in sorted(self._heard_s.items())
            if now_s - heard_s > self._silence_max_s
        )

    def overdue(self) -> str | None:
        """A sentence when `run` has not come round for too long; it does so every second, whoever answers."""
        age_s = time.monotonic() - self._ticked_s
        return f"The loop that asks the gateways last came round {age_s:.0f} s ago." if age_s > OVERDUE_S else None

    def look(self) -> None:
        """The gateways may have changed."""
        self._moved.set()

    async def run(self) -> None:
        """Poll every gateway until cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._answer_timeout_s, connect=CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers, auto_decompress=False) as http:
            try:
                while True:
                    self._ticked_s = time.monotonic()
                    self._moved.clear()
                    self._follow(http, frozenset(self._targets()))
                    try:
                        async with asyncio.timeout(1.0):  # also the pace at which silence is noticed
                            await self._moved.wait()
                    except TimeoutError:
                        self._age()
            finally:
                for poll in self._polls.values():
                    poll.cancel()
                await asyncio.gather(*self._polls.values(), return_exceptions=True)

    def _follow(self, http: aiohttp.ClientSession, targets: frozenset[str]) -> None:
        for target in targets - self._polls.keys():
            self._heard_s[target] = time.monotonic()
            self._polls[target] = asyncio.create_task(self._poll(http, target))
        for target in self._polls.keys() - targets:
            self._polls.pop(target).cancel()
            self._heard_s.pop(target)
            self._take(target, {})
            self._told.pop(target, None)

    async def _poll(self, http: aiohttp.ClientSession, target: str) -> None:
        version: int | None = None
        failures = 0
        while True:
            try:
                answer = await _ask(http, target, version)
            except _Unusable as problem:
                # A gateway that starts or ends is asked before it listens or after; only what lasts is worth a line.
                log.log(logging.WARNING if failures == len(BACKOFF_S) else logging.DEBUG, "%s", problem)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
                version = None  # figures may be dropped meanwhile, and a part would not make them whole
                continue
            failures = 0
            version = answer.version
            self._heard_s[target] = time.monotonic()
            ahead_ms = answer.now_ms - time.time_ns() // 1_000_000  # the gateway's clock before ours
            told = {name: _asked(one, ahead_ms) for name, one in answer.services.items()}
            self._take(target, told if answer.whole else {**self._told.get(target, {}), **told})

    def _age(self) -> None:
        now_s = time.monotonic()
        for target, heard_s in self._heard_s.items():
            if now_s - heard_s > self._silence_max_s and self._told.get(target):
                log.warning("The gateway at %s fell silent; its figures no longer count.", target)
                self._take(target, {})

    def _take(self, target: str, told: dict[str, Asked]) -> None:
        """These are the figures of one gateway now; reckon the sums of what changed."""
        before = self._told.get(target, {})
        self._told[target] = {name: one for name, one in told.items() if one != Asked()}
        moved = {name for name in before.keys() | told.keys() if before.get(name, Asked()) != told.get(name, Asked())}
        changed = set()
        for name in moved:
            total = _sum([figures[name] for figures in self._told.values() if name in figures])
            if total == self._asked.get(name, Asked()):
                continue
            changed.add(name)
            if total == Asked():
                self._asked.pop(name, None)
            else:
                self._asked[name] = total
        if changed:
            try:
                self._on_change(frozenset(changed))
            except Exception:  # a listener's failure must not end the polls
                log.exception("The on_change hook of the gateways' figures failed; the polls go on.")


class _Unusable(Exception):
    """A gateway did not answer, or not as it should; the message is a sentence."""


async def _ask(http: aiohttp.ClientSession, target: str, after: int | None) -> _Answer:
    query = {} if after is None else {"after": str(after)}
    try:
        async with http.get(f"http://{target}/internal/waiting", params=query, allow_redirects=False) as response:
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > ANSWER_BYTES_MAX:
                    raise _Unusable(f"The gateway at {target} answered with more than {ANSWER_BYTES_MAX} bytes.")
            if response.status != 200:
                said = body[:200].decode("utf-8", "replace").strip()
                raise _Unusable(f"The gateway at {target} answered with {response.status}: {said}")
    except TimeoutError:
        raise _Unusable(f"The gateway at {target} did not answer in time.") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _Unusable(f"The gateway at {target} cannot be reached: {error}") from None
    try:
        return msgspec.json.decode(bytes(body), type=_Answer)
    except msgspec.DecodeError as error:
        raise _Unusable(f"The gateway at {target} answered what cannot be read: {error}") from None


def _asked(told: _Told, ahead_ms: int) -> Asked:
    since_ms = None if told.waiting_since_ms is None else told.waiting_since_ms - ahead_ms
    return Asked(told.waiting, told.inflight, since_ms)


def _sum(figures: list[Asked]) -> Asked:
    since = [one.waiting_since_ms for one in figures if one.waiting_since_ms is not None]
    return Asked(sum(one.waiting for one in figures), sum(one.in_flight for one in figures), min(since, default=None))


def target_of(address: str, port: int = INTERNAL_PORT) -> str:
    """host:port of a gateway pod; an IPv6 address stands in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
