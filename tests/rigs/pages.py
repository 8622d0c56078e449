"""Pages of records as fast as they can be made: what a bench feeds the ledger with, without a worker.

Owns made-up boots whose chains are real: every record is one that the contract accepts, and every hash is right. A boot
books eight records a second, four of each five a session's slice, as a worker under load does, and then their account.
It starts on a whole minute, so that no account lies in another one than its slices.
"""

from collections.abc import Iterator
from hashlib import sha256

from gpumeter_operator.billing.facts import Worker
from gpumeter_usage.chain import GENESIS, Link
from gpumeter_usage.page import Page
from gpumeter_usage.period import SECOND_NS
from gpumeter_usage.record import Account, Kind, Record, Status, canonical

RECORD_NS = SECOND_NS // 8
MARK = 8_888_888_888_888_888_888  # stands for a number in a template; no other number looks like it
TENANTS = tuple(f"tenant-{number:02d}" for number in range(50))


class Boot:
    """One boot of one worker, whose records follow each other for ever."""

    def __init__(self, number: int, started_ns: int, services: int = 20) -> None:
        digest = sha256(str(number).encode()).hexdigest()
        uid = "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))
        service = f"service-{number % services:02d}"
        self.worker = Worker(uid, "team-a", service, digest[:36], "llama-3.1-8b", "h100", 1, f"{service}-{number}")
        self.boot_id = digest[32:]
        self.started_ns = started_ns
        self.seq = 0
        self._hash = GENESIS
        self._open_ns = 0  # what slices claim and no account has booked yet
        self._session, self._account = (self._template(kind) for kind in (Kind.SESSION, Kind.ACCOUNT))

    def pages(self, size: int = 5000) -> Iterator[Page]:
        """One page after the other."""
        while True:
            yield self.page(size)

    def page(self, size: int) -> Page:
        """The next records."""
        after, links, previous = self.seq, [], self._hash
        for seq in range(after + 1, after + size + 1):
            ended_ns = self.started_ns + seq * RECORD_NS
            started_ns = ended_ns - RECORD_NS
            if seq % 5:
                gpu_ns = 90_000_000 + seq * 7919 % 9_000_000
                self._open_ns += gpu_ns
                session, tenant = f"{seq // 40 * 2654435761 % 2**64:016x}{seq // 40:016x}", TENANTS[seq // 40 % 50]
                body = self._session % (gpu_ns * 17, gpu_ns, ended_ns, gpu_ns, seq, session, started_ns, tenant)
            else:
                body = self._account % (ended_ns, self._open_ns, seq, started_ns)
                self._open_ns = 0
            encoded = body.encode()
            previous = sha256(previous.encode() + encoded).hexdigest()
            links.append(Link(previous, encoded))
        self.seq, self._hash = after + size, previous
        worker = self.worker
        return Page(worker.worker_uid, worker.service_key, self.boot_id, after, ended_ns, tuple(links))

    def _template(self, kind: Kind) -> str:
        """A record of this kind with `%` where its figures go, in the order of the canonical form's names."""
        worker = self.worker
        values: dict[str, object] = {
            "worker_uid": worker.worker_uid,
            "boot_id": self.boot_id,
            "seq": MARK,
            "kind": kind,
            "account": Account.ATTRIBUTED.value,
            "service": worker.service_key,
            "model": worker.model,
            "started_at": MARK,
            "ended_at": MARK,
            "gpu_ns": MARK,
            "gpu_uuid": "GPU-" + worker.worker_uid,
            "gpu_class": worker.gpu_class,
            "clock": "cuda",
        }
        if kind is Kind.SESSION:
            digest = sha256(b"a profile").hexdigest()
            values |= {"session_id": "MARK", "tenant": "MARK", "status": Status.OPEN, "profile_hash": digest}
            values |= {
                "batch_ns": MARK,
                "decode_ns": MARK,
                "completion_tokens": 37,
                "steps": 37,
                "kv_byte_s": 12_345_678,
            }
        text = canonical(Record(**values)).decode()  # type: ignore[arg-type]
        return text.replace(str(MARK), "%d").replace("MARK", "%s")
