"""Which profile splits this worker's steps, and the file that keeps every profile that its records may name.

Owns `profiles.json` beside the journal: written whole and renamed into place, read at the next start, so that an engine
that is started again does not measure again what has not changed, and so that an auditor finds the parameters of every
hash. Profiles are never removed: there is one a calibration, of some hundred bytes. Does not know how a fit is made.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpumeter_worker.metering.attribution import Costs, Profile, Rule, uncalibrated
from gpumeter_worker.metering.calibration import Calibration, Fit, Quality, Subject

log = logging.getLogger(__name__)

FILE_NAME = "profiles.json"

CALIBRATED = "Calibrated"
BY_TOKENS = "ByTokens"
POOR = "CalibrationPoor"
OFF = "CalibrationOff"
_FIT_FOR_BILLING = (CALIBRATED, BY_TOKENS, OFF)


@dataclass(frozen=True, slots=True)
class Adopted:
    """What splits steps from now on, and why it is this: a reason and a sentence.

    `subject`: what was to be calibrated; `quality`: of parameters that were fitted to it.
    """

    profile: Profile
    reason: str
    message: str
    subject: Subject | None = None
    quality: Quality | None = None

    @property
    def as_asked(self) -> bool:
        """Whether steps are split as the settings ask, and not by what stands in for it."""
        return self.reason in _FIT_FOR_BILLING


def adopt(calibration: Calibration | None, rule: Rule, clock: str, model: str) -> Adopted:
    """The profile for what an engine said at its readiness. Pure.

    `calibration` None: none was asked for. Parameters that are not good enough are never used: the proportions of a
    small model stand in for them, and the totals stay as measured.
    """
    stand_in = uncalibrated(rule, clock)
    if rule is Rule.TOKENS:
        return Adopted(stand_in, BY_TOKENS, "steps are split by new tokens, for which nothing is calibrated")
    if calibration is None:
        return Adopted(
            stand_in, OFF, f"no calibration was asked for; steps are split by the proportions {stand_in.name}"
        )
    if calibration.problem or calibration.fit is None:
        return Adopted(
            stand_in,
            POOR,
            f"the calibration is not good enough: {calibration.problem or 'nothing was fitted'}; steps are split by "
            f"the proportions {stand_in.name}, and their totals are as measured. Restart the worker when its machine "
            "is quiet, or allow more time by GPUMETER_CALIBRATION_MS",
            calibration.subject,
        )
    subject, found = calibration.subject, calibration.fit
    name = (
        f"knee-1 {model} {subject.model[:12]} {subject.dtype} on {subject.device}, "
        f"torch {subject.torch}, engine {subject.engine}"
    )
    good = found.quality
    how = "found in the journal's volume" if calibration.stored else f"fitted to {good.steps} timed steps"
    return Adopted(
        Profile(name, rule, *found.costs),
        CALIBRATED,
        f"steps are split by parameters {how}, half of which they predict within {good.median_error_ppm / 1e4:.1f} % "
        f"and 95 % within {good.tail_error_ppm / 1e4:.1f} %",
        subject,
        good,
    )


class Profiles:
    """Every profile that steps of this journal were split by. `current` is the hash of the latest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._entries: dict[str, dict[str, Any]] = {}
        self._on_disk = True
        self._problem = ""
        self.current = ""

    def open(self) -> None:
        """Read what former boots left. A damaged file is put aside, whole, and a new one begun."""
        path = self._directory / FILE_NAME
        try:
            self._entries = {str(one["hash"]): one for one in _read(path)}
        except _DAMAGED as error:
            log.warning("the profiles in %s cannot be read (%s); they are put aside and measured again", path, error)
            with suppress(OSError):
                path.rename(path.with_name(FILE_NAME + ".damaged"))

    def use(self, adopted: Adopted) -> None:
        """Steps are split by this from now on. On disk before it returns, unless the disk refuses, which is logged.

        It blocks for one small write, at an engine's readiness, when no session is in flight; and only for a profile
        that was not there already.
        """
        self.current = adopted.profile.hash
        if self.current in self._entries and self._on_disk:
            return
        self._entries[self.current] = _entry(adopted)
        self._on_disk = False
        self._problem = ""
        self.keep()

    def keep(self) -> None:
        """Write what the disk refused before; nothing is done while all is on disk. Called ahead of every flush."""
        if self._on_disk:
            return
        try:
            _write(self._directory / FILE_NAME, list(self._entries.values()))
            self._on_disk = True
        except OSError as error:
            problem = f"the profile {self.current:.12} cannot be kept: {error.strerror}; free the disk"
            if problem != self._problem:
                log.error("%s", problem)
            self._problem = problem

    def document(self) -> dict[str, Any]:
        """The answer of GET /usage/v1/profile."""
        return {"current": self.current, "profiles": list(self._entries.values())}


def stored_fit(directory: Path, subject: Subject) -> Fit | None:
    """The parameters that were fitted to this very subject in a former start; None: there are none to be had."""
    try:
        for entry in reversed(_read(directory / FILE_NAME)):
            if entry["quality"] is not None and entry["subject"] == asdict(subject):
                profile = entry["profile"]
                costs = Costs(*(_whole(profile[name]) for name in Costs._fields))
                return Fit(costs, Quality(**{name: _whole(value) for name, value in entry["quality"].items()}))
    except _DAMAGED:
        return None
    return None


_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _entry(adopted: Adopted) -> dict[str, Any]:
    """`hash` is the SHA-256 of `profile` written with sorted keys and without spaces."""
    return {
        "hash": adopted.profile.hash,
        "profile": asdict(adopted.profile),
        "reason": adopted.reason,
        "subject": asdict(adopted.subject) if adopted.subject else None,
        "quality": asdict(adopted.quality) if adopted.quality else None,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    entries = json.loads(path.read_text())["profiles"]
    for entry in entries:
        profile = entry["profile"]
        known = Profile(**{**profile, "rule": Rule(profile["rule"])})
        if known.hash != entry["hash"]:
            raise ValueError(f"the profile {entry['hash']:.12} has other parameters than its hash says")
    return list(entries)


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    fresh = path.with_name(f".{FILE_NAME}.new")
    with fresh.open("w") as stream:
        stream.write(json.dumps({"profiles": entries}, indent=1, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a parameter is no whole number")
    return value
