"""One worker from process start to seal: joins engine, meter, journal and sessions.

Owns what happens when: readiness, the engine's events, drain. Speaks no HTTP (api.app calls it), computes no shares
(metering does), starts no engine (the supervisor does) and ends no session (inflight does). Lives in the event loop of
the API process.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpumeter_usage.record import Account, Status
from gpumeter_worker import diagnosis
from gpumeter_worker.api.errors import Refused, unavailable
from gpumeter_worker.api.identity import Caller
from gpumeter_worker.api.keeping import Keeping
from gpumeter_worker.api.sessions import Choice, Session, Sessions
from gpumeter_worker.api.tokenizer import Tokenizer
from gpumeter_worker.deadline import Deadline, leave_by
from gpumeter_worker.engine.messages import Ended, Event, PhaseEntered, Ready, StepReport
from gpumeter_worker.inflight import InFlight
from gpumeter_worker.launch import engine_options
from gpumeter_worker.loading import Loading
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import uncalibrated
from gpumeter_worker.metering.clock import Anchor
from gpumeter_worker.metering.energy import Window
from gpumeter_worker.metering.flushing import Flusher
from gpumeter_worker.metering.lease import lease
from gpumeter_worker.metering.meter import Identity, Meter
from gpumeter_worker.metering.profiles import Adopted, Profiles, adopt
from gpumeter_worker.metering.writer import JournalWriter
from gpumeter_worker.metrics import Observations, exposition
from gpumeter_worker.readiness import Condition, Loss, Readiness, readiness
from gpumeter_worker.settings import Settings
from gpumeter_worker.sources.aside import fetch_aside
from gpumeter_worker.supervisor import Supervisor
from gpumeter_worker.telemetry.sample import Sample, gpu_class
from gpumeter_worker.telemetry.watch import GpuWatch, Metered

log = logging.getLogger(__name__)

_LOADING_LOG_S = 5.0
_CUT_OFF_S = 10.0
_OPEN_S = 10.0
"""How long a seal waits for the journal to be opened: what start-up took is to be in it."""
_ENGINE_STOP_S = 5.0


class Worker:
    """The state of a worker. `run` returns only by StartupFailed; `drain` ends the boot's chain.

    `wants_to_leave` is set when only a new boot can go on; `read_anchor` looks at the machine's clocks.
    """

    def __init__(self, settings: Settings, started_ns: int, read_anchor: Callable[[], Anchor] = Anchor.now) -> None:
        self.settings = settings
        self.anchor = read_anchor()
        self._read_anchor = read_anchor
        self._started_ns = self.anchor.utc_ns(started_ns)
        identity = Identity(
            worker_uid=settings.worker_uid,
            boot_id=uuid.uuid4().hex,
            service=settings.service,
            model=settings.model_name,
            gpu_class=settings.gpu_class,
            clock=settings.clock,
            devices=settings.ranks,
        )
        self.meter = Meter(identity, uncalibrated(settings.attribution, settings.clock), self._started_ns)
        self.journal = JournalWriter(
            settings.journal_dir, settings.worker_uid, settings.service, settings.journal_max_bytes
        )
        self.profiles = Profiles(settings.journal_dir)
        self.attribution: Adopted | None = None
        self.sessions = Sessions()
        self.keeping = Keeping()
        self.observed = Observations(settings.model_name)
        self.tokenizer: Tokenizer | None = None
        self.loading = Loading()
        self.gpu = GpuWatch(settings.gpu_count, self._metered, self._on_device, on_window=self._on_window)
        self.engines = Supervisor(
            self._on_event,
            self._on_lost,
            has_work=lambda: len(self.sessions) > 0,
            sequences_max=settings.max_batch_size + settings.max_queue_length,
            step_timeout_ms=settings.step_timeout_ms,
            start_timeout_ms=settings.start_timeout_ms,
        )
        self._draining = False
        self._clock_problem = ""
        self._cuda_uuid = ""
        self.wants_to_leave = asyncio.Event()
        self.flusher = Flusher(
            self.meter, self.journal, self._now_ns, settings.checkpoint_interval_ms, before=self._look_at_clock
        )
        self._in_flight = InFlight(
            self.sessions,
            self.meter,
            self.observed,
            utc_ns=self.anchor.utc_ns,
            send=self.engines.send,
            used=self.flusher.want,
        )

    async def run(self, path: Path | None) -> None:
        """Open the journal, fetch the model if `path` is None, keep an engine running. Raises StartupFailed."""
        await self.journal.open(self.meter.identity, self._started_ns)
        if self.journal.problem:
            log.error("the worker serves what its journal still holds, and nothing else")
            await asyncio.Event().wait()
        if self._draining:  # told to leave before there was a journal to seal; `drain` does the rest
            await asyncio.Event().wait()
        await asyncio.to_thread(self.profiles.open)
        self.flusher.start()
        beside = [asyncio.create_task(self.gpu.run())]
        try:
            if path is None:
                self._enter(Phase.LOAD, time.monotonic_ns())
                settings = self.settings
                path = await fetch_aside(
                    diagnosis.location(settings), settings.model_cache, settings.worker_uid, self.loading.tell
                )
                await asyncio.to_thread(diagnosis.refuse_model, settings, path)
            self.loading.of(path)
            beside.append(asyncio.create_task(self._tell_loading()))
            await asyncio.gather(self._read_tokenizer(path), self.engines.run(engine_options(self.settings, path)))
        finally:
            for task in beside:
                task.cancel()
            self.engines.kill()

    @property
    def engine(self) -> Ready | None:
        """What the engine that serves now said of itself."""
        return self.engines.ready

    def readiness(self) -> Readiness:
        """Whether new work is admitted, and why not."""
        return readiness(
            Condition(
                phase=self.meter.accounts.phase,
                draining=self._draining,
                clock_problem=self._clock_problem,
                engine_ready=self.engine is not None and self.tokenizer is not None,
                engine_loss=self.engines.loss,
                journal_open=self.journal.head is not None,
                journal_problem=self.journal.problem or self.journal.damage,
                journal_full=self.journal.full,
                lease=lease(
                    time.monotonic_ns(), self.journal.acknowledged_at_ns, self.settings.lease_timeout_ms * 10**6
                ),
                loading=self.loading.text(time.monotonic()),
            )
        )

    def refuse_unless_ready(self) -> tuple[Ready, Tokenizer]:
        """What a request needs to be read. Raises Refused (503)."""
        state = self.readiness()
        if not state.ready or self.engine is None or self.tokenizer is None:
            raise unavailable(state.reason, state.message, retry_after_s=1 if self._draining else 5)
        return self.engine, self.tokenizer

    def submit(self, caller: Caller, choices: list[Choice]) -> Session:
        """Admit a request whose choices were checked against the model. Raises Refused."""
        engine, _ = self.refuse_unless_ready()
        return self._in_flight.admit(caller, choices, engine.max_batch_size, self.settings.max_queue_length)

    def take_back(self, session: Session, outcome: Status, index: int | None = None) -> None:
        """Stop a session, or one choice of it, before the engine's next step. What has ended stays as it is."""
        self._in_flight.take_back(session, outcome, index)

    def cut_off(self, session: Session, why: Refused) -> None:
        """Stop a session as cancelled, and have its client told why. What it used stays billed."""
        self._in_flight.cut_off(session, why)

    def metrics(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return exposition(self)

    async def drain(self, cut_short: asyncio.Event, told_s: float) -> None:
        """Admit nothing, finish or cut off what runs, seal the chain, wait for the seal's acknowledgement.

        `told_s` is when the worker was told to leave: from there on there is one deadline for all of it.
        """
        self._draining = True
        self.engines.leave()
        drain_timeout_s = self.settings.drain_timeout_ms / 1000
        deadline = leave_by(told_s, drain_timeout_s)
        self._enter(Phase.DRAIN, time.monotonic_ns())
        await self._until(self.journal.opening_over, deadline, _OPEN_S)
        log.info("draining %d sessions", len(self.sessions))
        await self._until(self.sessions.emptied, Deadline(told_s + drain_timeout_s), drain_timeout_s, cut_short)
        for session in self.sessions.all():
            self.take_back(session, Status.CANCELLED)
        await self._until(self.sessions.emptied, deadline, _CUT_OFF_S)
        await self.engines.stop(deadline.left_s(time.monotonic(), _ENGINE_STOP_S))
        if len(self.sessions):
            await self._until(self.engines.lost, deadline, _CUT_OFF_S)
        await self.flusher.end(deadline)
        await self.flusher.seal(deadline, cut_short)
        await self.flusher.acknowledged(deadline, self.settings.seal_grace_ms, cut_short)

    async def _read_tokenizer(self, path: Path) -> None:
        self.tokenizer = await asyncio.to_thread(Tokenizer, path)

    def _on_event(self, event: Event) -> None:
        try:
            self._take(event)
        except Exception:
            if isinstance(event, Ready):  # the supervisor replaces an engine that cannot be taken in
                raise
            log.exception("a message of the engine (%s) was not understood", type(event).__name__)
            for session_id in _named_in(event):
                if (session := self.sessions.get(session_id)) is not None:
                    self._in_flight.give_up(session)

    def _take(self, event: Event) -> None:
        match event:
            case StepReport():
                self._on_step(event)
            case Ended():
                self._in_flight.ended(event)
            case PhaseEntered():
                self._enter(event.phase, event.at_ns)
            case Ready():
                self._on_ready(event)

    def _on_step(self, step: StepReport) -> None:
        self.meter.step(self.anchor.utc_ns(step.started_ns), self.anchor.utc_ns(step.ended_ns), step.gpu_ns, step.parts)
        self.observed.step(step)
        self._in_flight.stepped(step)

    def _on_ready(self, ready: Ready) -> None:
        self._cuda_uuid = ready.gpu_uuid
        sample = self.gpu.sample
        if sample is None or not sample.mig_profile:
            self.meter.identity = replace(self.meter.identity, gpu_uuid=ready.gpu_uuid)
        self.meter.kv_token_bytes = ready.kv_token_bytes
        self._adopt(ready)
        if not self._draining:
            self._enter(Phase.SERVING, ready.at_ns)
        log.info("ready: %s on %s in %s", self.settings.model_name, ready.device_name, ready.dtype)

    def _adopt(self, ready: Ready) -> None:
        """Before any session: whatever records name is on disk first."""
        settings = self.settings
        adopted = adopt(ready.calibration, settings.attribution, settings.clock, settings.model_name)
        self.profiles.use(adopted)
        self.meter.adopt(adopted.profile)
        self.attribution = adopted
        log.log(logging.INFO if adopted.as_asked else logging.WARNING, "%s: %s", adopted.reason, adopted.message)

    def _on_lost(self, loss: Loss) -> None:
        if not self._draining:
            log.error("%s with %d sessions in flight", loss.how, len(self.sessions))
            self.observed.engine_lost(loss.reason)
        try:
            self.meter.lose(self._now_ns())
        except Exception:
            log.exception("what the lost engine was computing cannot be metered")
        self._in_flight.lost(loss)
        self._enter(Phase.DRAIN if self._draining else Phase.INIT, time.monotonic_ns())

    def _on_window(self, window: Window) -> None:
        self.meter.draw(window.attributed_mj, window.platform_mj)

    def _on_device(self, sample: Sample) -> None:
        """NVML shows a GPU, for the first time or another one: records name it from here on."""
        named = gpu_class(self.settings.gpu_class, sample)
        # CUDA says what the engine computes on; only a MIG instance has a name of its own, which NVML alone knows.
        uuid = sample.uuid if sample.mig_profile or not self._cuda_uuid else self._cuda_uuid
        if uuid != sample.uuid:
            log.warning("NVML shows %s and the engine computes on %s; records name that", sample.uuid, uuid)
        self.meter.identity = replace(self.meter.identity, gpu_uuid=uuid, gpu_class=named)

    def _metered(self) -> Metered:
        accounts = self.meter.accounts
        return Metered(
            attributed_ns=accounts.totals_ns[Account.ATTRIBUTED],
            nonbillable_ns=accounts.totals_ns[Account.NONBILLABLE],
            serving=accounts.phase is Phase.SERVING,
            busy=len(self.sessions) > 0,
        )

    def _enter(self, phase: Phase, at_ns: int) -> None:
        if self._draining and phase is not Phase.DRAIN:
            return
        if phase is Phase.LOAD:
            self.loading.begin(at_ns / 1e9)
        self.meter.enter(phase, self.anchor.utc_ns(at_ns))
        self.flusher.want()

    def _now_ns(self) -> int:
        return self.anchor.utc_ns(time.monotonic_ns())

    def _look_at_clock(self) -> None:
        self.profiles.keep()
        if self._draining or self._clock_problem:
            return
        self._clock_problem = self.anchor.problem(self._read_anchor())
        if self._clock_problem:
            log.error("%s", self._clock_problem)
            self.wants_to_leave.set()

    async def _until(
        self, event: asyncio.Event, deadline: Deadline, limit_s: float, cut_short: asyncio.Event | None = None
    ) -> None:
        waits = [asyncio.create_task(one.wait()) for one in (event, cut_short) if one is not None]
        timeout_s = deadline.left_s(time.monotonic(), limit_s)
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _tell_loading(self) -> None:
        while self.engine is None:
            await asyncio.sleep(_LOADING_LOG_S)
            if self.meter.accounts.phase is Phase.LOAD and self.engine is None:
                log.info("%s", self.loading.text(time.monotonic()))


def _named_in(event: Event) -> set[str]:
    """The sessions that a message is about."""
    match event:
        case StepReport():
            return {part.session_id for part in event.parts}
        case Ended():
            return {event.session_id}
    return set()
