"""Memory that this process has freed goes back to the machine.

Owns how the C library is asked for that. Does not know when there is something to give.
"""

import asyncio
import ctypes

EVERY_S = 30.0  # each time costs milliseconds


async def give_back_for_ever() -> None:
    """Keep what is freed from staying with the process.

    A burst (a thousand services that are made, a list of all pods) frees blocks that lie among others which stay, and
    by itself glibc gives back only what is free at the end of its heap: a third of what an operator grew by.
    """
    while True:
        await asyncio.sleep(EVERY_S)
        give_back()


def give_back() -> bool:
    """Give back every page that holds nothing; False where there was none, or the C library is not glibc.

    malloc_trim(3): since glibc 2.8 pages inside the heap too.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
