"""One run of bench-kill: a worker and a collector that are killed as a seed says, until the ledger has everything.

Owns the plan of a run, the life of its processes, and what must be true afterwards: nothing lost that was committed,
nothing doubled, chains unbroken, and what was lost before a commit within its bound and booked as `unaccounted`.
`rigs.killable` owns what the two processes do.
"""

import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.accounts import audit
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.chain import GENESIS, ChainBroken, Link, verify
from gpumeter_usage.period import MINUTE_NS, SECOND_NS
from gpumeter_usage.record import ENDED, Kind, Record, Status, parse
from gpumeter_worker.settings import Settings, from_environment
from rigs.killable import (
    CHECKPOINT_NS,
    COLLECTOR_POINTS,
    WORKER_POINTS,
    CollectorRun,
    Kill,
    Shared,
    WorkerRun,
    fork,
    preload,
    run_collector,
    run_worker,
)
from rigs.ledger import START_NS, TOKEN, ended, gone, open_ledger, started, worker

OF = worker()
LOSS_NS_MAX = CHECKPOINT_NS + SECOND_NS
"""A checkpoint interval, and the longest that the made-up engine does at once: crash and load anew, below a second."""

POINT_WORK_MAX = 25
"""Flushes, or pulls. A point that was not passed often enough by then: the process is killed where it stands."""

RUN_S_MAX = 180.0
"""A run takes half a second, and more where others use the machine; after this it will not end."""

LOOK_S = 0.002
LAST_FLUSHES = 5
"""What the last life of the worker does before it drains."""

NEVER_S = 10**6
EARLY = "start"
"""Killed from outside so long after its fork, and not after its first flush or pull: it opens its files, or not yet."""


@dataclass(frozen=True)
class Plan:
    """Who is killed how, in the order of their lives; after these both live to the end. With each kill stands after
    how many seconds it comes from outside, where the process has not killed itself."""

    worker: tuple[tuple[Kill, float], ...]
    collector: tuple[tuple[Kill, float], ...]


@dataclass
class Boot:
    """One life of the worker, as whoever started it saw it. Times are the worker's own."""

    boot_id: str
    started_ns: int
    ended_ns: int = 0
    drained: bool = False


@dataclass
class Outcome:
    """What a run showed."""

    seed: int
    problems: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    losses_ns: list[int] = field(default_factory=list)
    records: int = 0
    lost_ns: int = 0
    unaccounted_ns: int = 0
    took_s: float = 0.0


class Runs:
    """What all runs share: an empty ledger to start from, and the worker's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.empty = folder / "empty.db"
        open_ledger(self.empty).close()
        preload()
        for name, secret in (("usage-token", TOKEN), ("hop-key", "x" * 32)):
            (folder / name).write_text(secret)
        self.settings: Settings = from_environment(
            {
                "GPUMETER_SERVICE": OF.service_key,
                "GPUMETER_SERVICE_UID": OF.service_uid,
                "GPUMETER_WORKER_UID": OF.worker_uid,
                "GPUMETER_MODEL_URI": "file:///none",
                "GPUMETER_CREDENTIALS_DIR": str(folder),
            }
        )

    def run(self, seed: int) -> Outcome:
        """One run; nothing of it is left."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return _Run(self, seed, Path(folder)).outcome()


def plan(seed: int) -> Plan:
    """Kills of a seed: one to three of the worker, none to two of the collector; half of them from outside."""
    dice = random.Random(seed)

    def kill(points: tuple[str, ...]) -> tuple[Kill, float]:
        if dice.random() < 0.4:
            return Kill(), dice.uniform(0, 0.08)
        if dice.random() < 0.15:
            return Kill(EARLY), dice.uniform(0.001, 0.06)
        return Kill(dice.choice(points), dice.randrange(1, 20)), NEVER_S

    return Plan(
        tuple(kill(WORKER_POINTS) for _ in range(dice.randrange(1, 4))),
        tuple(kill(COLLECTOR_POINTS) for _ in range(dice.randrange(3))),
    )


