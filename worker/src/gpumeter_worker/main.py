"""The command `gpumeter-worker`: serve, diagnose.

Owns the order of start-up: the clock first, then what can fail fast, then what is slow to import. Does not know how
anything is served.
"""

import os
import signal
import sys
import time
from pathlib import Path

import click

from gpumeter_worker import diagnosis, source
from gpumeter_worker.log import configure_logging
from gpumeter_worker.metering.clock import process_started_ns
from gpumeter_worker.metering.journal import JournalUnusable, check_directory
from gpumeter_worker.settings import Settings, SettingsInvalid, from_environment

_DEV = click.option("--dev", is_flag=True, help="A worker run by hand: no operator, no tokens, tenant `anonymous`.")
_MODEL = click.option(
    "--model", default="", metavar="URI", help="file:///path or hf://owner/name; default GPUMETER_MODEL_URI."
)


@click.group()
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
        settings, path = _prepared(dev, model)
    except diagnosis.StartupFailed as failure:
        sys.exit(diagnosis.report(failure))
    from gpumeter_worker.serve import serve as run  # noqa: PLC0415 - a second of import that a wrong machine need not wait for

    sys.exit(run(settings, path, started_ns, told_to_stop_s))


@main.command()
@_DEV
@_MODEL
def diagnose(dev: bool, model: str) -> None:
    """Say what a worker would find here: settings, device, model files. Exit code 3 if it could not serve."""
    rows: list[tuple[str, str]] = []
    failure: diagnosis.StartupFailed | None = None
    try:
        settings, path = _prepared(dev, model)
        rows += [
            ("service", settings.service),
            ("model", f"{settings.model_name} from {settings.model_uri}"),
            ("model files", str(path) if path else "fetched when it serves"),
            ("device", f"{settings.device} ({settings.gpu_count} GPU, class {settings.gpu_class})"),
            ("dtype", settings.dtype),
            ("batch", f"{settings.max_batch_size} requests, {settings.max_batch_tokens} tokens a step"),
            ("attribution", settings.attribution.value),
            ("journal", str(settings.journal_dir)),
        ]
    except diagnosis.StartupFailed as problem:
        failure = problem
    rows += [("threads", str(diagnosis.threads())), ("memory", f"{diagnosis.memory_bytes() // 2**20} MiB")]
    rows.append(("verdict", failure.line if failure else "it can serve"))
    for name, value in rows:
        click.echo(f"{name:<12} {value}")
    sys.exit(diagnosis.EXIT_CODE if failure else 0)


def _prepared(dev: bool, model: str) -> tuple[Settings, Path | None]:
    """Settings and model directory, after every check that costs less than a second. Raises StartupFailed."""
    try:
        settings = from_environment(os.environ, dev=dev, model=model)
    except SettingsInvalid as error:
        raise diagnosis.StartupFailed(diagnosis.SETTINGS_INVALID, str(error)) from None
    os.environ.update(diagnosis.use_writable_places(settings))
    diagnosis.check_device(settings)
    path = source.local_path(settings.model_uri)
    if path is not None:
        diagnosis.check_model_files(path)
    try:
        check_directory(settings.journal_dir)
    except JournalUnusable as error:
        raise diagnosis.StartupFailed(diagnosis.JOURNAL_UNUSABLE, str(error)) from None
    return settings, path


if __name__ == "__main__":
    main()
