"""Joins steps, sessions and accounts into flushes: what one transaction of the journal states.

Owns each session's running slice and the rule that slices sum to the change of `attributed`. Does not know how a step
was measured, how records are stored, or what a session asked for. Times are the worker's UTC nanoseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from gpumeter_usage.period import MINUTE_NS
from gpumeter_usage.record import Account, Kind, Record, Status
from gpumeter_worker.metering.accounts import Accounts, Phase, Segment
from gpumeter_worker.metering.attribution import Profile, split
from gpumeter_worker.metering.parts import Onward, Part
from gpumeter_worker.metering.running import Ends, Session, Slice, Stretch, Totals, stretch_after, sum_up


@dataclass(frozen=True, slots=True)
class Identity:
    """What every record of a boot says alike, and on how many devices its time counts; `gpu_uuid` is the first's."""

    worker_uid: str
    boot_id: str
    service: str
    model: str
    gpu_class: str
    clock: str
    gpu_uuid: str = ""
    devices: int = 1


@dataclass(frozen=True, slots=True)
class Flush:
    """What one transaction adds to the journal: records in order (their seq is given by the store) up to a frontier.

    `unmeasured_ns` of the time since the flush before, times devices, are in no record, because nobody measured them.
    """

    records: tuple[Record, ...]
    frontier_ns: int
    unmeasured_ns: int = 0


@dataclass(slots=True)
class _Owned:
    """How much of a step sessions own, kept true row by row."""

    ns: int = 0


