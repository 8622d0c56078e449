"""The start of a long-running command: logs are set up and settings read, or every problem is told.

Owns what wrong settings look like and their exit code, and that a Python which cannot do it all is told. Does not know
what is set.
"""

import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import click

from gpumeter_operator.cli.main import deep_objects_problem
from gpumeter_operator.environment import SettingsInvalid
from gpumeter_operator.logs import configure_logs

WRONG_SETTINGS = 2  # the exit code that click too uses for a command that is used wrongly

log = logging.getLogger(__name__)

S = TypeVar("S")


def settings_or_exit(read: Callable[[Mapping[str, str]], S]) -> S:
    """What `read` makes of the environment; ends the process with a line for each problem when it cannot be used.

    What this Python cannot do is a warning in the log.
    """
    problems: list[str] = []
    try:
        configure_logs(os.environ)
    except SettingsInvalid as invalid:
        problems += invalid.problems
    try:
        settings = read(os.environ)
    except SettingsInvalid as invalid:
        problems += invalid.problems
    if not problems:
        if (deep := deep_objects_problem(platform.python_version())) is not None:
            log.warning("%s", deep)
        return settings
    for problem in problems:
        click.echo(f"SettingsInvalid: {problem}", err=True)
    sys.exit(WRONG_SETTINGS)
