"""The way into a node's network for a test: its Services answer there, also while the API server does not.

Owns setns(2). Does not know what is spoken there.
"""

import ctypes
import os
from pathlib import Path

from devcluster.processes import Process

CLONE_NEWNET = 0x40000000


def enter_network(node: Process) -> None:
    """Move the calling thread, and it alone, into the node's network; there is no way back but the thread's end."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{node.pid}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)}: the network of the node with pid {node.pid}")
