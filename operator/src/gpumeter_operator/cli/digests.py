"""`gpumeter digests`: what is to be anchored outside, and the keys to check it with.

Owns the two commands and their output: lines of canonical JSON, and PEM. Reads the ledger without changing it:

    kubectl exec deploy/gpumeter-collector -- gpumeter digests export --after 1200 >> digests.jsonl
"""

import sys
from typing import NoReturn

import click

from gpumeter_operator.adapters.ledger import digests as kept
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.billing.digest import export_line
from gpumeter_operator.billing.signing import public_pem
from gpumeter_operator.cli.ledger import LEDGER, open_reader


@click.group()
def digests() -> None:
    """Export signed digests, and the keys that signed them."""


@digests.command()
@click.option("--after", type=click.IntRange(0), default=0, help="Only digests after this number.")
@LEDGER
def export(*, after: int, ledger: str | None) -> None:
    """Print every digest as a line of canonical JSON: body, digest, signature."""
    try:
        for each in kept.kept(open_reader(ledger).engine, after):
            click.echo(export_line(each.digest))
    except LedgerUnavailable as problem:
        _end(problem)


@digests.command()
@LEDGER
def keys(*, ledger: str | None) -> None:
    """Print the public keys that have signed, each below its key id, in PEM."""
    try:
        found = kept.kept_keys(open_reader(ledger).engine)
    except LedgerUnavailable as problem:
        _end(problem)
    for key_id, der in found.items():
        click.echo(f"# {key_id}\n{public_pem(der)}", nl=False)


def _end(problem: LedgerUnavailable) -> NoReturn:
    click.echo(str(problem), err=True)
    sys.exit(2)
