"""`gpumeter journal`: take the journals of pods that are gone into the ledger.

Owns arguments and what is printed. Run where the ledger can be written and the volume is mounted.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from gpumeter_operator.adapters.journals import journals_in
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.cli.ledger import LEDGER, ledger_url
from gpumeter_operator.flow.leftover import Leftover, take_journal

T = TypeVar("T")


@click.command()
@LEDGER
@click.option(
    "--over-gaps",
    is_flag=True,
    help="Where records before those of a journal were acknowledged and are not in the ledger, give them up as "
    "unaccounted and go on after them. Take older copies of the same journal first: they may hold them.",
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def journal(*, ledger: str | None, over_gaps: bool, paths: tuple[Path, ...]) -> None:
    """Take the journals at PATHS (files, or folders that are searched) into the ledger; they are only read."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            click.echo(f"Looking for journals below {path}.", err=True)
        files += journals_in(path)
    if not files:
        click.echo("There is no journal.sqlite at or below these paths.", err=True)
        sys.exit(1)
    try:
        found = asyncio.run(_take(ledger_url(ledger), files, over_gaps=over_gaps))
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
    for one in found:
        click.echo(f"{one.reason}: {one.message}" if one.reason else one.message, err=bool(one.reason))
    sys.exit(any(one.reason for one in found))


async def _take(url: str, files: list[Path], *, over_gaps: bool) -> list[Leftover]:
    ledger = Ledger(url, migrate=False)
    try:
        return [await take_journal(file, ledger, _at_once, time.time_ns, over_gaps=over_gaps) for file in files]
    finally:
        ledger.close()


async def _at_once(call: Callable[[], T]) -> T:
    return call()
