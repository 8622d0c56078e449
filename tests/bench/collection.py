"""How fast the ledger takes records, on SQLite and on PostgreSQL, and whether that lasts.

    python -m bench.collection [--rows 10000000] [--on sqlite,postgresql] [--parts rate]

Owns the parts, the lines at the end and where the raw numbers are kept. What is measured how is in the parts:
`bench.collection_rate` feeds the product's own `Ledger.take`. A part is a function of what was asked; another one is a
line in PARTS.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

RAW = Path(__file__).parents[2] / "build/bench/collection.json"
PARTS = {"rate": "bench.collection_rate:measure"}


@dataclass(frozen=True)
class Figure:
    """One line at the end: a name, a value with its unit, and whether the goal is met (None where there is none)."""

    name: str
    value: float
    unit: str
    goal: str
    met: bool


@dataclass(frozen=True)
class Measured:
    """What a part found: its lines, and the raw numbers beside them."""

    figures: list[Figure]
    raw: dict[str, object] = field(default_factory=dict)


Part = Callable[[argparse.Namespace], Measured]


def main() -> int:
    """Run the parts; the exit code is 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them, with commas (%(default)s)")
    parser.add_argument("--on", default="sqlite,postgresql", help="which databases (%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="records in each database at the end (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where the databases are made; 12 GB for ten million rows")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the raw numbers are kept (%(default)s)")
    asked = parser.parse_args()
    figures: list[Figure] = []
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    kept: dict[str, object] = {"machine": machine, "asked": " ".join(sys.argv[1:])}
    for name in asked.parts.split(","):
        module, _, attribute = PARTS[name].partition(":")
        part: Part = getattr(import_module(module), attribute)
        measured = part(asked)
        figures += measured.figures
        kept[name] = measured.raw
    kept["figures"] = [asdict(figure) for figure in figures]
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    asked.raw.write_text(json.dumps(kept, indent=1))
    print(f"\nraw numbers: {asked.raw}")
    for figure in figures:
        print(
            f"collection {figure.name} {figure.value:g} {figure.unit} {figure.goal}: {'met' if figure.met else 'short'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
