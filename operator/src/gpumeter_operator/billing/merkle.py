"""The Merkle root of a list, as RFC 6962 (section 2.1) defines it.

Owns the tree: a leaf is SHA-256(0x00 || data), a node SHA-256(0x01 || left || right), the left side of n leaves holds
the largest power of two below n, and the root of nothing is SHA-256 of nothing. So no node can be passed off as a leaf,
and nothing can be added at the end unseen. Does not know what the leaves are.
"""

from collections.abc import Iterable
from hashlib import sha256


class Tree:
    """Takes leaves one by one and holds one hash for each bit of their count, whatever that is."""

    def __init__(self) -> None:
        self.count = 0
        self._complete: list[bytes] = []  # roots of complete subtrees, the largest first

    def add(self, data: bytes) -> None:
        """Append a leaf."""
        self._complete.append(sha256(b"\x00" + data).digest())
        self.count += 1
        above = self.count
        while above % 2 == 0:  # as many subtrees of equal size end here as the count has zeros at its end
            right = self._complete.pop()
            self._complete[-1] = _node(self._complete[-1], right)
            above //= 2

    @property
    def root(self) -> str:
        """The root of the leaves so far, 64 hex digits."""
        if not self._complete:
            return sha256().hexdigest()
        *rest, found = self._complete
        for left in reversed(rest):
            found = _node(left, found)
        return found.hex()


def root_of(leaves: Iterable[bytes]) -> tuple[int, str]:
    """How many leaves there are, and their root."""
    tree = Tree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.count, tree.root


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()
