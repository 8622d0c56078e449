"""Minutes of real load on a real worker: mixed lengths, clients that leave, engines that are killed, all collected.

Owns the clients, the kills, and the sums at the end: what the container was given, what each account and each session
got, and what nobody measured. `allocated` is from the fork of the process to its end, as a kubelet would see it.
"""

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gpumeter_usage.record import Kind, Status
from rigs.worker import Ledger, WorkerProcess, hop_token, session_id, until, worker

TENANTS = ("acme", "beta-corp", "gamma")


@dataclass
class Sums:
    """What a real run came to."""

    problems: list[str] = field(default_factory=list)
    sessions: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    accounts_ns: dict[str, int] = field(default_factory=dict)
    slices_ns: int = 0
    allocated_ns: int = 0
    unmeasured_ns: int = 0
    records: int = 0

    @property
    def residual_ns(self) -> int:
        """What was allocated and is in no account."""
        return self.allocated_ns - sum(self.accounts_ns.values())


def load(folder: Path, model: Path, minutes: float, *, seed: int, kill_every_s: float, clients: int = 6) -> Sums:
    """Run a worker under load for so long, drain it, and add up what was collected."""
    sums, ledger, told = Sums(), Ledger(), dict[str, int]()
    environment = {"GPUMETER_MODEL_URI": f"file://{model}", "GPUMETER_MAX_QUEUE_LENGTH": "64"}
    forked_ns = time.time_ns()
    with worker(folder, environment) as process:
        process.ready()
        end_s = time.monotonic() + minutes * 60
        threads = [
            threading.Thread(target=_client, args=(process, random.Random(f"{seed}:{number}"), end_s, told))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        _kill_and_collect(process, ledger, random.Random(seed), sums, end_s=end_s, kill_every_s=kill_every_s)
        for thread in threads:
            thread.join(120)
        sums.unmeasured_ns = round(process.metrics()["gpumeter_unmeasured_seconds_total"] * 1e9)
        process.send(signal.SIGTERM)
        until(lambda: (process.collect(ledger), ledger.all()[-1].kind is Kind.SEAL)[1], "it is sealed", 120)
        code = process.process.wait(60)
        sums.allocated_ns = time.time_ns() - forked_ns
    if code != 0:
        sums.problems.append(f"the worker ended with {code}")
    _add_up(sums, ledger, forked_ns + sums.allocated_ns, told)
    return sums


def _kill_and_collect(
    process: WorkerProcess, ledger: Ledger, dice: random.Random, sums: Sums, *, end_s: float, kill_every_s: float
) -> None:
    kill_at_s = time.monotonic() + kill_every_s * dice.uniform(0.5, 1.0)
    while (now_s := time.monotonic()) < end_s:
        process.collect(ledger)
        if now_s >= kill_at_s and process.reason() == "Ready":
            for engine in process.children():
                os.kill(engine, signal.SIGKILL)
                sums.kills += 1
            kill_at_s = now_s + kill_every_s * dice.uniform(0.5, 1.5)
        time.sleep(1)


def _client(process: WorkerProcess, dice: random.Random, end_s: float, told: dict[str, int]) -> None:
    """One request after the other; a third leaves in the middle. What an answer says it used goes to `told`."""
    while time.monotonic() < end_s:
        session, leaves_after = session_id(), dice.choice((0, 0, dice.randrange(1, 20)))
        body = {
            "model": "smollm2",
            "prompt": [dice.randrange(5, 400) for _ in range(dice.choice((2, 40, 300)))],
            "max_tokens": dice.choice((1, 8, 40, 120)),
            "temperature": 1.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {
            "Authorization": f"Bearer {hop_token(dice.choice(TENANTS), session)}",
            "Content-Type": "application/json",
        }
        connection = http.client.HTTPConnection("127.0.0.1", process.http, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:  # the engine is being started again
                time.sleep(0.5)
                continue
            for number, line in enumerate(answer):
                if line.startswith(b"data: {"):
                    usage = json.loads(line[6:], parse_float=str).get("usage") or {}
                    if "gpu_seconds" in usage:
                        whole, _, part = usage["gpu_seconds"].partition(".")
                        told[session] = int(whole) * 10**9 + int(part.ljust(9, "0")[:9])
                if leaves_after and number > 2 * leaves_after:
                    break
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()


def _add_up(sums: Sums, ledger: Ledger, ended_ns: int, told: dict[str, int]) -> None:
    records = ledger.all()
    sums.records = len(records)
    accounts = Counter[str]()
    for record in records:
        if record.kind is Kind.ACCOUNT:
            accounts[record.account] += record.gpu_ns
    # As the ledger has it: a worker that sealed in order promised to run nothing until its container's end.
    accounts["drain"] += max(0, ended_ns - records[-1].ended_at)
    sums.accounts_ns = dict(accounts)
    slices = [record for record in records if record.kind is Kind.SESSION]
    sums.slices_ns = sum(record.gpu_ns for record in slices)
    sums.sessions = Counter(str(record.status) for record in slices if record.status is not Status.OPEN)
    if sums.slices_ns != accounts["attributed"]:
        sums.problems.append(f"slices sum to {sums.slices_ns} ns, attributed are {accounts['attributed']} ns")
    spent_ns = sum(record.gpu_ns for record in records if record.kind is Kind.ACCOUNT)
    lived_ns = records[-1].ended_at - records[0].started_at
    if spent_ns + sums.unmeasured_ns != lived_ns:
        sums.problems.append(
            f"the accounts hold {spent_ns} ns, {sums.unmeasured_ns} ns were not measured, the boot lived {lived_ns} ns"
        )
    billed = Counter[str]()
    for record in slices:
        billed[record.session_id] += record.gpu_ns
    wrong = [session for session, gpu_ns in told.items() if billed[session] != gpu_ns]
    if wrong:
        sums.problems.append(f"{len(wrong)} of {len(told)} sessions are billed for what their answer did not say")
    if not told:
        sums.problems.append("no answer said what it used")
