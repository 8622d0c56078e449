"""The sessions in flight: what becomes of each, from its admission to the moment when its usage is final.

Owns admission among them, the way of tokens to who waits, and every end that a session can have. Does not know whether
the worker is ready (worker), what a step costs (metering) or how an answer is written (api.answer).
"""

import logging
import time
from collections.abc import Callable

from gpumeter_usage.record import Status
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.identity import Caller
from gpumeter_worker.api.sessions import LINE_ENTRIES_MAX, Choice, End, Finished, Session, Sessions
from gpumeter_worker.engine.messages import Cancel, Ended, StepReport, Submit
from gpumeter_worker.engine.sequence import Finish
from gpumeter_worker.metering.meter import Meter
from gpumeter_worker.metering.parts import Onward
from gpumeter_worker.metering.running import Totals
from gpumeter_worker.metrics import Observations
from gpumeter_worker.readiness import Loss

log = logging.getLogger(__name__)

_STATUS = {
    Finish.STOP: Status.FINISHED,
    Finish.LENGTH: Status.FINISHED,
    Finish.CANCELLED: Status.CANCELLED,
    Finish.FAILED: Status.FAILED,
}

_TOO_SLOW = Refused(
    408,
    "client_too_slow",
    f"the client is {LINE_ENTRIES_MAX} tokens and log probabilities behind and was cut off; read faster, or ask for "
    "less",
)


class InFlight:
    """What happens to sessions, every one of which ends once.

    `utc_ns` is the UTC of a monotonic time, `send` reaches the engine that serves now, and `used` tells that usage is
    to be written.
    """

    def __init__(
        self,
        sessions: Sessions,
        meter: Meter,
        observed: Observations,
        *,
        utc_ns: Callable[[int], int],
        send: Callable[[Submit | Cancel], object],
        used: Callable[[], None],
    ) -> None:
        self._sessions = sessions
        self._meter = meter
        self._observed = observed
        self._utc_ns = utc_ns
        self._send = send
        self._used = used

    def admit(self, caller: Caller, choices: list[Choice], batch_max: int, queue_max: int) -> Session:
        """Begin a session among at most so many sequences that are computed and that wait. Raises Refused."""
        if self._sessions.sequences + len(choices) > batch_max + queue_max:
            raise Refused(
                429,
                "queue_full",
                f"{self._sessions.sequences} answers are being given or wait already, and {len(choices)} more are "
                f"asked for (at most {batch_max} and {queue_max}); try again",
                headers={"Retry-After": "1"},
            )
        if self._sessions.known(caller.session_id):
            raise Refused(
                409, "session_used", "this session was served already; every request needs a session of its own"
            )
        session = Session(caller.session_id, caller.tenant, choices)
        self._meter.begin(session.session_id, session.tenant, self._utc_ns(session.begun_ns), len(choices))
        self._sessions.add(session)
        for index, choice in enumerate(choices):
            self._send(
                Submit(session.session_id, choice.prompt, choice.sampling, index, caller.tenant, choice.counts_prompt)
            )
        return session

    def take_back(self, session: Session, outcome: Status, index: int | None = None) -> None:
        """Stop a session, or one choice of it, before the engine's next step. What has ended stays as it is."""
        taken = [
            choice
            for number, choice in enumerate(session.choices)
            if index in (None, number) and choice.finish is None and choice.outcome is None
        ]
        for choice in taken:
            choice.outcome = outcome
        if taken:
            self._send(Cancel(session.session_id, index))

    def cut_off(self, session: Session, why: Refused) -> None:
        """Stop a session as cancelled, and have its client told why. What it used stays billed."""
        if session.end is None and session.cut_off is None:
            log.warning("session %s is cut off: %s", session.session_id, why.message)
            session.cut_off = why
            self.take_back(session, Status.CANCELLED)

    def stepped(self, step: StepReport) -> None:
        """Who was in a step has begun, and gets its tokens. A client that does not read is cut off."""
        now_ns = time.monotonic_ns()
        for part in () if isinstance(step.parts, Onward) else step.parts:
            if (session := self._sessions.get(part.session_id)) is not None:
                session.stepped = True
        for token in step.tokens:
            if (session := self._sessions.get(token.session_id)) is not None:
                choice = session.choices[token.choice]
                self._observed.token(session.begun_ns, choice.last_token_ns, now_ns)
                choice.last_token_ns = now_ns
                if session.cut_off is not None:  # nothing may follow what it missed
                    continue
                if session.line.entries < LINE_ENTRIES_MAX:
                    session.line.put_nowait(token)
                else:
                    self.cut_off(session, _TOO_SLOW)

    def ended(self, ended: Ended) -> None:
        """The engine has ended a choice."""
        session = self._sessions.get(ended.session_id)
        if session is not None:
            self._finish(session, session.choices[ended.choice], ended.finish, ended.message)

    def _finish(self, session: Session, choice: Choice, finish: Finish, message: str) -> None:
        # What the API process took back is what it says; that the engine then saw a cancel is only how it was done.
        # An answer that had come to its stop string is whole, even where the engine was lost before it said so.
        kept = finish is Finish.CANCELLED or choice.outcome is Status.FINISHED
        choice.outcome = choice.outcome if choice.outcome and kept else _STATUS[finish]
        choice.finish, choice.message = finish, message
        session.line.put_nowait(Finished(session.choices.index(choice), finish))
        outcomes = [one.outcome for one in session.choices if one.finish is not None]
        if len(outcomes) < len(session.choices):
            return
        status = next((one for one in (Status.FAILED, Status.CANCELLED) if one in outcomes), Status.FINISHED)
        totals = self._meter.end(session.session_id, status, self._now_ns())
        why = next((one.message for one in session.choices if one.message), "")
        self._sessions.finish(session, End(status, totals, why, session.cut_off))
        self._observed.session(status)
        self._used()

    def give_up(self, session: Session) -> None:
        """End a session of which this process no longer knows how it stands; what was metered of it stays metered."""
        self._send(Cancel(session.session_id))
        for index, choice in enumerate(session.choices):
            if choice.finish is None:
                choice.finish, choice.outcome = Finish.FAILED, Status.FAILED
                session.line.put_nowait(Finished(index, Finish.FAILED))
        try:
            totals = self._meter.end(session.session_id, Status.FAILED, self._now_ns())
        except Exception:
            log.exception("the end of session %s cannot be metered", session.session_id)
            totals = Totals()
        self._sessions.finish(session, End(Status.FAILED, totals, "the worker failed while it served this request"))
        self._observed.session(Status.FAILED)
        self._used()

    def lost(self, loss: Loss) -> None:
        """End all of them with their engine."""
        for session in self._sessions.all():
            self._end_lost(session, loss)

    def _end_lost(self, session: Session, loss: Loss) -> None:
        """However it stands: one that stayed behind would be work that the next engine never does."""
        try:
            for choice in session.choices:
                if choice.finish is None:
                    self._finish(session, choice, Finish.FAILED, f"{loss.how} while it served this request")
        except Exception:
            log.exception("session %s cannot be ended as one that was lost with its engine", session.session_id)
        if self._sessions.get(session.session_id) is session:
            self.give_up(session)

    def _now_ns(self) -> int:
        return self._utc_ns(time.monotonic_ns())
