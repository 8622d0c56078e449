"""What the HTTP side needs of a worker, so that it knows none.

Owns the port; worker.Worker implements it, and tests put something smaller in its place.
"""

from typing import Protocol

from gpumeter_usage.record import Status
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.identity import Caller
from gpumeter_worker.api.keeping import Keeping
from gpumeter_worker.api.sessions import Choice, Session
from gpumeter_worker.api.tokenizer import Tokenizer
from gpumeter_worker.engine.messages import Ready
from gpumeter_worker.metering.profiles import Adopted, Profiles
from gpumeter_worker.metering.writer import JournalWriter
from gpumeter_worker.readiness import Readiness
from gpumeter_worker.settings import Settings
from gpumeter_worker.telemetry.watch import GpuWatch


class Clerk(Protocol):
    """Who stops sessions: all that an answer needs."""

    @property
    def keeping(self) -> Keeping:
        """What is kept of answers that are written when they are whole."""

    def take_back(self, session: Session, outcome: Status, index: int | None = None) -> None:
        """Stop a session, or one choice of it, before the engine's next step. What has ended stays as it is."""

    def cut_off(self, session: Session, why: Refused) -> None:
        """Stop a session as cancelled, and have its client told why. What it used stays billed."""


class Desk(Clerk, Protocol):
    """Where requests are handed in."""

    @property
    def settings(self) -> Settings:
        """How this worker serves."""

    @property
    def engine(self) -> Ready | None:
        """What the engine that serves now said of itself."""

    @property
    def attribution(self) -> Adopted | None:
        """How steps are split, once that is known."""

    @property
    def gpu(self) -> GpuWatch:
        """What is known of the device."""

    def readiness(self) -> Readiness:
        """Whether new work is admitted, and why not."""

    def refuse_unless_ready(self) -> tuple[Ready, Tokenizer]:
        """What a request needs to be read. Raises Refused (503)."""

    def submit(self, caller: Caller, choices: list[Choice]) -> Session:
        """Admit a request whose choices were checked against the model. Raises Refused."""

    def metrics(self) -> bytes:
        """Everything, in Prometheus' text format."""


class UsageDesk(Protocol):
    """Where the collector asks."""

    @property
    def settings(self) -> Settings:
        """How this worker serves."""

    @property
    def journal(self) -> JournalWriter:
        """What was written down."""

    @property
    def profiles(self) -> Profiles:
        """The parameters that its records name."""

    @property
    def gpu(self) -> GpuWatch:
        """What is known of the device."""
