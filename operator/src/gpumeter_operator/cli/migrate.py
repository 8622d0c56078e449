"""`gpumeter migrate`: makes or updates the ledger's tables as their owner, and grants roles what they need.

Owns the command. Where the collector owns its tables (SQLite, or a PostgreSQL role of its own) it migrates by itself,
and nobody needs this.
"""

import sys

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.grants import migrate as migrate_ledger
from gpumeter_operator.cli.ledger import LEDGER, ledger_url


@click.command()
@LEDGER
@click.option("--grant-collector", "collectors", multiple=True, help="A role of PostgreSQL that may collect.")
@click.option("--grant-reader", "readers", multiple=True, help="A role of PostgreSQL that may read.")
def migrate(*, ledger: str | None, collectors: tuple[str, ...], readers: tuple[str, ...]) -> None:
    """Bring a ledger's tables up to date as their owner; roles that are named are granted what they need, no more."""
    try:
        migrate_ledger(ledger_url(ledger), collectors, readers)
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
    click.echo("The ledger's tables are up to date.")
