"""What is asked of each service at this gateway, in versions: who knows one version is told only what changed since.

Owns the figures that the operator scales by and the order of their changes. Does not know how they are asked for, nor
who else has figures: several gateways tell theirs separately.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ENTRIES_MAX = 20_000  # services that went quiet are remembered so that it can be told; beyond this all is told anew


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests that wait here and that workers have from here; `since_ns` is monotonic, None where nobody waits."""

    waiting: int = 0
    in_flight: int = 0
    since_ns: int | None = None


QUIET = Demand()


@dataclass(frozen=True, slots=True)
class Change:
    """Figures by service at `version`: all that are not quiet when `whole`, else those that changed."""

    version: int
    whole: bool
    services: Mapping[str, Demand]


class Board:
    """The figures, each with the version of its last change.

    `first_version` must be greater than any that a former process at this address may have told: then who asks for
    what came after one of those is told all.
    """

    def __init__(self, first_version: int, entries_max: int = ENTRIES_MAX) -> None:
        self._entries_max = entries_max
        self._first = self.version = self.urgent_version = first_version
        self._changed: dict[str, tuple[int, Demand]] = {}  # in the order of their changes

    def put(self, service: str, demand: Demand, *, urgent: bool = False) -> bool:
        """Note a service's figures; whether they are new. `urgent`: the operator should hear of it at once."""
        known = self._changed.get(service)
        if demand == (QUIET if known is None else known[1]):
            return False
        self.version += 1
        if urgent:
            self.urgent_version = self.version
        self._changed.pop(service, None)
        self._changed[service] = self.version, demand
        if len(self._changed) > self._entries_max:
            self._forget_quiet()
        return True

    def since(self, version: int | None) -> Change:
        """What changed after `version`; everything for who knows nothing, or a version that is not of this board."""
        if version is None or not self._first <= version <= self.version:
            noisy = {name: demand for name, (_, demand) in self._changed.items() if demand != QUIET}
            return Change(self.version, True, noisy)
        changed: dict[str, Demand] = {}
        for name in reversed(self._changed):
            at, demand = self._changed[name]
            if at <= version:
                break
            changed[name] = demand
        return Change(self.version, False, changed)

    def _forget_quiet(self) -> None:
        self._changed = {name: entry for name, entry in self._changed.items() if entry[1] != QUIET}
        self._first = self.version
