"""Start-up diagnosis: gathers the facts, lets checks.py decide, and says what stands against serving.

Owns the order of checks, `diagnose`'s table, and where libraries may write. Imports no torch, so that a wrong machine
is told within a second or two. Does not know how a model is loaded.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from gpumeter_worker import machine
from gpumeter_worker.checks import Asked, Check, MachineFacts, Verdict, check_machine, check_model
from gpumeter_worker.failure import JOURNAL_UNUSABLE, StartupFailed
from gpumeter_worker.metering.journalfile import JournalUnusable, check_directory
from gpumeter_worker.modelfiles import read_model
from gpumeter_worker.settings import Settings
from gpumeter_worker.sources.location import Location, local_path, remote
from gpumeter_worker.sources.progress import megabytes


def location(settings: Settings) -> Location:
    """The model's source, as the settings name it."""
    return Location(settings.model_uri, settings.model_revision, settings.allow_pickle)


def refuse_to_start(settings: Settings) -> Path | None:
    """Check everything that can be checked before a model is fetched, and the model where it is here already.

    Returns its directory, None when it must be fetched. Raises StartupFailed for the first check that fails.
    """
    path = local_path(settings.model_uri)
    facts = machine_facts(settings)
    _raise_first(check_machine(facts))
    if path is not None:
        _raise_first(_model_checks(settings, facts, path))
    _raise_first([_journal(settings)])
    return path


def refuse_model(settings: Settings, path: Path) -> None:
    """Check a model that was fetched; blocks for as long as reading headers takes. Raises StartupFailed."""
    _raise_first(_model_checks(settings, machine_facts(settings), path))


def examine(settings: Settings) -> list[Check]:
    """Every check there is, whatever the others say; the source is asked, but nothing is fetched."""
    facts = machine_facts(settings)
    found = [*check_machine(facts), _journal(settings)]
    try:
        path = local_path(settings.model_uri)
        if path is None:
            found.append(_source(settings))
        else:
            found += [Check("model", str(path)), *_model_checks(settings, facts, path)]
    except StartupFailed as problem:
        found.append(Check("model", problem.message, Verdict.FAILED, "", problem.reason))
    cores, memory = machine.threads(), machine.memory_bytes()
    return [*found, Check("threads", str(cores)), Check("memory limit", f"{memory // 2**20} MiB")]


def machine_facts(settings: Settings) -> MachineFacts:
    """What matters of this machine for these settings."""
    files = machine.device_files() if settings.gpu_count else ()
    return MachineFacts(
        gpus_wanted=settings.gpu_count,
        device_files=files,
        driver=machine.driver() if files else None,
        torch_cuda=machine.torch_cuda(),
        shared_memory=machine.shared_memory_bytes(),
        memory=machine.memory_bytes(),
        mps_pipe=machine.mps_pipe() if files else "",
        billed=not settings.dev,
        serving=machine.engine_runs() if files else False,
        gpu_class=settings.gpu_class,
    )


def table(rows: Iterable[Check]) -> str:
    """Check, verdict, found, and below it what to do, for a person."""
    lines = [f"{'CHECK':<14} {'VERDICT':<8} FOUND"]
    for row in rows:
        lines.append(f"{row.name:<14} {row.verdict.value:<8} {row.found}")
        if row.advice:
            lines.append(f"{'':<23} -> {row.advice}")
    return "\n".join(lines)


def document(rows: Iterable[Check]) -> str:
    """The same as JSON."""
    listed = [asdict(row) for row in rows]
    return json.dumps({"canServe": all(row["verdict"] != Verdict.FAILED for row in listed), "checks": listed}, indent=2)


def use_writable_places(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment lacks so that libraries write only where a read-only container lets them."""
    home = environment.get("HOME", "")
    wanted = {
        "HF_HOME": str(settings.model_cache / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",  # noqa: S108 - the container's own
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
    }
    if not home or not os.access(home, os.W_OK):
        wanted["HOME"] = "/tmp"  # noqa: S108
    return {name: value for name, value in wanted.items() if name == "HOME" or name not in environment}


def _model_checks(settings: Settings, facts: MachineFacts, path: Path) -> tuple[Check, ...]:
    model = read_model(path, allow_pickle=settings.allow_pickle)
    return check_model(model, facts, Asked(settings.dtype, settings.max_model_len, machine.model_types()))


def _journal(settings: Settings) -> Check:
    try:
        check_directory(settings.journal_dir)
    except JournalUnusable as error:
        found, _, advice = str(error).rpartition("; ")
        return Check("journal", found or advice, Verdict.FAILED, advice, JOURNAL_UNUSABLE)
    return Check("journal", str(settings.journal_dir))


def _source(settings: Settings) -> Check:
    snapshot = remote(location(settings), os.environ).look()
    found = f"{settings.model_uri} at {snapshot.version}: {megabytes(snapshot.size)} MB, fetched when it serves"
    return Check("model", found, Verdict.LATER)


def _raise_first(rows: Iterable[Check]) -> None:
    for row in rows:
        if (problem := row.failed) is not None:
            raise problem