class _Process:
    """A child, and when it is to die if it does not by itself."""

    def __init__(self, pid: int, kill: Kill | None, after_s: float) -> None:
        self.pid = pid
        self.kill = kill
        self.after_s = after_s
        self.dies_at_s = time.monotonic() + after_s if kill is not None and kill.point == EARLY else None
        self.how = ""

    def gone(self, done: int) -> bool:
        """Whether it has ended, after having done so much; kills it when its time has come.

        Raises AssertionError where it failed by itself.
        """
        if self.dies_at_s is None and self.kill is not None and done:
            self.dies_at_s = time.monotonic() + self.after_s
        if self.kill is not None and done >= POINT_WORK_MAX:
            self.dies_at_s = 0
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if self.dies_at_s is not None and time.monotonic() >= self.dies_at_s:
                self.how = "outside, early" if self.kill == Kill(EARLY) else "outside"
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return True
            return False
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"a process ended by itself with status {status}"
        self.how = self.kill.point if killed and self.kill is not None else ""
        return True

    def end(self) -> None:
        """At once, unless it has ended already."""
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class _Run:
    def __init__(self, runs: Runs, seed: int, folder: Path) -> None:
        self.runs, self.seed, self.folder = runs, seed, folder
        self.dice = random.Random(f"times of {seed}")
        self.shared = Shared()
        self.boots: list[Boot] = []
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.ledger = folder / "ledger.db"
        self.told = Outcome(seed)

    def outcome(self) -> Outcome:
        began_s = time.monotonic()
        (self.folder / "journal").mkdir()
        shutil.copy(self.runs.empty, self.ledger)
        self.shared.now_ns = START_NS + self.dice.randrange(MINUTE_NS)
        with self.listening:
            self._live(plan(self.seed))
        self._check()
        self.told.took_s = time.monotonic() - began_s
        return self.told

    def _live(self, plan_: Plan) -> None:
        worker_kills, collector_kills = list(plan_.worker), list(plan_.collector)
        deadline_s = time.monotonic() + RUN_S_MAX
        first_ns = self.shared.now_ns
        ledger = Ledger(f"sqlite:///{self.ledger}")
        ledger.observe(OF, [started("c1", first_ns)], first_ns)
        ledger.close()
        serving, collecting = self._start_worker(worker_kills, first=True), self._start_collector(collector_kills)
        try:
            while True:
                assert time.monotonic() < deadline_s, "the run does not come to its end"
                if serving.gone(self.shared.flushes):
                    self._bury(serving, "worker")
                    serving = self._start_worker(worker_kills)
                if collecting.gone(self.shared.pulls):
                    if not collecting.how:
                        break  # it has everything
                    self._bury(collecting, "collector")
                    collecting = self._start_collector(collector_kills)
                done = serving.kill is None and collecting.kill is None
                if done and self.shared.flushes >= LAST_FLUSHES:
                    self.shared.leaving = 1
                time.sleep(LOOK_S)
        except AssertionError:
            collecting.end()
            raise
        finally:
            serving.end()
            self.boots[-1].ended_ns = self.shared.now_ns + self.dice.randrange(SECOND_NS)
            self.boots[-1].drained = True

    def _bury(self, process: _Process, who: str) -> None:
        self.told.kills[f"{who}: {process.how}"] += 1
        if who == "worker":
            self.boots[-1].ended_ns = self.shared.now_ns

    def _start_worker(self, kills: list[tuple[Kill, float]], *, first: bool = False) -> _Process:
        kill, after_s = kills.pop(0) if kills else (None, 0.0)
        if not first:
            self.shared.now_ns += self.dice.randrange(1, 5 * SECOND_NS)
        boot = Boot(f"boot-{len(self.boots) + 1}", self.shared.now_ns)
        self.shared.floor_ns = boot.started_ns
        self.shared.flushes = 0
        self.boots.append(boot)
        pid = fork(
            run_worker,
            WorkerRun(
                self.folder,
                OF,
                self.runs.settings,
                boot.boot_id,
                boot.started_ns,
                self.seed * 1000 + len(self.boots),
                kill or Kill(),
                self.listening,
                self.shared,
            ),
        )
        return _Process(pid, kill, after_s)

    def _start_collector(self, kills: list[tuple[Kill, float]]) -> _Process:
        kill, after_s = kills.pop(0) if kills else (None, 0.0)
        port = self.listening.getsockname()[1]
        self.shared.pulls = 0
        run = CollectorRun(self.ledger, OF, port, kill or Kill(), START_NS + 3600 * SECOND_NS, self.shared)
        return _Process(fork(run_collector, run), kill, after_s)

    # ---- what must be true -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        ledger = open_ledger(self.ledger)
        try:
            diary = [json.loads(line) for line in (self.folder / "diary").read_text().splitlines()]
            self._bill(ledger)
            rows = list(ledger.bodies(OF.worker_uid))
            self.told.records = len(rows)
            self._check_rows(rows, diary)
            boots: dict[str, list[Record]] = defaultdict(list)
            for boot_id, _, _, body, _ in rows:
                boots[boot_id].append(parse(body))
            for boot in self.boots:
                self._check_boot(boot, boots[boot.boot_id], [one for one in diary if one.get("cut") == boot.boot_id])
            self._check_sessions([record for records in boots.values() for record in records])
            self._check_accounts(ledger)
            self.told.problems += audit(ledger, (OF.namespace, OF.service))
            self.told.problems += [f"an alarm: {alarm}" for alarm in ledger.alarms()]
        finally:
            ledger.close()

    def _bill(self, ledger: Ledger) -> None:
        events = []
        for number, boot in enumerate(self.boots, start=1):
            events += [started(f"c{number}", boot.started_ns), ended(f"c{number}", boot.ended_ns)]
        end_ns = self.boots[-1].ended_ns
        ledger.observe(OF, [*events, gone(end_ns)], end_ns)
        Closer(ledger, MINUTE_NS).close_all(Pricing({}, {}), end_ns + 3 * MINUTE_NS)

    def _check_rows(self, rows: list[tuple[str, int, str, bytes, int]], diary: list[dict[str, Any]]) -> None:
        problem = self.told.problems.append
        held = {(boot, seq): digest for boot, seq, digest, _, _ in rows}
        if len(held) != len(rows):
            problem("a record is in the ledger twice")
        chains: dict[str, list[Link]] = defaultdict(list)
        for boot, seq, digest, body, _ in rows:
            chains[boot].append(Link(digest, body))
            if seq != len(chains[boot]):
                problem(f"{boot}: seq {seq} stands at place {len(chains[boot])}")
        for boot, links in chains.items():
            try:
                verify(GENESIS, links)
            except ChainBroken as error:
                problem(f"{boot}: {error}")
        for one in diary:
            if "trimmed" in one and (one["trimmed"], one["seq"]) not in held:
                problem(f"lost after its acknowledgement: {one}")
            if "committed" in one and held.get((one["committed"], one["seq"])) != one["hash"]:
                problem(f"lost after its commit: {one}")

    def _check_boot(self, boot: Boot, records: list[Record], cuts: list[dict[str, Any]]) -> None:
        problem = self.told.problems.append
        floor_ns, used_ns, unmeasured_ns = boot.started_ns, 0, 0
        if records:
            seal, wanted = records[-1], Status.DRAINED if boot.drained else Status.RECOVERED
            if (seal.kind, seal.status) != (Kind.SEAL, wanted):
                problem(f"{boot.boot_id} ends with {seal.kind} {seal.status} and not with a seal that is {wanted}")
            floor_ns = seal.ended_at
            at_floor = [cut for cut in cuts if cut["frontier"] == floor_ns]
            if at_floor:
                used_ns, unmeasured_ns = at_floor[-1]["sessions"], at_floor[-1]["unmeasured"]
            elif floor_ns != boot.started_ns:
                problem(f"{boot.boot_id} is sealed at {floor_ns}, where no flush ended")
        slices_ns = sum(record.gpu_ns for record in records if record.kind is Kind.SESSION)
        if slices_ns != used_ns:
            problem(f"{boot.boot_id}: its steps gave sessions {used_ns} ns up to its seal, the ledger has {slices_ns}")
        accounts_ns = sum(record.gpu_ns for record in records if record.kind is Kind.ACCOUNT)
        if accounts_ns + unmeasured_ns != floor_ns - boot.started_ns:
            problem(f"{boot.boot_id}: its accounts do not cover its life up to the seal")
        lost_ns = 0 if boot.drained else boot.ended_ns - floor_ns
        if not 0 <= lost_ns <= LOSS_NS_MAX:
            problem(f"{boot.boot_id} lost {lost_ns} ns; {LOSS_NS_MAX} are the bound")
        self.told.losses_ns += [] if boot.drained else [lost_ns]
        self.told.lost_ns += lost_ns + unmeasured_ns

    def _check_sessions(self, records: list[Record]) -> None:
        ends = Counter(record.session_id for record in records if record.status in ENDED)
        self.told.problems += [f"{name} ended {count} times" for name, count in ends.items() if count > 1]

    def _check_accounts(self, ledger: Ledger) -> None:
        frozen = [accounts for _, accounts in ledger.pod_accounts(OF.worker_uid)]
        self.told.unaccounted_ns = sum(accounts.unaccounted for accounts in frozen)
        allocated_ns = sum(accounts.allocated for accounts in frozen)
        lived_ns = sum(boot.ended_ns - boot.started_ns for boot in self.boots)
        if allocated_ns != lived_ns:
            self.told.problems.append(f"{allocated_ns} ns are allocated, the containers lived {lived_ns}")
        if self.told.unaccounted_ns != self.told.lost_ns:
            self.told.problems.append(
                f"{self.told.unaccounted_ns} ns are unaccounted, and {self.told.lost_ns} were lost"
            )


def run_all(seeds: range, folder: Path, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Every run of these seeds; `tell` hears of each. A run that does not end is told as a problem."""
    runs, outcomes = Runs(folder), []
    for seed in seeds:
        try:
            outcome = runs.run(seed)
        except AssertionError as error:
            outcome = Outcome(seed, [f"{error}"])
        tell(outcome)
        outcomes.append(outcome)
    return outcomes
