"""`gpumeter profile`: the parameters behind a profile_hash, by which steps were split.

Owns the lookup and the exit code. Reads the ledger without changing it, beside a running collector too.
"""

import sys

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.cli.ledger import LEDGER, open_reader


@click.command()
@click.argument("digest", metavar="HASH")
@LEDGER
def profile(*, digest: str, ledger: str | None) -> None:
    """Print the profile of a hash, in the very bytes whose SHA-256 it is.

    Exit code 0 when it is kept, 1 when it is not, 2 when the ledger cannot be read.
    """
    try:
        body = open_reader(ledger).profile(digest)
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
