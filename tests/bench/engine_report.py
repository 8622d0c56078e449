"""Tables and figures of the engine's bench, from the raw answers.

Owns what is shown and which goals there are. Knows nothing of how the answers came about.
"""

import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Seconds = list[float]

GROWTH_MIB = 8.0
"""How much more memory 9,000 further requests may leave behind: less than a kilobyte each, which a leak exceeds."""


@dataclass
class Results:
    """What was measured. Keys: (prompt tokens, sequences, engine); streams by (engine, whether prompts arrived)."""

    machine: dict[str, Any]
    new: int
    every_s: float
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    rates: dict[tuple[int, int, str], list[float]] = field(default_factory=dict)
    latencies: dict[tuple[int, int, str], tuple[Seconds, Seconds]] = field(default_factory=dict)
    streams: dict[tuple[str, bool], tuple[int, Seconds]] = field(default_factory=dict)
    resident_bytes: dict[str, dict[int, int]] = field(default_factory=dict)

    def best(self, tokens: int, count: int, name: str) -> float | None:
        """The best round's tokens a second."""
        return max(self.rates.get((tokens, count, name), []), default=None)

    def raw(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "machine": self.machine,
            "engines": self.about,
            "lost": self.lost,
            "new_tokens": self.new,
            "tokens_per_s": [
                {"prompt_tokens": tokens, "sequences": count, "engine": name, "rounds": rates}
                for (tokens, count, name), rates in self.rates.items()
            ],
            "latency": [
                {"prompt_tokens": tokens, "sequences": count, "engine": name, "first_s": first, "gaps_s": gaps}
                for (tokens, count, name), (first, gaps) in self.latencies.items()
            ],
            "streams": [
                {"engine": name, "prompts_arrive": arrive, "arrived": arrived, "gaps_s": gaps}
                for (name, arrive), (arrived, gaps) in self.streams.items()
            ],
            "prompt_every_s": self.every_s,
            "resident_bytes": self.resident_bytes,
        }


