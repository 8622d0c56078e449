"""One worker from process start to seal: joins engine, meter, journal and sessions.

Owns what happens when: admission, the engine's events, flushes, restarts of the engine, drain. Speaks no HTTP (api.app
calls it) and computes no shares (metering does). Lives in the event loop of the API process.
"""

import asyncio
import logging
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gpumeter_usage.record import Status
from gpumeter_worker import diagnosis, source
from gpumeter_worker.api.errors import Refused, unavailable
from gpumeter_worker.api.identity import Caller
from gpumeter_worker.api.sessions import End, Session, Sessions
from gpumeter_worker.api.tokenizer import Tokenizer
from gpumeter_worker.engine.link import EngineLink
from gpumeter_worker.engine.messages import (
    Cancel,
    Ended,
    EngineOptions,
    Event,
    Fatal,
    PhaseEntered,
    Ready,
    StepReport,
    Submit,
)
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import uncalibrated
from gpumeter_worker.metering.clock import Anchor
from gpumeter_worker.metering.lease import lease
from gpumeter_worker.metering.meter import Identity, Meter, Totals
from gpumeter_worker.metering.writer import JournalWriter
from gpumeter_worker.metrics import Observations
from gpumeter_worker.readiness import Condition, Readiness, readiness
from gpumeter_worker.settings import Settings

log = logging.getLogger(__name__)

_GROUP_COMMIT_S = 0.05
"""How long a session's end waits for others to share its transaction; with the disk's time well under 200 ms."""

_RETRY_S = 1.0
_BACK_OFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_HEALTHY_S = 60.0
"""An engine that served this long starts anew without the back-off of its predecessors."""

_KILLED_STARTS_MAX = 3
_CUT_OFF_S = 10.0

_STATUS = {
    Finish.STOP: Status.FINISHED,
    Finish.LENGTH: Status.FINISHED,
    Finish.CANCELLED: Status.CANCELLED,
    Finish.FAILED: Status.FAILED,
}