class Meter:
    """The state between two flushes. Everything happens in the API process, in the order in which it is reported."""

    def __init__(self, identity: Identity, profile: Profile, started_ns: int) -> None:
        self.identity = identity
        self.profile = profile
        self.kv_token_bytes = 0  # told by the engine when it is ready
        self.accounts = Accounts(started_ns, identity.devices)
        self._sessions: dict[str, Session] = {}
        self._slices: dict[str, Slice] = {}
        self._records: list[Record] = []
        self._step = 0
        self._stretch: Stretch | None = None
        self._unmeasured_stated_ns = 0
        self._drawn_mj: tuple[int, int] | None = None  # by steps and by the platform, and not stated yet
        self._flushed_ns = started_ns

    def adopt(self, profile: Profile) -> None:
        """Split by this from now on. What was split before keeps the name of the former profile."""
        if profile != self.profile:
            self._close(self.accounts.cut())
            self._write_slices()
            self.profile = profile

    def enter(self, phase: Phase, at_ns: int) -> None:
        """The worker's phase changes."""
        self._close(self.accounts.enter(phase, at_ns))

    def begin(self, session_id: str, tenant: str, at_ns: int, sequences: int = 1) -> None:
        """A session of so many sequences is handed to the engine; from here on it is in flight. Waiting costs it
        nothing."""
        if session_id in self._sessions:
            raise ValueError(f"the session {session_id} is in flight already")
        self._close(self.accounts.begin(at_ns))
        self._sessions[session_id] = Session(tenant, at_ns, ends=Ends() if sequences > 1 else None)

    def step(self, started_ns: int, ended_ns: int, gpu_ns: int, parts: Sequence[Part]) -> list[int]:
        """Book a finished step to the sessions that shared it; returns their shares in device-nanoseconds.

        `gpu_ns` is how long it took on each of the worker's devices, which are all held by it as long. Where a step
        makes no sense this raises, and what no session was booked for is the platform's: the accounts cover its time
        either way, for the journal takes no flush that leaves some out.
        """
        booked_ns, closed = self.accounts.step(started_ns, ended_ns, gpu_ns)
        owned = _Owned()
        try:
            self._close(closed)
            if isinstance(parts, Onward) and (stretch := self._stretch_of(parts)):
                shares_ns = stretch.split(booked_ns)
                self._step += 1
                stretch.take(started_ns, ended_ns, self.accounts.frontier_ns, shares_ns)
                owned.ns = booked_ns
            else:
                self._book_stretch()
                shares_ns = split(booked_ns, [(part[1], part[2]) for part in parts], self.profile)
                self._step += 1
                self._book_rows(started_ns, ended_ns, parts, shares_ns, owned)
        finally:
            self.accounts.own(owned.ns, booked_ns - owned.ns)
        return shares_ns

    def _book_rows(
        self, started_ns: int, ended_ns: int, parts: Sequence[Part], shares_ns: Sequence[int], owned: "_Owned"
    ) -> None:
        # This runs for every sequence of a step, so it calls as little as it can.
        lasted_ns = max(0, ended_ns - started_ns)
        number, batch, frontier_ns = self._step, len(parts), self.accounts.frontier_ns
        sessions, slices = self._sessions, self._slices
        left: list[tuple[Ends, int]] = []  # put behind all that this step takes
        for part, share_ns in zip(parts, shares_ns, strict=True):
            session_id, new_tokens, context_tokens, prefill, sampled, prompt_tokens, cached_tokens, recompute = part
            if (session := sessions.get(session_id)) is None:  # no tenant asked for it: the platform pays
                continue
            held = session.held
            if held.step != number:
                held.gap_ns = max(0, started_ns - held.until_ns) if held.until_ns else 0
                held.step, held.until_ns = number, ended_ns
            if (ends := session.ends) is not None:  # a step may leave out some of its sequences
                until_ns = ends.take(context_tokens)
                held.gap_ns = max(0, started_ns - until_ns) if until_ns else 0
                left.append((ends, context_tokens + new_tokens))
            if recompute:  # nor for this
                continue
            # What it held since its step before, and then with the new tokens: the peak of this step, as long as it
            # ran. Each sequence counts as if its cache were its own, whoever else finds a prefix in the same blocks.
            held.byte_ns += (
                context_tokens * held.gap_ns + (context_tokens + new_tokens) * lasted_ns
            ) * self.kv_token_bytes
            running = slices.get(session_id) or self._slice(session_id, session, frontier_ns)
            running.ended_ns = frontier_ns
            running.gpu_ns += share_ns
            owned.ns += share_ns  # at once: whatever fails from here on, slices sum to what is booked
            if prefill:
                running.prefill_ns += share_ns
            running.prompt_tokens += prompt_tokens
            running.cached_tokens += cached_tokens
            running.completion_tokens += sampled
            running.batch_ns += share_ns * batch
            if session.billed_step != number:  # its choices may share a step, which is one step of the session
                session.billed_step = number
                running.steps += 1
        for ends, tokens in left:
            ends.put(tokens, ended_ns)

    def _stretch_of(self, onward: Onward) -> Stretch | None:
        if self._stretch is None or not self._stretch.continues(onward):
            self._book_stretch()
            self._stretch = stretch_after(onward, self._sessions, self._slices, self._step, self.profile)
        return self._stretch

    def _book_stretch(self) -> None:
        """Before anything looks at a slice or changes it."""
        stretch, self._stretch = self._stretch, None
        if stretch is not None:
            stretch.book(self._step, self.kv_token_bytes)

    def end(self, session_id: str, status: Status, at_ns: int) -> Totals:
        """A session left the engine. Its last slice carries how it ended, with no time at all if it never ran."""
        self._book_stretch()
        session = self._sessions.pop(session_id)
        running = self._slices.get(session_id)
        if running is not None:
            running.status = status
            sum_up(session.totals, running)
        self._close(self.accounts.end(at_ns))
        if running is None:
            # Its time is journaled already, or there was none: a slice that only states the end, at the end, and so
            # behind the accounts of all minutes before.
            at_ns = max(at_ns, self.accounts.frontier_ns)
            running = self._slice(session_id, session, at_ns)
            running.started_ns = max(running.started_ns, (at_ns - 1) // MINUTE_NS * MINUTE_NS)
            running.status = status
        return session.totals

    def lose(self, at_ns: int) -> None:
        """The engine is lost and with it the step that it was in. Comes before the ends of the sessions in flight."""
        self._close(self.accounts.lose(at_ns))

    def draw(self, attributed_mj: int, platform_mj: int) -> None:
        """A window of energy closed (see metering.energy); the next flush states what steps and the platform drew."""
        by_steps_mj, by_platform_mj = self._drawn_mj or (0, 0)
        self._drawn_mj = by_steps_mj + attributed_mj, by_platform_mj + platform_mj

    def cut(self, at_ns: int) -> Flush | None:
        """Everything up to the frontier that no flush has stated yet, or None if there is nothing."""
        self._close(self.accounts.catch_up(at_ns))
        self._close(self.accounts.cut())
        self._write_slices()  # ends of sessions that used nothing since the last flush
        self._state_energy()
        if not self._records and self._unmeasured_stated_ns == self.accounts.unmeasured_ns:
            return None
        self._flushed_ns = self.accounts.frontier_ns
        records, self._records = tuple(self._records), []
        return Flush(records, self.accounts.frontier_ns, self._unmeasured())

    def nothing(self) -> Flush:
        """A flush that states nothing, to carry a seal."""
        return Flush((), self.accounts.frontier_ns, self._unmeasured())

    def seal(self, status: Status) -> Record:
        """The end of this boot's chain, at the frontier. Nothing may be booked after it."""
        return seal(self.identity, self.accounts.frontier_ns, status)

    def _state_energy(self) -> None:
        """In records of their own, without time, at the frontier. While that stands where a flush has left it they
        wait: a period may be closed up to there."""
        if self._drawn_mj is None or self.accounts.frontier_ns <= self._flushed_ns:
            return
        (attributed_mj, platform_mj), self._drawn_mj = self._drawn_mj, None
        at_ns = self.accounts.frontier_ns
        stated = [(Account.ATTRIBUTED, attributed_mj)] if attributed_mj else []
        self._records += [
            Record(
                kind=Kind.ACCOUNT,
                account=account,
                started_at=at_ns,
                ended_at=at_ns,
                gpu_ns=0,
                energy_mj=energy_mj,
                **_common(self.identity),
            )
            for account, energy_mj in (*stated, (Account.IDLE, platform_mj))
        ]

    def _unmeasured(self) -> int:
        stated_ns, self._unmeasured_stated_ns = self._unmeasured_stated_ns, self.accounts.unmeasured_ns
        return self._unmeasured_stated_ns - stated_ns

    def _slice(self, session_id: str, session: Session, ended_ns: int) -> Slice:
        minute_start_ns = (ended_ns - 1) // MINUTE_NS * MINUTE_NS  # what ends on an edge lies in the minute before
        started_ns = min(max(session.since_ns, minute_start_ns), ended_ns)
        running = Slice(session_id, session.tenant, started_ns, ended_ns, session.held)
        self._slices[session_id] = running
        return running

    def _close(self, closed: list[Segment]) -> None:
        """The slices so far belong to the first segment that closes; what follows it starts afresh.

        But for ends without time of their own: they may lie beyond the frontier, and stand where they happened.
        """
        for segment in closed:
            self._write_slices(segment.ended_ns)
            self._records += [
                Record(
                    kind=Kind.ACCOUNT,
                    account=account,
                    started_at=segment.started_ns,
                    ended_at=segment.ended_ns,
                    gpu_ns=duration_ns,
                    profile_hash=self.profile.hash if account is Account.ATTRIBUTED else "",
                    **_common(self.identity),
                )
                for account, duration_ns in segment.sums_ns.items()
            ]

    def _write_slices(self, until_ns: int | None = None) -> None:
        self._book_stretch()
        later: dict[str, Slice] = {}
        for name, running in self._slices.items():
            if until_ns is not None and running.ended_ns > until_ns:
                later[name] = running
                continue
            self._records.append(self._record(running))
            if session := self._sessions.get(running.session_id):
                session.since_ns = running.ended_ns
                sum_up(session.totals, running)
        self._slices = later

    def _record(self, running: Slice) -> Record:
        kv_byte_s, running.held.byte_ns = divmod(running.held.byte_ns, 10**9)
        return Record(
            kind=Kind.SESSION,
            account=Account.ATTRIBUTED,
            session_id=running.session_id,
            tenant=running.tenant,
            started_at=running.started_ns,
            ended_at=running.ended_ns,
            gpu_ns=running.gpu_ns,
            prefill_ns=running.prefill_ns,
            decode_ns=running.gpu_ns - running.prefill_ns,
            prompt_tokens=running.prompt_tokens,
            cached_tokens=running.cached_tokens,
            completion_tokens=running.completion_tokens,
            steps=running.steps,
            batch_ns=running.batch_ns,
            kv_byte_s=kv_byte_s,
            profile_hash=self.profile.hash,
            status=running.status,
            **_common(self.identity),
        )


def seal(identity: Identity, at_ns: int, status: Status) -> Record:
    """The record that ends a boot's chain."""
    return Record(
        kind=Kind.SEAL, account="", started_at=at_ns, ended_at=at_ns, gpu_ns=0, status=status, **_common(identity)
    )


class _Common(TypedDict):
    worker_uid: str
    boot_id: str
    seq: int
    service: str
    model: str
    gpu_uuid: str
    gpu_class: str
    clock: str


def _common(identity: Identity) -> _Common:
    return _Common(
        worker_uid=identity.worker_uid,
        boot_id=identity.boot_id,
        seq=0,  # given by the store
        service=identity.service,
        model=identity.model,
        gpu_uuid=identity.gpu_uuid,
        gpu_class=identity.gpu_class,
        clock=identity.clock,
    )