def machine(threads: int, preload: Iterable[str]) -> dict[str, Any]:
    """Where this runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "preload": list(preload),
        "python": platform.python_version(),
    }


def tables(results: Results) -> str:
    """Markdown that a README can quote."""
    parts = [_heading(results), _rates(results), _latencies(results), _streams(results), _memory(results)]
    return "\n\n".join(part for part in ["", *parts] if part is not None)


def figures(results: Results) -> list[str]:
    """One line a figure: NAME value unit goal met|short."""
    lines = []
    points = sorted({(tokens, count) for tokens, count, _ in results.rates})
    for mode in ("eager", "compiled"):
        for tokens, count in points:
            ours, peer = (results.best(tokens, count, f"{who}-{mode}") for who in ("ours", "vllm"))
            if ours and peer:
                lines.append(_line(f"engine-{mode}-{count}x{tokens}-vs-vllm", ours / peer, "x", 1.0, at_least=True))
    for tokens in sorted({tokens for tokens, _ in points}):
        alone = [
            rate
            for (t, _, name), rates in results.rates.items()
            if (t, name) == (tokens, "one-at-a-time")
            for rate in rates
        ]
        for count in sorted(count for t, count in points if t == tokens and count >= 8):
            ours = results.best(tokens, count, "ours-eager")
            if ours and alone:
                name = f"engine-eager-{count}x{tokens}-vs-one-at-a-time"
                lines.append(_line(name, ours / max(alone), "x", 5.0, at_least=True))
    for name, ratio in _stream_ratios(results).items():
        if name.startswith("ours"):
            lines.append(_line(f"engine-{name[5:]}-gap-p99-under-prompts", ratio, "x", 2.0, at_least=False))
    for name, resident in results.resident_bytes.items():
        growth = (resident[max(resident)] - resident[min(resident)]) / 2**20
        lines.append(_line(f"engine-{name[5:]}-memory-growth", growth, "MiB", GROWTH_MIB, at_least=False))
    return lines


def _line(name: str, value: float, unit: str, goal: float, *, at_least: bool) -> str:
    met = round(value, 2) >= goal if at_least else round(value, 2) <= goal
    return f"{name} {value:.2f} {unit} {'>=' if at_least else '<='}{goal:g} {'met' if met else 'short'}"


def _heading(results: Results) -> str:
    where = results.machine
    versions = {}
    for name, about in results.about.items():
        text = ", ".join(f"{what} {version}" for what, version in about.items() if what != "remarks")
        versions.setdefault(text, []).append(name)
    lines = [
        f"{where['processor']}, {where['threads']} of {where['cores']} cores, Python {where['python']}, bf16, greedy, "
        f"{results.new} new tokens"
        + (f", preloaded: {', '.join(Path(one).name for one in where['preload'])}" if where["preload"] else ""),
        *(f"- {', '.join(names)}: {text}" for text, names in versions.items()),
        *(f"- {name} was not measured: {why}" for name, why in results.lost.items()),
        *(f"- {name}: {about['remarks']}" for name, about in results.about.items() if about.get("remarks")),
    ]
    return "\n".join(lines)


def _rates(results: Results) -> str | None:
    if not results.rates:
        return None
    points = sorted({(tokens, count) for tokens, count, _ in results.rates})
    rows = []
    for name in _engines(results, (key[2] for key in results.rates)):
        cells = []
        for tokens, count in points:
            rates = results.rates.get((tokens, count, name))
            cells.append(f"{max(rates):.0f} ({statistics.median(rates):.0f})" if rates else "-")
        rows.append([name, *cells])
    head = ["tok/s: best round (median)", *(f"{count} x {tokens}" for tokens, count in points)]
    return _table(head, rows)


def _latencies(results: Results) -> str | None:
    if not results.latencies:
        return None
    points = sorted({(tokens, count) for tokens, count, _ in results.latencies})
    rows = []
    for name in _engines(results, (key[2] for key in results.latencies)):
        cells = []
        for tokens, count in points:
            found = results.latencies.get((tokens, count, name))
            cells += [_ms(found[0]), _ms(found[1])] if found else ["-", "-"]
        rows.append([name, *cells])
    head = ["ms: p50 / p99"]
    for tokens, count in points:
        head += [f"first token, {count} x {tokens}", f"gap, {count} x {tokens}"]
    return _table(head, rows)


def _streams(results: Results) -> str | None:
    if not results.streams:
        return None
    rows = []
    for name, ratio in _stream_ratios(results).items():
        (_, calm), (arrived, busy) = results.streams[name, False], results.streams[name, True]
        rows.append([name, _ms(calm), _ms(busy), str(arrived), f"{ratio:.2f}"])
    head = [
        "gap of 8 streams, ms: p50 / p99",
        "undisturbed",
        f"a 512-token prompt each {results.every_s:g} s",
        "prompts",
        "p99 ratio",
    ]
    return _table(head, rows)


def _stream_ratios(results: Results) -> dict[str, float]:
    both = [name for name, arrive in results.streams if arrive and (name, False) in results.streams]
    return {
        name: percentile(results.streams[name, True][1], 99) / percentile(results.streams[name, False][1], 99)
        for name in both
    }


def _memory(results: Results) -> str | None:
    if not results.resident_bytes:
        return None
    rows = []
    for name, resident in results.resident_bytes.items():
        rows.append([name, *(f"{size / 2**20:.1f}" for _, size in sorted(resident.items()))])
    counts = sorted(next(iter(results.resident_bytes.values())))
    return _table(["resident MiB after requests", *(f"{count:,}" for count in counts)], rows)


def percentile(values: Seconds, percent: int) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))]


def _ms(values: Seconds) -> str:
    return f"{percentile(values, 50) * 1e3:.0f} / {percentile(values, 99) * 1e3:.0f}"


def _engines(results: Results, names: Iterable[str]) -> list[str]:
    there = set(names)
    return [name for name in results.about if name in there]


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 2) if at == 0 else "-" * (width + 1) + ":" for at, width in enumerate(widths))
        + "|"
    )
    return "\n".join([line(head), rule, *map(line, rows)])
