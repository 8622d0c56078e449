"""The days in which PostgreSQL keeps records: one partition each.

Owns which there are, and that one is made before a record needs it. SQLite has none and needs none. What a partition is
and who may make one, the migration says.
"""

import threading
from collections.abc import Iterable

from sqlalchemy import BigInteger, Connection, Engine, bindparam, func, select, text

from gpumeter_operator.adapters.ledger.engine import writing
from gpumeter_operator.adapters.ledger.locks import DAYS
from gpumeter_usage.period import SECOND_NS

DAY_NS = 86_400 * SECOND_NS
EARLY_END_NS = 1_577_836_800 * SECOND_NS  # 2020: before it there is one partition for all
AHEAD = 2  # days: whatever hour it is, the next midnight meets a partition


class DayMissing(Exception):
    """Records are booked in days that have no partition yet; `Days.make` them, and try again."""

    def __init__(self, day_ends_ns: set[int]) -> None:
        super().__init__(f"no partition for {len(day_ends_ns)} day(s)")
        self.day_ends_ns = day_ends_ns


def day_end_ns(booked_end_ns: int) -> int:
    """The end of the UTC day that holds the period with this end: periods are (start, end]."""
    return -(-booked_end_ns // DAY_NS) * DAY_NS


class Days:
    """Which days there are, as far as this process has seen; may be asked from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._partitioned = engine.dialect.name == "postgresql"
        self._lock = threading.Lock()
        self._known: set[int] = set()

    def require(self, booked_ends_ns: Iterable[int]) -> None:
        """Raise DayMissing where a record that is booked so would find no partition."""
        if self._partitioned:
            wanted = {day_end_ns(end_ns) for end_ns in booked_ends_ns if end_ns > EARLY_END_NS}
            if missing := wanted - self._known:
                raise DayMissing(missing)

    def make(self, day_ends_ns: Iterable[int], *, ahead: int = AHEAD) -> None:
        """Make these days where they are missing, and some after each, in a transaction of their own."""
        if not self._partitioned:
            return
        wanted = {end_ns + number * DAY_NS for end_ns in day_ends_ns for number in range(ahead + 1)}
        with self._lock:
            if wanted <= self._known:
                return
            with writing(self._engine, DAYS) as connection:
                for end_ns in sorted(wanted - self._known):
                    connection.execute(select(func.ledger_make_day(bindparam("end", end_ns, BigInteger))))
            self._known |= wanted

    def gone(self, booked_ends_ns: Iterable[int]) -> DayMissing:
        """What to raise where a day that was there is not any more: another process removed it. It is made again."""
        day_ends_ns = {day_end_ns(end_ns) for end_ns in booked_ends_ns if end_ns > EARLY_END_NS}
        self.forget(day_ends_ns)
        return DayMissing(day_ends_ns)

    def forget(self, day_ends_ns: Iterable[int]) -> None:
        """These days were removed."""
        with self._lock:
            self._known -= set(day_ends_ns)


def drop(connection: Connection, end_ns: int) -> None:
    """Remove a day; the database refuses where a record of it is not in the log of removals."""
    connection.execute(text("SELECT ledger_drop_day(:end)").bindparams(bindparam("end", end_ns, BigInteger)))
