"""`gpumeter collector`: joins mirrors, ledger, rounds and probes, and runs them until SIGTERM.

Owns the process: its loops, how it tells that it lives, and that it stops only between transactions. Decides nothing.
"""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import click

from gpumeter_operator.adapters.collector_metrics import CollectorMetrics, Sample
from gpumeter_operator.adapters.health import HealthServer
from gpumeter_operator.adapters.kubernetes import INFERENCE_SERVICES, PODS, PRICE_PLANS, Cluster, Refused, Unreachable
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable, has_one_writer
from gpumeter_operator.adapters.ledger.members import Members
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.adapters.workers import Workers
from gpumeter_operator.cli.collector_settings import Settings, read_settings
from gpumeter_operator.cli.start import settings_or_exit
from gpumeter_operator.decide.credentials import derive
from gpumeter_operator.decide.names import SERVICE_LABEL
from gpumeter_operator.decide.shares import BEAT_S
from gpumeter_operator.flow.close import Closer
from gpumeter_operator.flow.collect import Collector
from gpumeter_operator.flow.digests import Digester
from gpumeter_operator.flow.housekeeping import keep_house
from gpumeter_operator.flow.plans import PlanTeller
from gpumeter_operator.flow.profiles import ProfileKeeper
from gpumeter_operator.flow.publish import Publisher
from gpumeter_operator.flow.rounds import CloseRound, CollectRound
from gpumeter_operator.flow.service_usage import UsageTeller
from gpumeter_operator.flow.share import Share
from gpumeter_usage.period import SECOND_NS, rfc3339

log = logging.getLogger(__name__)

LEDGER_THREADS = 4  # one writes at a time; the others read
STALE_NS = 120 * SECOND_NS  # a round waits for the ledger 30 s and for the API server 10 s at most
OPEN_S = 15.0  # below the liveness probe's patience; then the pod is started again, and waits longer each time
FINISH_S = 20.0  # below the pod's grace period of 30 s
SHARE_OF_TIME = 10  # closing may take a tenth of the time: a slow fold is done less often

T = TypeVar("T")
Round = Callable[[], Awaitable[None]]


@click.command()
def collector() -> None:
    """Collect usage records and publish UsageReports until SIGTERM. Everything is set by GPUMETER_* variables."""
    settings = settings_or_exit(read_settings)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        asyncio.run(_run(settings))
    except (LedgerUnavailable, Unreachable) as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    threads = ThreadPoolExecutor(LEDGER_THREADS, thread_name_prefix="ledger")
    ledger = await _open(settings.ledger_url, stop)
    from_ns = ledger.set_granularity(settings.granularity, time.time_ns())
    if from_ns > time.time_ns():
        log.info("Periods change to %s at %s.", settings.granularity, rfc3339(from_ns))
    cluster = Cluster.connect()
    workers = Workers()
    process = Process(settings, ledger, cluster, workers, threads)
    try:
        await process.run(stop)
    finally:
        await workers.close()
        await cluster.close()
        threads.shutdown()
        ledger.close()
    log.info("stopped")


async def _open(url: str, stop: asyncio.Event) -> Ledger:
    """The ledger; a database that is away is waited for a while, as it would be later. Raises LedgerUnavailable."""
    until_s = time.monotonic() + OPEN_S
    while True:
        try:
            return await asyncio.to_thread(Ledger, url)
        except LedgerUnavailable as problem:
            if not url.startswith("postgres") or stop.is_set() or time.monotonic() > until_s:
                raise
            log.warning("%s It is tried again.", problem)
        await _pause(1.0, stop)


