"""The metering lease: how long a worker goes on admitting work when nobody acknowledges its records.

Pure. Owns the rule that bounds what a node's death can lose. Does not know who acknowledges or why they stopped.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """Whether new work may be admitted; `message` is a sentence for the one who is refused."""

    held: bool
    message: str = ""


def lease(now_ns: int, acknowledged_at_ns: int, timeout_ns: int) -> Lease:
    """`acknowledged_at_ns` is when the last acknowledgement came, or when the journal opened. A timeout of 0: no lease.

    The worker writes a record at least every checkpoint, so a healthy collector always has something to acknowledge.
    """
    silent_ns = now_ns - acknowledged_at_ns
    if timeout_ns == 0 or silent_ns <= timeout_ns:
        return Lease(held=True)
    return Lease(
        held=False,
        message=f"no usage was acknowledged for {silent_ns // 10**9} s (at most {timeout_ns // 10**9} s are allowed); "
        "admission goes on when the collector is back",
    )
