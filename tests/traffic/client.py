"""The traffic: several requests at a time for every tenant, until the time is over.

Owns threads, progress and the refusal to send anywhere but to this machine. What is asked, asks decides.
"""

import ipaddress
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from traffic.asks import LONGEST_TOKENS, Ask, asks
from traffic.exchange import Exchange, Outcome, exchange

PROGRESS_EVERY_S = 5.0
LONGEST_WAIT_S = 5.0


class AddressRefused(ValueError):
    """A base URL that leads away from this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to send, where and for how long. `keys` is key by tenant; `seconds` bounds the start of new requests."""

    base_url: str
    keys: Mapping[str, str]
    model: str
    seconds: float
    seed: int = 1
    concurrency: int = 3  # for each tenant
    longest: int = LONGEST_TOKENS  # tokens of the longest answer that is asked for
    timeout_s: float = 180.0
    any_address: bool = False
    quiet: bool = False


def run(options: Options) -> list[Exchange]:
    """Send until the time is over, let what runs end, and return all exchanges in the order of their starts."""
    host, port = target(options)
    done: list[Exchange] = []
    lock = threading.Lock()
    end_s = time.monotonic() + options.seconds

    def client(tenant: str, source: "_Shared") -> None:
        while time.monotonic() < end_s:
            one = exchange(host, port, tenant, options.keys[tenant], source.next(), timeout_s=options.timeout_s)
            with lock:
                done.append(one)
            if one.outcome in (Outcome.BUSY, Outcome.FAILED):
                wait_s = min(max(one.retry_after_s, 0.5), LONGEST_WAIT_S, max(end_s - time.monotonic(), 0))
                time.sleep(wait_s)

    threads = [
        threading.Thread(target=client, args=(tenant, source), daemon=True)
        for tenant in options.keys
        for source in [_Shared(asks(options.seed, tenant, options.model, options.longest))]
        for _ in range(options.concurrency)
    ]
    for thread in threads:
        thread.start()
    _follow(options, threads, done, lock, end_s)
    return sorted(done, key=lambda one: one.started_at_ns)


def target(options: Options) -> tuple[str, int]:
    """Host and port of the base URL. Raises AddressRefused where it is not this machine and that was not allowed."""
    url = urlsplit(options.base_url)
    if url.scheme != "http" or not url.hostname:
        raise AddressRefused(f"{options.base_url} is not an http:// address.")
    port = url.port or 80
    found = {info[4][0] for info in socket.getaddrinfo(url.hostname, port, proto=socket.IPPROTO_TCP)}
    away = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    if away and not options.any_address:
        raise AddressRefused(
            f"{url.hostname} is {', '.join(sorted(map(str, away)))} and not this machine. Traffic is sent to 127.0.0.1 "
            "only, unless --any-address allows another."
        )
    return url.hostname, port


class _Shared:
    """One tenant's list of requests, drawn from by several threads."""

    def __init__(self, source: Iterator[Ask]) -> None:
        self._lock = threading.Lock()
        self._asks = source

    def next(self) -> Ask:
        with self._lock:
            return next(self._asks)


def _follow(
    options: Options, threads: list[threading.Thread], done: list[Exchange], lock: threading.Lock, end_s: float
) -> None:
    begun_s = told_s = time.monotonic()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
            now_s = time.monotonic()
            if options.quiet or now_s - told_s < PROGRESS_EVERY_S:
                continue
            told_s = now_s
            with lock:
                counts = Counter(str(one.outcome) for one in done)
            running = sum(one.is_alive() for one in threads)
            phase = f"{end_s - now_s:.0f} s to go" if now_s < end_s else f"waiting for {running} clients"
            words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "nothing ended yet"
            print(f"  traffic {now_s - begun_s:4.0f} s: {words}; {phase}", file=sys.stderr, flush=True)
