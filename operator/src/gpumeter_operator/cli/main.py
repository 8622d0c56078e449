"""`gpumeter`: the group of commands.

Owns the list of commands and where each lives, and what holds for the process of each. A command's module is imported
when it is called, so that the gateway does not carry kopf, nor the plugin a server. Knows no command's options.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module

import click

LEVELS_MAX = 10_000  # of an object, as the API server takes it: sigs.k8s.io/json

# name -> (module:attribute, what it does in one line)
COMMANDS = {
    "operator": ("gpumeter_operator.cli.operator:operator", "Run the operator: InferenceServices become worker pods."),
    "collector": ("gpumeter_operator.cli.collector:collector", "Run the collector: usage records become UsageReports."),
    "gateway": ("gpumeter_operator.cli.gateway:gateway", "Run the gateway: OpenAI's API for all services."),
    "accounts": ("gpumeter_operator.cli.accounts:accounts", "Check that accounts add up to the allocated time."),
    "verify": ("gpumeter_operator.cli.verify:verify", "Recompute the whole ledger from its raw rows, and its digests."),
    "digests": ("gpumeter_operator.cli.digests:digests", "Export signed digests, and the keys that signed them."),
    "usage": ("gpumeter_operator.cli.usage:usage", "Print who used how much GPU time, and what it costs."),
    "adjust": ("gpumeter_operator.cli.adjust:adjust", "Correct a Final report by an entry in the next open period."),
    "journal": ("gpumeter_operator.cli.journal:journal", "Take the journals of pods that are gone into the ledger."),
    "migrate": ("gpumeter_operator.cli.migrate:migrate", "Bring the ledger's tables up to date, as their owner."),
    "profile": ("gpumeter_operator.cli.profile:profile", "Print the parameters behind a profile_hash."),
    "uninstall-check": (
        "gpumeter_operator.cli.uninstall_check:uninstall_check",
        "Refuse an uninstall while InferenceServices exist (the chart's hook).",
    ),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in --help, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="gpumeter-operator")
def main() -> None:
    """Metered inference on Kubernetes: operator, collector, gateway and the tools around the bill."""
    allow_deep_objects()


def allow_deep_objects() -> None:
    """Let this process read and copy every object that an API server may hold.

    A field whose content no schema knows may have all of LEVELS_MAX levels. Python's own limit, 1,000, holds for what
    decodes JSON too, here and in kopf: one such object of one user would end every list and watch of its kind. Twice
    that, because what copies takes two frames a level.

    From 3.12 on what is written in C has another limit, which nothing lifts: 3.13 decodes 9,994 levels, 3.12.1 not even
    1,500 (`deep_objects_problem`).
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 2 * LEVELS_MAX + 1_000))


def deep_objects_problem(python: str, decode: Callable[[str], object] = json.loads) -> str | None:
    """A sentence where this Python, of that version, decodes no deep objects though their levels are allowed.

    The last ten levels are not asked for: 3.13 lacks them, and nothing can be done about it.
    """
    levels = LEVELS_MAX - 10
    try:
        decode("[" * levels + "]" * levels)
    except RecursionError:
        return (
            f"Python {python} decodes no JSON of {levels:,} levels, which the API server takes from any user, and one "
            "such object ends every list and watch of its kind: run gpumeter on Python 3.11 or 3.13."
        )
    return None
