"""What processes take of the machine, as the kernel counts it: CPU time and memory.

Owns the reading of /proc. A bench that lives in a network namespace of its own finds there everything that it started
and nothing else. Does not know what the processes do.
"""

import os
from pathlib import Path

PROC = Path("/proc")


def cpu_by_name() -> dict[str, float]:
    """CPU seconds so far of all processes of this network namespace, by their names (15 characters of them)."""
    mine, found = (PROC / "self/ns/net").readlink(), dict[str, float]()
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if (folder / "ns/net").readlink() == mine:
                name = (folder / "comm").read_text().strip()
                found[name] = found.get(name, 0.0) + cpu_seconds(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def cpu_since(before: dict[str, float]) -> dict[str, float]:
    """What each has taken since `before`; those that began meanwhile count from their beginning."""
    return {name: seconds - before.get(name, 0.0) for name, seconds in cpu_by_name().items()}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, which: str = "VmRSS") -> float:
    """Resident memory now, or the most so far (VmHWM)."""
    lines = (PROC / f"{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{which}:"))
