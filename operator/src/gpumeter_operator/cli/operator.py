"""`gpumeter operator`: runs the operator from its environment.

Owns how an unreachable cluster is told at the start. Decides nothing.
"""

import sys

import click

from gpumeter_operator.adapters.kubernetes import Unreachable
from gpumeter_operator.cli.start import settings_or_exit
from gpumeter_operator.main import run
from gpumeter_operator.settings import read_settings


@click.command()
def operator() -> None:
    """Run the operator until SIGTERM. Everything is set by GPUMETER_* variables."""
    settings = settings_or_exit(read_settings)
    try:
        run(settings)
    except Unreachable as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
