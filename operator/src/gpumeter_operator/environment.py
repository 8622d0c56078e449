"""GPUMETER_* variables, read: each value, or why it cannot be, all problems at once.

Owns how a variable becomes a value and the sentences about those that do not. Does not know which variables there are.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpumeter_operator.decide.credentials import MASTER_KEY_MIN_BYTES

MASTER_KEY_FILE = "GPUMETER_MASTER_KEY_FILE"


class SettingsInvalid(ValueError):
    """The environment cannot be used; `problems` holds a sentence for each variable that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Environment:
    """Variables and the problems with those that were read so far. An empty variable counts as not set."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.problems: list[str] = []
        self._variables = variables

    def text(self, name: str, default: str = "") -> str:
        """Any text."""
        return self._variables.get(name, "") or default

    def needed(self, name: str, what_to_do: str) -> str:
        """Any text but none; `what_to_do` ends the sentence that asks for it."""
        text = self.text(name)
        if not text:
            self.problems.append(f"{name} is not set; {what_to_do}.")
        return text

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        text = self.text(name)
        if not text:
            return default
        if len(text) <= len(str(most)) and text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        self.problems.append(
            f"{name} is {text!r:.40}; set a whole number from {least} to {most}, or leave it out ({default})."
        )
        return default

    def seconds(self, name: str, default: float, below: float = 86_400) -> float:
        """A duration in seconds, more than none and less than `below`; fractions are fine."""
        text = self.text(name)
        try:
            seconds = float(text) if text else default
        except ValueError:
            seconds = math.nan
        if 0 < seconds < below:
            return seconds
        self.problems.append(
            f"{name} is {text!r:.40}; set seconds, more than 0 and less than {below:g}, or leave it out ({default:g})."
        )
        return default

    def document(self, name: str, what_it_is: str) -> Mapping[str, Any]:
        """A JSON object; empty where the variable is. `what_it_is` ends the sentence about anything else."""
        text = self.text(name)
        try:
            document = json.loads(text) if text else {}
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        self.problems.append(f"{name} is {text!r:.80}; set a JSON object, {what_it_is}.")
        return {}

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """One of `choices`, however its letters are written."""
        text = self.text(name, default)
        for choice in choices:
            if choice.lower() == text.lower():
                return choice
        self.problems.append(f"{name} is {text!r:.40}; set one of {', '.join(choices)}.")
        return default

    def master_key(self, default_file: str = "") -> bytes:
        """The release's master key, from the file that GPUMETER_MASTER_KEY_FILE names."""
        path = self.text(MASTER_KEY_FILE, default_file)
        if not path:
            self.problems.append(f"{MASTER_KEY_FILE} is not set; name the file that holds the release's master key.")
            return b""
        try:
            key = Path(path).read_bytes()
        except OSError as error:
            self.problems.append(f"{MASTER_KEY_FILE} names {path}, which cannot be read: {error.strerror}.")
            return b""
        if len(key) < MASTER_KEY_MIN_BYTES:
            self.problems.append(
                f"{MASTER_KEY_FILE} names {path}, which holds {len(key)} bytes; a master key has at least "
                f"{MASTER_KEY_MIN_BYTES}."
            )
        return key

    def check(self) -> None:
        """Raise SettingsInvalid with every problem so far."""
        if self.problems:
            raise SettingsInvalid(self.problems)
