"""`gpumeter profile`: the parameters behind a profile_hash, by which steps were split.

Owns the lookup and the exit code. Reads the ledger without changing it, beside a running collector too.
"""

import os
import sys

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.cli.collector_settings import DEFAULT_LEDGER


@click.command()
@click.argument("digest", metavar="HASH")
@click.option("--ledger", help="URL of the ledger; default GPUMETER_LEDGER_URL.")
def profile(*, digest: str, ledger: str | None) -> None:
    """Print the profile of a hash, in the very bytes whose SHA-256 it is.

    Exit code 0 when it is kept, 1 when it is not, 2 when the ledger cannot be read.
    """
    try:
        body = Reader(ledger or os.environ.get("GPUMETER_LEDGER_URL") or DEFAULT_LEDGER).profile(digest)
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(2)
    if body is None:
        click.echo(
            f"The ledger keeps no profile {digest:.64}; while the worker's pod is there, it tells its own "
            "(GET /usage/v1/profile).",
            err=True,
        )
        sys.exit(1)
    click.echo(body, nl=False)
