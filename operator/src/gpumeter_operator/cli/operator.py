"""`gpumeter operator`: runs the operator from its environment.

Owns how wrong settings and an unreachable cluster are told at the start. Decides nothing.
"""

import os
import sys

import click

from gpumeter_operator.adapters.kubernetes import Unreachable
from gpumeter_operator.main import run
from gpumeter_operator.settings import SettingsInvalid, read_settings


@click.command()
def operator() -> None:
    """Run the operator until SIGTERM. Everything is set by GPUMETER_* variables."""
    try:
        run(read_settings(os.environ))
    except SettingsInvalid as invalid:
        for problem in invalid.problems:
            click.echo(problem, err=True)
        sys.exit(2)
    except Unreachable as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
