"""The side of the pipe on which an engine lives: reads one question a line, does the work, answers with times.

Owns the questions and the clock readings, so that every engine is measured by the same lines of code. Standard library
alone: a peer's virtual environment has nothing of ours.
"""

import ctypes
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What every engine is started with. `mode`: which of a program's ways to run."""

    model: str
    mode: str
    threads: int
    sequences: int = 64
    model_len: int = 2048
    step_tokens: int = 2048


class Engine(Protocol):
    """Runs prompts together to the end."""

    def about(self) -> dict[str, str]:
        """Versions, and remarks on what is not as it was asked for."""

    def batch(self, prompts: list[list[int]], new: int, stream: bool) -> list[list[float]]:
        """Give every prompt `new` tokens, and say when they came (time.perf_counter), one list a prompt.

        Without `stream` they may all be said to have come at the end.
        """


class Stepping:
    """An engine that takes requests at any time and moves all of them on together."""

    def about(self) -> dict[str, str]:
        """See Engine."""
        raise NotImplementedError

    def submit(self, name: str, prompt: list[int], new: int, *, stream: bool) -> None:
        """Take a request: greedy, and not ended by the model."""
        raise NotImplementedError

    def step(self) -> list[tuple[str, int]]:
        """Move on: which requests got how many tokens."""
        raise NotImplementedError

    def batch(self, prompts: list[list[int]], new: int, stream: bool) -> list[list[float]]:
        """See Engine."""
        times: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts):
            times[str(number)] = []
            self.submit(str(number), prompt, new, stream=stream)
        left = new * len(prompts)
        while left > 0:
            given = self.step()
            now = time.perf_counter()
            for name, count in given:
                times[name] += [now] * count
                left -= count
        return list(times.values())


def serve(make: Callable[[Setup], Engine]) -> None:
    """Load, say so, and answer until the pipe closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would wake it up again
    answers = os.fdopen(int(sys.argv[2]), "w")  # not stdout: libraries print
    os.set_inheritable(answers.fileno(), False)  # its end must be seen, whatever processes a library leaves behind
    engine = make(Setup(**json.loads(sys.argv[1])))
    _say(answers, engine.about())
    for line in sys.stdin:
        question = json.loads(line)
        _say(answers, QUESTIONS[question.pop("ask")](engine, **question))


def throughput(engine: Engine, prompts: list[list[int]], new: int, stream: bool) -> dict[str, Any]:
    """All prompts at once: seconds in all; with `stream` each one's first token and the gaps between the others."""
    began = time.perf_counter()
    times = engine.batch(prompts, new, stream)
    seconds = max(one[-1] for one in times) - began
    if any(len(one) != new for one in times):
        raise AssertionError(f"asked for {new} tokens each and got {sorted({len(one) for one in times})}")
    answer: dict[str, Any] = {"seconds": seconds}
    if stream:
        answer["first_s"] = [one[0] - began for one in times]
        answer["gaps_s"] = [gap for one in times for gap in _gaps(one)]
    return answer


def streams(
    engine: Stepping, prompts: list[list[int]], new: int, arrivals: list[list[int]], every_s: float
) -> dict[str, Any]:
    """The gaps of `prompts`' streams while every `every_s` another one of `arrivals` comes, for 8 tokens each."""
    times: dict[str, list[float]] = {str(number): [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        engine.submit(str(number), prompt, new, stream=True)
    waiting = iter(enumerate(arrivals))
    running = len(prompts)
    arrived = left_of_others = 0
    due = time.perf_counter() + every_s
    left = new * running
    while left > 0 or left_of_others > 0:
        if left > 0 and time.perf_counter() >= due and (arrival := next(waiting, None)):
            engine.submit(f"arrival {arrival[0]}", arrival[1], 8, stream=True)
            arrived, left_of_others, due = arrived + 1, left_of_others + 8, due + every_s
        given = engine.step()
        now = time.perf_counter()
        for name, count in given:
            if name in times:
                times[name] += [now] * count
                left -= count
            else:
                left_of_others -= count
    return {"arrived": arrived, "gaps_s": [gap for one in times.values() for gap in _gaps(one)]}


def many(engine: Stepping, requests: int, at_once: int, look_at: list[int]) -> dict[str, Any]:
    """Short requests, always `at_once` of them: resident memory when so many were done as `look_at` says."""
    source = random.Random(7)
    made = done = 0
    left: dict[str, int] = {}
    resident: dict[int, int] = {}
    began = time.perf_counter()
    while done < requests:
        while made < requests and len(left) < at_once:
            prompt = [source.randrange(1000, 40000) for _ in range(source.randint(1, 12))]
            left[str(made)] = source.randint(1, 4)
            engine.submit(str(made), prompt, left[str(made)], stream=True)
            made += 1
        for name, count in engine.step():
            left[name] -= count
            if left[name] == 0:
                del left[name]
                done += 1
                if done in look_at:
                    resident[done] = _resident_bytes()
    return {"resident_bytes": resident, "seconds": time.perf_counter() - began}


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {"throughput": throughput, "streams": streams, "many": many}


def _gaps(times: list[float]) -> Iterator[float]:
    return (later - earlier for earlier, later in itertools.pairwise(times))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _say(answers: Any, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
