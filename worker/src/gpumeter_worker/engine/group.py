"""Which processes of a group still hold what they held: memory, files, a device.

Owns how that is read from /proc. Neither signals nor buries any. Where there is no /proc nobody is found, and who asks
has only what its own children tell.
"""

from pathlib import Path


def alive(group: int, processes: Path = Path("/proc")) -> list[int]:
    """The ids of the processes of this group that are not at their end.

    A zombie has given everything back. One whose first thread has ended while others have not looks the same, and
    holds all of it: so its threads are counted. Fields as in proc_pid_stat(5).
    """
    found = []
    for process in processes.glob("[1-9]*"):
        try:
            state, _, of_group, *others = (process / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it ended meanwhile
            continue
        threads = int(others[14])
        if int(of_group) == group and (state not in "ZX" or threads > 1):
            found.append(int(process.name))
    return sorted(found)
