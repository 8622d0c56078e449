"""`gpumeter operator`: runs the operator from its environment.

Owns how wrong settings and an unreachable cluster are told at the start. Decides nothing.
"""

import os
import sys

import click

from gpumeter_operator.adapters.kubernetes import Unreachable
from gpumeter_operator.logs import configure_logs
from gpumeter_operator.main import run
from gpumeter_operator.settings import SettingsInvalid, read_settings


@click.command()
def operator() -> None:
    """Run the operator until SIGTERM. Everything is set by GPUMETER_* variables."""
    problems: list[str] = []
    try:
        configure_logs(os.environ)
    except ValueError as problem:
        problems.append(str(problem))
    try:
        settings = read_settings(os.environ)
    except SettingsInvalid as invalid:
        problems += invalid.problems
    if problems:
        for sentence in problems:
            click.echo(sentence, err=True)
        sys.exit(2)
    try:
        run(settings)
    except Unreachable as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
