"""What a write transaction of the ledger keeps others from changing meanwhile.

Owns the names of locks and the order in which they are taken. Knows no database: SQLite has one writer and needs none;
PostgreSQL takes them as advisory locks, which end with the transaction.

A transaction that names no lock has the ledger to itself, as in SQLite. One that names locks shares the ledger with
others that do: whoever brings a worker's facts shares the service with other workers and has the worker for itself;
whoever closes a period has the service for itself, so that no fact comes in between the fold and its being kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lock:
    """One thing that is locked. `shared`: others may share it, and nobody has it alone."""

    name: str
    shared: bool = False

    @property
    def key(self) -> int:
        """64 bits, as PostgreSQL wants them. Two names of one key wait for each other needlessly, and that is all."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big", signed=True)


LEDGER = "gpumeter ledger"


def in_order(locks: Sequence[Lock]) -> tuple[Lock, ...]:
    """All that a transaction takes, in the one order in which everybody takes them: ledger, service, worker."""
    if not locks:
        return (Lock(LEDGER),)
    return (Lock(LEDGER, shared=True), *sorted(locks, key=lambda lock: lock.name))


def of_service(service_key: str, *, shared: bool) -> Lock:
    """The facts and periods of a service (`namespace/name`)."""
    return Lock(f"1 service {service_key}", shared)


def of_worker(worker_uid: str) -> Lock:
    """The chains, containers and progress of a worker."""
    return Lock(f"2 worker {worker_uid}")


PLANS = Lock("3 price plans")
REPORTS = Lock("4 reports that are not Final", shared=True)
"""The first version of a phase is kept, whoever brings it: nothing is read before it is written."""
DAYS = Lock("5 days of records")
RETENTION = Lock("6 retention")
"""Nobody books into periods that are Final, so what is removed needs no other lock than against a second remover."""
