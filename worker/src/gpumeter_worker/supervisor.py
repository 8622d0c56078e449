"""Keeps one engine process serving: starts it, hands on what it says, watches it, and starts the next when it is lost.

Owns the engine's life between the worker's start and its end: when the next one starts, when one is taken for hung,
and the reason that readiness tells meanwhile. Does not know sessions, accounts or HTTP; an engine's events arrive in
order, and its loss after them.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpumeter_worker import failure as failures
from gpumeter_worker.engine.link import PROGRAM, EngineLink
from gpumeter_worker.engine.messages import (
    Command,
    EngineOptions,
    Event,
    Failed,
    Fatal,
    PhaseEntered,
    Ready,
    StepReport,
)
from gpumeter_worker.engine.watch import StartWatch, StepWatch
from gpumeter_worker.machine import done_pages
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.readiness import HUNG, RESTARTING, Loss

log = logging.getLogger(__name__)

_BACK_OFF_S = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""By how many engines in a row were lost before they finished a step. One that did finish some gave its service, and
its successor is wanted at once: loading takes long enough to keep a loop of crashes slow."""

_DOING = {
    Phase.INIT: "it started",
    Phase.LOAD: "it loaded the model, so look at the model's volume and the device",
    Phase.WARMUP: "it warmed up, so look at the device",
}

_STARTS_MAX = 3
"""Starts in a row that failed in one way (killed by the kernel, hung, or with the same cause) before the worker ends
and says so."""

_LOOK_S_MAX = 1.0
_STACKS_S = 0.3
_KILLED_S = 1.0
_GONE_S = 60.0
"""A killed process that holds a GPU may need seconds for its memory. After a minute the driver hangs."""


