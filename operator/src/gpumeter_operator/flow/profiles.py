"""Keeps the parameters behind every `profile_hash`: a worker's volume goes with its pod, its records stay.

Owns when a worker is asked for its profiles, and what of its answer is believed: only a profile whose canonical bytes
have the hash under which it is kept. Asks beside the pulls and waits for nothing in them: a worker without profiles is
collected as any other, and asked again later. Does not know what the parameters mean.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, WorkerRefuses, WorkerSilent
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.flow.collect import Execute
from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.period import SECOND_NS

log = logging.getLogger(__name__)

ASK_AGAIN_NS = 60 * SECOND_NS
ANSWER_TIMEOUT_S = 5.0  # a few hundred bytes from memory
MAX_QUESTIONS = 4  # at the same time: connections are shared with the pulls, which must not wait for these
MAX_NAMED = 64  # hashes of one worker that are looked for; a broken worker may name ever new ones
MAX_PROFILE_BYTES = 4096  # a profile is some two hundred


class ProfilesPort(Protocol):
    """What the keeper needs of workers. Raises WorkerSilent, WorkerRefuses."""

    async def profiles(self, target: Target) -> bytes:
        """The answer of GET /usage/v1/profile, as it came."""
        ...


class ProfileKeeper:
    """Asks each worker once, and again while its records name a profile that the ledger does not have."""

    def __init__(self, ledger: Ledger, workers: ProfilesPort, execute: Execute, clock_ns: Callable[[], int]) -> None:
        self._ledger = ledger
        self._workers = workers
        self._execute = execute
        self._clock_ns = clock_ns
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)
        self._known: set[str] = set()
        self._named: dict[str, set[str]] = {}  # by worker, hashes that its records named and nobody has explained
        self._answered: set[str] = set()
        self._ask_at_ns: dict[str, int] = {}
        self._told: dict[str, str] = {}  # by worker, what was logged last: trouble that lasts is told once
        self._questions: dict[str, asyncio.Task[None]] = {}

    def heard(self, worker: Worker, target: Target, hashes: Iterable[str] = ()) -> None:
        """A worker answered, and its records named these profiles. Returns at once."""
        uid = worker.worker_uid
        unknown = self._named.setdefault(uid, set())
        unknown -= self._known
        unknown |= set(sorted(set(hashes) - self._known)[: max(0, MAX_NAMED - len(unknown))])
        if uid in self._questions or (uid in self._answered and not unknown):
            return
        if self._clock_ns() >= self._ask_at_ns.get(uid, 0):
            question = asyncio.create_task(self._ask(worker, target))
            self._questions[uid] = question
            question.add_done_callback(lambda _: self._questions.pop(uid, None))

    def forget(self, worker_uid: str) -> None:
        """A worker is gone; nothing can be asked of it."""
        self._answered.discard(worker_uid)
        for of_workers in (self._named, self._ask_at_ns, self._told):
            of_workers.pop(worker_uid, None)

    async def finish(self) -> None:
        """Wait until no question is under way."""
        while self._questions:
            await asyncio.wait(list(self._questions.values()))

    async def _ask(self, worker: Worker, target: Target) -> None:
        uid = worker.worker_uid
        try:
            async with self._slots:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await self._workers.profiles(target)
            found, refused = believed(answer)
            named = self._named.get(uid, set())
            first = sorted(found.items(), key=lambda one: one[0] not in named)  # the bound must not cost what is needed
            self._known |= await self._execute(partial(self._ledger.keep_profiles, uid, first, self._clock_ns()))
            missing = named - self._known
            trouble = "; ".join(refused)
            if missing:
                names = ", ".join(f"{each:.12}" for each in sorted(missing))
                trouble = f"{trouble or 'it did not tell them'}; its records name {names}"
        except TimeoutError:
            trouble = "it did not tell its profiles in time"
        except (WorkerSilent, WorkerRefuses, LedgerUnavailable) as problem:
            trouble = str(problem)
        except Exception:
            log.exception("The profiles of pod %s/%s could not be kept.", worker.namespace, worker.pod)
            trouble = "it failed unexpectedly"
        else:
            self._answered.add(uid)
        if uid not in self._named:  # it went meanwhile
            self._answered.discard(uid)
            return
        self._ask_at_ns[uid] = self._clock_ns() + ASK_AGAIN_NS if trouble else 0
        if trouble and self._told.get(uid) != trouble:
            log.warning("Not every profile of pod %s/%s is kept: %s", worker.namespace, worker.pod, trouble)
        self._told[uid] = trouble


def believed(answer: bytes) -> tuple[dict[str, bytes], list[str]]:
    """The canonical bytes of each profile by its hash, and a sentence for each that is not what its hash says.

    Canonical is JSON with sorted keys and without spaces, as the worker hashes it.
    """
    try:
        document = json.loads(answer)
        entries = document["profiles"]
        if not isinstance(entries, list):
            raise TypeError("no list")
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, ["its answer is no list of profiles"]
    found, refused = {}, 0
    for entry in entries:
        body = _canonical(entry)
        if body is None or len(body) > MAX_PROFILE_BYTES or sha256(body).hexdigest() != entry.get("hash"):
            refused += 1
        else:
            found[sha256(body).hexdigest()] = body
    return found, [f"{refused} of {len(entries)} profiles are not what their hashes say"] if refused else []


def _canonical(entry: Any) -> bytes | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("profile"), Mapping):
        return None
    return canonical_json(entry["profile"])