class Process:
    """Everything that runs in a collector, and when each loop was last through."""

    def __init__(
        self, settings: Settings, ledger: Ledger, cluster: Cluster, workers: Workers, threads: ThreadPoolExecutor
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._threads = threads
        member_id = f"{socket.gethostname()[:50]}-{uuid4().hex[:8]}"
        # A thread of its own: whoever waits behind long transactions must not count as dead.
        self._beats = ThreadPoolExecutor(1, thread_name_prefix="beat")
        self._share = Share(
            member_id,
            Members(ledger, member_id, socket.gethostname(), own_ns=time.time_ns),
            partial(_executed, self._beats),
            time.monotonic_ns,
            one_works=has_one_writer(ledger.engine),
        )
        self._pods = Mirror(cluster, PODS, labels={SERVICE_LABEL: None}, on_remove=self._pod_removed)
        self._services = Mirror(cluster, INFERENCE_SERVICES)
        self._plans = Mirror(cluster, PRICE_PLANS)
        self._collector = Collector(
            ledger,
            workers,
            self._execute,
            time.time_ns,
            ProfileKeeper(ledger, workers, self._execute, time.time_ns),
        )
        self._publisher = Publisher(cluster, ledger, self._execute, settings.keep)
        self._collect = CollectRound(
            ledger,
            self._collector,
            self._execute,
            pods=lambda: self._pods.objects,
            services=lambda: self._services.objects,
            lookup=lambda namespace, name: cluster.get(PODS, name, namespace),
            mine=self._share.mine,
        )
        self._close = CloseRound(
            ledger,
            Closer(ledger, settings.grace_s * SECOND_NS),
            self._publisher,
            self._execute,
            services=lambda: self._services.objects,
            plans=lambda: self._plans.objects,
            teller=PlanTeller(cluster, ledger, self._execute),
            usage=UsageTeller(cluster, ledger, self._execute, lambda: self._services.objects),
        )
        self._digester = Digester(ledger, self._execute, settings.signing_key, settings.digests_file)
        self._mirrors = (self._pods, self._services, self._plans)
        self._synced = False
        self._recovered = False
        self._round_ended_ns: dict[str, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set; then finish what was begun."""
        mirrors = self._mirrors
        health = HealthServer(self._alive, self._ready, CollectorMetrics(self._sample).render)
        await health.start(self._settings.http_host, self._settings.http_port)
        background = [asyncio.create_task(mirror.run()) for mirror in mirrors]
        stopping = asyncio.create_task(_until(stop))
        try:
            synced = asyncio.create_task(_all_synced(mirrors))
            await asyncio.wait((synced, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                synced.cancel()
                return
            self._synced = True
            log.info("collecting: %d pods of %d services", len(self._pods.objects), len(self._services.objects))
            pull_s, publish_s = self._settings.pull_interval_ms / 1000, self._settings.publish_interval_ms / 1000
            await asyncio.gather(
                self._loop("beat", BEAT_S, self._beat_once, stop),
                self._loop("collect", pull_s, self._collect_once, stop),
                self._loop("close", publish_s, self._close_once, stop),
                keep_house(self._ledger, self._settings.retention_days, self._execute, time.time_ns, stop),
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(FINISH_S):
                    await self._collector.stop()
                    await self._share.leave()
        finally:
            for task in (*background, stopping):
                task.cancel()
            await asyncio.gather(*background, stopping, return_exceptions=True)
            await health.close()
            self._beats.shutdown()

    async def _beat_once(self) -> None:
        await self._share.beat()

    def _pod_removed(self, pod: dict[str, Any]) -> None:
        self._collect.removed(pod, time.time_ns())

    async def _collect_once(self) -> None:
        if not self._share.works:
            self._recovered = False
            return
        if not self._recovered:
            try:
                await self._collect.recover(time.time_ns())
            except (Unreachable, Refused) as problem:
                log.warning("Which pods went while nobody watched cannot be told yet: %s", problem)
                return
            self._recovered = True
        token_of = partial(derive, self._settings.master_key, "usage-token")
        await self._collect.run(token_of, time.time_ns())

    async def _close_once(self) -> None:
        # Only what was recovered: a pod that went unseen would hold its periods open, or let them close too early.
        if self._share.leads and self._recovered:
            await self._close.run(time.time_ns())
            await self._digester.run(time.time_ns())

    async def _loop(self, name: str, interval_s: float, once: Round, stop: asyncio.Event) -> None:
        self._round_ended_ns[name] = time.monotonic_ns()  # a first round that hangs must be seen, too
        while not stop.is_set():
            begun_ns = time.monotonic_ns()
            try:
                await once()
                self._collector.counters.ledger_problem = ""
            except LedgerUnavailable as problem:
                self._collector.counters.ledger_problem = str(problem)
                log.error("%s", problem)
            except Exception:
                # One round's surprise must not end billing for everyone; it is loud, and the next round tries again.
                log.exception("The %s round failed.", name)
            ended_ns = time.monotonic_ns()
            self._round_ended_ns[name] = ended_ns
            took_s = (ended_ns - begun_ns) / SECOND_NS
            await _pause(max(interval_s - took_s, took_s * SHARE_OF_TIME if name == "close" else 0.0), stop)

    async def _execute(self, call: Callable[[], T]) -> T:
        return await _executed(self._threads, call)

    def _alive(self) -> str | None:
        for mirror in self._mirrors:
            if told := mirror.silence():
                return told
        now_ns = time.monotonic_ns()
        for name, ended_ns in self._round_ended_ns.items():
            if now_ns - ended_ns > STALE_NS:
                return f"The {name} round has not ended for {(now_ns - ended_ns) // SECOND_NS} s."
        return None

    def _ready(self) -> str | None:
        if not self._synced:
            return "Pods, InferenceServices and PricePlans are not listed yet."
        if self._collector.counters.ledger_problem:
            return self._collector.counters.ledger_problem
        if told := self._share.stands_by():
            return told
        return None if self._recovered else "Which pods went while nobody watched is not known yet."

    def _sample(self) -> Sample:
        counters, now_ns = self._collector.counters, time.monotonic_ns()
        return Sample(
            records=counters.records,
            pages=counters.pages,
            pulls_failed=counters.pulls_failed,
            alarms=dict(counters.alarms),
            reports_written=self._publisher.written,
            reports_refused=self._publisher.refused,
            lag_ns_max=max(0, time.time_ns() - min(counters.settled_ns.values(), default=time.time_ns())),
            workers=len(counters.settled_ns),
            round_age_ns={name: now_ns - ended_ns for name, ended_ns in self._round_ended_ns.items()},
            ledger_usable=not counters.ledger_problem,
            collectors=len(self._share.members),
            leads=self._share.leads,
            silent_ns={
                (each.worker.namespace, each.worker.pod): time.time_ns() - each.since_ns
                for each in self._collector.silent.values()
            },
        )


async def _executed(threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    # A transaction that was begun is finished, whatever becomes of the one who asked for it.
    return await asyncio.get_running_loop().run_in_executor(threads, call)


async def _all_synced(mirrors: Iterable[Mirror]) -> None:
    for mirror in mirrors:
        await mirror.synced()


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


async def _pause(seconds: float, stop: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