class Supervisor:
    """The state of one worker's engines, one after the other. `ready` is None while none serves."""

    def __init__(
        self,
        on_event: Callable[[Event], None],
        on_lost: Callable[[Loss], None],
        *,
        has_work: Callable[[], bool],
        sequences_max: int,
        step_timeout_ms: int = 0,
        start_timeout_ms: int = 0,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """Both callbacks run in the event loop. `has_work`: an engine that is well has something to say, sooner or
        later. `sequences_max` is what admission lets through; a `step_timeout_ms` of 0 is one that follows the steps, a
        `start_timeout_ms` of 0 waits for ever for an engine that loads and does nothing.
        """
        self.ready: Ready | None = None
        self.loss: Loss | None = None
        self.load_ns = 0
        self.lost = asyncio.Event()
        self._on_event = on_event
        self._on_lost = on_lost
        self._has_work = has_work
        self._sequences_max = sequences_max
        self._step_timeout_ns = step_timeout_ms * 10**6
        self._start_timeout_ns = start_timeout_ms * 10**6
        self._program = program
        self._link: EngineLink | None = None
        self._watch = StepWatch(0, 1, 0)
        self._cause: Loss | None = None
        self._rank_killed_by = 0
        self._started_ns = 0
        self._warm_up_ns = 0
        self._phase = Phase.INIT
        self._stepped = False
        self._young = 0
        self._killed_starts = 0
        self._hung_starts = 0
        self._failed_starts = 0
        self._failed_cause = ""
        self._leaving = False
        self._failed: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()

    @property
    def step_timeout_ns(self) -> int:
        """How long the engine may be silent while it has work."""
        return self._watch.timeout_ns

    @property
    def pid(self) -> int:
        """The latest engine's process id; 0 before the first."""
        return self._link.pid if self._link else 0

    @property
    def unhandled(self) -> int:
        """Messages of the engine that wait for the event loop."""
        return self._link.unhandled if self._link else 0

    @property
    def unsent(self) -> int:
        """Commands that wait for the engine."""
        return self._link.unsent if self._link else 0

    async def run(self, options: EngineOptions) -> None:
        """Keep an engine running until `leave`. Raises StartupFailed when none can serve here."""
        try:
            while not self._leaving:
                await self._serve(options)
                await asyncio.sleep(_BACK_OFF_S[min(self._young, len(_BACK_OFF_S) - 1)])
            await asyncio.Event().wait()
        finally:
            self.kill()

    def send(self, command: Command) -> None:
        """Tell the engine, if there is one."""
        if self._link is not None:
            self._link.send(command)

    def leave(self) -> None:
        """The worker is on its way out: an engine that is lost from now on is not replaced."""
        self._leaving = True

    async def stop(self, timeout_s: float) -> None:
        """End the engine after its step; one that does not serve yet, or does not end in time, is killed."""
        self.leave()
        if self._link is not None:
            self._link.kill() if self.ready is None else await self._link.stop(timeout_s)

    def kill(self) -> None:
        """End the engine at once."""
        self.leave()
        if self._link is not None:
            self._link.kill()

    async def _serve(self, options: EngineOptions) -> None:
        """One engine, from its start until nothing of it is left."""
        self.lost.clear()
        self._cause, self._stepped, self._phase, self._started_ns = None, False, Phase.INIT, time.monotonic_ns()
        self._rank_killed_by = 0
        self._watch = StepWatch(self._step_timeout_ns, options.max_batch_tokens, options.max_wait_ms * 10**6)
        try:
            link = EngineLink(options, self._sequences_max, self._handle, self._lose, self._program)
        except OSError as error:
            self._give_up_start(error)
            return
        self._link = link
        log.info("the engine process %d starts", link.pid)
        watching = asyncio.create_task(self._end_if_hung(link, options))
        lost = asyncio.create_task(self.lost.wait())
        try:
            await asyncio.wait((lost, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            async with asyncio.timeout(_GONE_S):  # wait_for of Python 3.11 loses a cancellation that comes as it ends
                await link.gone()
        except TimeoutError:
            raise failures.StartupFailed(
                failures.ENGINE_STUCK,
                _stuck(link),
            ) from None
        finally:
            lost.cancel()
            watching.cancel()

    def _give_up_start(self, error: OSError) -> None:
        """No process, file or thread is to be had now; whoever has them may give some back."""
        self._young += 1
        loss = Loss(RESTARTING, f"the engine process cannot be started ({failures.first_line(error)})")
        log.error("%s", loss.how)
        if not self._leaving:
            self.loss = loss
        self.lost.set()

    async def _end_if_hung(self, link: EngineLink, options: EngineOptions) -> None:
        """On a CPU processor time is progress, because nothing here spins while it waits for a device.

        On a GPU planned steps are neither read nor written, so the time that they may take comes on top.
        """
        computing = options.device == "cpu"
        start_timeout_ns = self._start_timeout_ns and self._start_timeout_ns + options.calibration_ms * 10**6
        start, looks_s = StartWatch(start_timeout_ns), _LOOK_S_MAX
        if start_timeout_ns:
            looks_s = min(looks_s, start_timeout_ns / 8e9)
        while True:
            await asyncio.sleep(min(looks_s, self._watch.timeout_ns / 8e9))
            now_ns, serves = time.monotonic_ns(), self.ready is not None
            if self._watch.look(now_ns, link.received, owes=serves and link.unhandled == 0 and self._has_work()):
                silent = f"no word for {self._watch.timeout_ns / 1e9:.0f} s with work at hand"
                break
            if not serves and start.look(now_ns, done_pages(link.pid, computing=computing)):
                still_s = start_timeout_ns // 10**9
                silent = f"nothing read and nothing done for {still_s} s while {_DOING[self._phase]}"
                break
        log.error("the engine process %d hangs: %s; where its threads are follows, if it can tell", link.pid, silent)
        self._cause = Loss(HUNG, f"the engine process hung ({silent}) and was killed")
        link.tell_stacks()
        await asyncio.sleep(_STACKS_S)
        link.kill()
        await asyncio.sleep(_KILLED_S)
        self._lose(link, "was killed")  # unless it is gone: no client waits for what the kernel cannot end

    def _handle(self, link: EngineLink, events: Sequence[Event]) -> None:
        if link is not self._link or self.lost.is_set():
            return
        for event in events:
            self._note(event)
            try:
                self._on_event(event)
            except Exception as surprise:  # the next event may be the end of somebody else's session
                log.exception("a message of the engine (%s) could not be handled", type(event).__name__)
                if isinstance(event, Ready):  # nothing would ever be sent to it
                    what = type(surprise).__name__
                    self._cause = Loss(RESTARTING, f"the worker could not take the engine in ({what}; see its log)")
                    self.ready, self.loss = None, self._cause
                    link.kill()

    def _note(self, event: Event) -> None:
        match event:
            case StepReport():
                self._stepped = True
                self._watch.step(event.ended_ns - event.started_ns, event.new_tokens)
            case PhaseEntered():
                self._phase = event.phase
                self._warm_up_ns = event.at_ns
            case Ready():
                self.load_ns = event.at_ns - self._started_ns
                calibrating_ns = event.calibration.took_ns if event.calibration else 0
                self._watch.warmed_up(event.at_ns - self._warm_up_ns - calibrating_ns)
                self.ready, self.loss = event, None
                self._killed_starts, self._hung_starts, self._failed_starts = 0, 0, 0
            case Failed() if self._cause is None:  # what follows from a cause is none
                self._rank_killed_by = event.killed_by
                if event.killed_by != signal.SIGKILL:
                    self._note_failed_start(event.cause)
                self._cause = Loss(RESTARTING, f"the engine process ended itself ({event.cause})")
            case Fatal():
                self._fail(event.reason, event.message)

    def _note_failed_start(self, cause: str) -> None:
        """What fails in the same way before every readiness is in the model or the machine, and stays there."""
        if self.ready is not None:
            return
        self._failed_starts = self._failed_starts + 1 if cause == self._failed_cause else 1
        self._failed_cause = cause
        if self._failed_starts >= _STARTS_MAX:
            self._fail(
                failures.ENGINE_START_FAILED,
                f"the engine failed {_STARTS_MAX} times in a row before it was ready ({cause}); the worker's log has "
                "the traceback; serve another model, or report it with the model's name",
            )

    def _lose(self, link: EngineLink, how: str) -> None:
        if link is not self._link or self.lost.is_set():
            return
        loss = self._cause or Loss(RESTARTING, f"the engine process {how}")
        self._young = 0 if self._stepped else self._young + 1
        if self.ready is None:
            killed_by = link.killed_by if self._cause is None else self._rank_killed_by  # not by ourselves
            self._killed_starts += killed_by == signal.SIGKILL
            self._hung_starts += loss.reason == HUNG
        if not self._leaving:
            self.loss = loss
        self.ready = None
        self.lost.set()
        try:
            self._on_lost(loss)
        except Exception:  # the next engine is wanted all the same
            log.exception("the loss of the engine could not be handled")
        if self._killed_starts >= _STARTS_MAX:
            self._fail(
                failures.OUT_OF_MEMORY,
                "the engine was killed three times while it loaded the model, most likely for memory; raise "
                "resources.memory or use a smaller model",
            )
        elif self._hung_starts >= _STARTS_MAX:
            self._fail(failures.ENGINE_HUNG, f"three starts of the engine in a row hung; the last time {loss.how}")

    def _fail(self, reason: str, message: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(failures.StartupFailed(reason, message))


def _stuck(link: EngineLink) -> str:
    ranks = [str(pid) for pid in link.left if pid != link.pid]
    whose = f" (of what it started, these are left: {', '.join(ranks)})" if ranks else ""
    return (
        f"the engine process {link.pid} was killed {_GONE_S:.0f} s ago and does not end{whose}, so the driver of its "
        "device hangs; drain the node and reset its GPU or reboot it"
    )
