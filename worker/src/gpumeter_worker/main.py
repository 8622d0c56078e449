"""The command `gpumeter-worker`: serve, diagnose.

Owns the order of start-up: the clock first, then what can fail fast, then what is slow to import. Does not know how
anything is served.
"""

import os
import signal
import sys
import time

import click

from gpumeter_worker import diagnosis
from gpumeter_worker.checks import Check, Verdict
from gpumeter_worker.failure import EXIT_CODE, SETTINGS_INVALID, StartupFailed, report
from gpumeter_worker.log import configure_logging
from gpumeter_worker.metering.clock import process_started_ns
from gpumeter_worker.settings import Settings, SettingsInvalid, from_environment

_DEV = click.option("--dev", is_flag=True, help="A worker run by hand: no operator, no tokens, tenant `anonymous`.")
_MODEL = click.option(
    "--model",
    default="",
    metavar="URI",
    help="file://, hf://, s3:// or oci://; default GPUMETER_MODEL_URI.",
)


@click.group()
@click.version_option(package_name="gpumeter-worker")
def main() -> None:
    """gpumeter's metered inference worker. Settings are read from GPUMETER_*."""


@main.command()
@_DEV
@_MODEL
def serve(dev: bool, model: str) -> None:
    """Serve one model: OpenAI's API on port 8000, usage records on port 8001."""
    started_ns = process_started_ns()
    # As process 1 of a container a signal without a handler is ignored, and Python's imports take a second.
    told_to_stop_s: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_stop_s.append(time.monotonic()))
    configure_logging()
    try:
        settings = _settings(dev, model)
        path = diagnosis.refuse_to_start(settings)
    except StartupFailed as failure:
        sys.exit(report(failure))
    from gpumeter_worker.serve import serve as run  # noqa: PLC0415 - a second of import that a wrong machine need not wait for

    sys.exit(run(settings, path, started_ns, told_to_stop_s))


@main.command()
@_DEV
@_MODEL
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For a person or a program."
)
def diagnose(dev: bool, model: str, output: str) -> None:
    """Say what a worker would find here, check by check, and what to do. Exit code 3 if it could not serve."""
    try:
        settings = _settings(dev, model)
        checks = [Check("settings", f"{settings.model_name} from {settings.model_uri}"), *diagnosis.examine(settings)]
    except StartupFailed as failure:
        checks = [Check("settings", failure.message, Verdict.FAILED, "", failure.reason)]
    click.echo(diagnosis.document(checks) if output == "json" else diagnosis.table(checks))
    failed = sum(check.verdict is Verdict.FAILED for check in checks)
    if output == "table":
        click.echo(f"\nIt cannot serve: {failed} of {len(checks)} checks failed." if failed else "\nIt can serve.")
    sys.exit(EXIT_CODE if failed else 0)


def _settings(dev: bool, model: str) -> Settings:
    """The settings, with the environment set up for the libraries. Raises StartupFailed."""
    try:
        settings = from_environment(os.environ, dev=dev, model=model)
    except SettingsInvalid as error:
        raise StartupFailed(SETTINGS_INVALID, str(error)) from None
    os.environ.update(diagnosis.use_writable_places(settings))
    return settings


if __name__ == "__main__":
    main()
