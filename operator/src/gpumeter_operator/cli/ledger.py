"""The option `--ledger`, for every command that opens a ledger: which one, where none is named.

Owns the rule. Opens nothing but readers; a command that writes says so itself.
"""

import os

import click

from gpumeter_operator.adapters.ledger.engine import refuse_other_schema
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.cli.collector_settings import DEFAULT_LEDGER, LEDGER_URL

LEDGER = click.option("--ledger", help=f"URL of the ledger; default {LEDGER_URL}.")


def ledger_url(given: str | None) -> str:
    """What the option says, or the environment, or where the collector's image keeps it."""
    return given or os.environ.get(LEDGER_URL) or DEFAULT_LEDGER


def open_reader(given: str | None) -> Reader:
    """That ledger, for reading only, in one state from the command's first query to its end, which closes it. Raises
    LedgerUnavailable, also where its tables are not those of this version."""
    reader = Reader(ledger_url(given), one_state=True)
    click.get_current_context().call_on_close(reader.close)
    refuse_other_schema(reader.engine)
    return reader