class Worker:
    """The state of a worker. `run` returns only by StartupFailed; `drain` ends the boot's chain."""

    def __init__(self, settings: Settings, started_ns: int) -> None:
        self.settings = settings
        self.anchor = Anchor.now()
        self._started_ns = self.anchor.utc_ns(started_ns)
        identity = Identity(
            worker_uid=settings.worker_uid,
            boot_id=uuid.uuid4().hex,
            service=settings.service,
            model=settings.model_name,
            gpu_class=settings.gpu_class,
            clock=settings.clock,
        )
        self.meter = Meter(identity, uncalibrated(settings.attribution, settings.clock), self._started_ns)
        self.journal = JournalWriter(
            settings.journal_dir, settings.worker_uid, settings.service, settings.journal_max_bytes
        )
        self.sessions = Sessions()
        self.observed = Observations(settings.model_name)
        self.tokenizer: Tokenizer | None = None
        self.engine: Ready | None = None
        self._link: EngineLink | None = None
        self._engine_problem = ""
        self._engine_starts = 0
        self._killed_starts = 0
        self._engine_ready_ns = 0
        self._draining = False
        self._flush_wanted = asyncio.Event()
        self._lost = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushing: asyncio.Task[None] | None = None

    async def run(self, path: Path | None) -> None:
        """Open the journal, fetch the model if `path` is None, keep an engine running. Raises StartupFailed."""
        await self.journal.open(self.meter.identity, self._started_ns)
        if self.journal.problem:
            log.error("the worker serves what its journal still holds, and nothing else")
            await asyncio.Event().wait()
        self._flushing = asyncio.create_task(self._flush_often())
        if path is None:
            self._enter(Phase.LOAD, time.monotonic_ns())
            path = await self._fetch()
            diagnosis.check_model_files(path)
        tokenizer = asyncio.create_task(asyncio.to_thread(Tokenizer, path))
        options = self._options(path)
        try:
            while True:
                self._lost.clear()
                self._link = EngineLink(options, self._on_events, self._on_lost)
                self.tokenizer = await tokenizer
                lost = asyncio.create_task(self._lost.wait())
                await asyncio.wait((lost, self._failed), return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                if self._failed.done():
                    self._failed.result()
                await asyncio.sleep(self._back_off_s())
                if self._draining:
                    await asyncio.Event().wait()
        finally:
            if self._link is not None:
                self._link.kill()

    def readiness(self) -> Readiness:
        """Whether new work is admitted, and why not."""
        return readiness(
            Condition(
                phase=self.meter.accounts.phase,
                draining=self._draining,
                engine_ready=self.engine is not None and self.tokenizer is not None,
                engine_problem=self._engine_problem,
                journal_open=self.journal.head is not None,
                journal_problem=self.journal.problem,
                journal_full=self.journal.full,
                lease=lease(
                    time.monotonic_ns(), self.journal.acknowledged_at_ns, self.settings.lease_timeout_ms * 10**6
                ),
            )
        )

    def refuse_unless_ready(self) -> tuple[Ready, Tokenizer]:
        """What a request needs to be read. Raises Refused (503)."""
        state = self.readiness()
        if not state.ready or self.engine is None or self.tokenizer is None:
            raise unavailable(state.reason, state.message, retry_after_s=1 if self._draining else 5)
        return self.engine, self.tokenizer

    def submit(self, caller: Caller, prompt: list[int], sampling: Sampling) -> Session:
        """Admit a request that was checked against the model. Raises Refused."""
        engine, _ = self.refuse_unless_ready()
        if len(self.sessions) >= engine.max_batch_size + self.settings.max_queue_length:
            raise Refused(
                429,
                "queue_full",
                f"{self.sessions.waiting} requests wait already (at most {self.settings.max_queue_length}); try again",
                headers={"Retry-After": "1"},
            )
        if self.sessions.known(caller.session_id):
            raise Refused(
                409, "session_used", "this session was served already; every request needs a session of its own"
            )
        session = Session(caller.session_id, caller.tenant, prompt)
        self.meter.begin(session.session_id, session.tenant, self.anchor.utc_ns(session.begun_ns))
        self.sessions.add(session)
        self._send(Submit(session.session_id, prompt, sampling))
        return session

    def take_back(self, session: Session, outcome: Status) -> None:
        """Stop a session before the engine's next step; it keeps what it used. Nothing happens when it has ended."""
        if not session.ended and session.outcome is None:
            session.outcome = outcome
            self._send(Cancel(session.session_id))

    async def flush(self) -> bool:
        """Journal everything up to the frontier; True when it is on disk."""
        if self.journal.problem:
            return await self.journal.retry()
        flush = self.meter.cut(self._now_ns())
        return await self.journal.append(flush) if flush else True

    async def drain(self, cut_short: asyncio.Event) -> None:
        """Admit nothing, finish or cut off what runs, seal the chain, wait for the seal's acknowledgement."""
        self._draining = True
        self._enter(Phase.DRAIN, time.monotonic_ns())
        log.info("draining %d sessions", len(self.sessions))
        await self._until(self.sessions.emptied, self.settings.drain_timeout_ms / 1000, cut_short)
        for session in self.sessions.all():
            self.take_back(session, Status.CANCELLED)
        await self._until(self.sessions.emptied, _CUT_OFF_S)
        if self._link is not None:
            self._link.kill() if self.engine is None else await self._link.stop()
        if len(self.sessions):
            await self._until(self._lost, _CUT_OFF_S)
        if self._flushing is not None:
            self._flushing.cancel()
            with suppress(asyncio.CancelledError):
                await self._flushing
        await self._seal()
        await self._until_acknowledged(cut_short)

    async def abandon(self) -> None:
        """Start-up failed: keep what was measured. The next boot on this volume seals the chain."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self.journal.head is not None:
            await self.flush()

    def _on_events(self, link: EngineLink, events: Sequence[Event]) -> None:
        if link is not self._link:
            return
        for event in events:
            match event:
                case StepReport():
                    self._on_step(event)
                case Ended():
                    self._on_ended(event)
                case PhaseEntered():
                    self._enter(event.phase, event.at_ns)
                case Ready():
                    self._on_ready(event)
                case Fatal() if not self._failed.done():
                    self._failed.set_exception(diagnosis.StartupFailed(event.reason, event.message))

    def _on_step(self, step: StepReport) -> None:
        self.meter.step(self.anchor.utc_ns(step.started_ns), self.anchor.utc_ns(step.ended_ns), step.gpu_ns, step.parts)
        self.observed.step(step)
        now_ns = time.monotonic_ns()
        for part in step.parts:
            if (session := self.sessions.get(part.session_id)) is not None:
                session.stepped = True
        for session_id, token in step.tokens:
            if (session := self.sessions.get(session_id)) is not None:
                self.observed.token(session.begun_ns, session.last_token_ns, now_ns)
                session.last_token_ns = now_ns
                session.line.put_nowait(token)

    def _on_ended(self, ended: Ended) -> None:
        session = self.sessions.get(ended.session_id)
        if session is not None:
            self._finish(session, ended.finish, ended.message)

    def _finish(self, session: Session, finish: Finish, message: str) -> Totals:
        # What the API process took back is what it says; that the engine then saw a cancel is only how it was done.
        status = session.outcome if session.outcome and finish is Finish.CANCELLED else _STATUS[finish]
        totals = self.meter.end(session.session_id, status, self._now_ns())
        self.sessions.finish(session, End(finish, status, totals, message))
        self.observed.session(status, len(session.prompt), totals)
        self._flush_wanted.set()
        return totals

    def _on_ready(self, ready: Ready) -> None:
        self.meter.identity = replace(self.meter.identity, gpu_uuid=ready.gpu_uuid)
        self.engine, self._engine_problem = ready, ""
        self._engine_ready_ns, self._killed_starts = time.monotonic_ns(), 0
        if not self._draining:
            self._enter(Phase.SERVING, ready.at_ns)
        log.info("ready: %s on %s in %s", self.settings.model_name, ready.device_name, ready.dtype)

    def _on_lost(self, link: EngineLink, how: str) -> None:
        if link is not self._link:
            return
        if not self._draining:
            log.error("%s with %d sessions in flight", how, len(self.sessions))
            self._engine_problem = f"{how}; it is being started again"
            self.observed.engine_lost()
            if self.engine is None and f"signal {signal.SIGKILL.value}" in how:
                self._killed_starts += 1
        self.engine = None
        for session in self.sessions.all():
            self._finish(session, Finish.FAILED, f"{how} while it served this request")
        self._enter(Phase.DRAIN if self._draining else Phase.INIT, time.monotonic_ns())
        if self._killed_starts >= _KILLED_STARTS_MAX and not self._failed.done():
            self._failed.set_exception(
                diagnosis.StartupFailed(
                    diagnosis.OUT_OF_MEMORY,
                    "the engine was killed three times while it loaded the model, most likely for memory; raise "
                    "resources.memory or use a smaller model",
                )
            )
        self._lost.set()

    def _back_off_s(self) -> float:
        if self._engine_ready_ns and time.monotonic_ns() - self._engine_ready_ns > _HEALTHY_S * 1e9:
            self._engine_starts = 0
        wait_s = _BACK_OFF_S[min(self._engine_starts, len(_BACK_OFF_S) - 1)]
        self._engine_starts += 1
        return wait_s

    def _enter(self, phase: Phase, at_ns: int) -> None:
        if self._draining and phase is not Phase.DRAIN:
            return
        self.meter.enter(phase, self.anchor.utc_ns(at_ns))
        self._flush_wanted.set()

    def _send(self, command: Submit | Cancel) -> None:
        if self._link is not None:
            self._link.send(command)

    def _now_ns(self) -> int:
        return self.anchor.utc_ns(time.monotonic_ns())

    async def _flush_often(self) -> None:
        checkpoint_s = self.settings.checkpoint_interval_ms / 1000
        while True:
            # Not wait_for: Python 3.11's may swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S if self.journal.problem else checkpoint_s):
                    await self._flush_wanted.wait()
            if self._flush_wanted.is_set():
                await asyncio.sleep(_RETRY_S if self.journal.problem else _GROUP_COMMIT_S)
            self._flush_wanted.clear()
            try:
                await self.flush()
            except Exception:
                log.exception("a flush failed; it is tried again")

    async def _seal(self) -> None:
        if self.journal.head is None:
            return
        flush = self.meter.cut(self._now_ns()) or self.meter.nothing()
        if await self.journal.append(flush, closing=self.meter.seal(Status.DRAINED)):
            log.info("sealed at record %d", self.journal.head.seq)

    async def _until_acknowledged(self, cut_short: asyncio.Event) -> None:
        deadline = time.monotonic() + self.settings.seal_grace_ms / 1000
        while (head := self.journal.head) is not None and head.acknowledged_seq < head.seq:
            if time.monotonic() >= deadline or cut_short.is_set():
                if self.settings.seal_grace_ms:
                    log.warning("records up to %d were not acknowledged in time; they stay in the journal", head.seq)
                return
            await asyncio.sleep(0.02)

    async def _until(self, event: asyncio.Event, timeout_s: float, cut_short: asyncio.Event | None = None) -> None:
        waits = [asyncio.create_task(one.wait()) for one in (event, cut_short) if one is not None]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _fetch(self) -> Path:
        """In a thread that does not keep the process from leaving: a download may take an hour."""
        loop = asyncio.get_running_loop()
        fetched: asyncio.Future[Path] = loop.create_future()

        def work() -> None:
            settings = self.settings
            try:
                path = source.fetch(settings.model_uri, settings.model_revision, settings.model_cache)
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

    def _options(self, path: Path) -> EngineOptions:
        settings = self.settings
        return EngineOptions(
            model_path=path,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_wait_ms=settings.max_wait_ms,
            threads=diagnosis.threads(),
            memory_bytes=diagnosis.memory_bytes(),
        )
