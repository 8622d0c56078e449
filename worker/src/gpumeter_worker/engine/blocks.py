"""Whose tokens lie where in the cache, and which of them can be found there again.

Owns the numbers of the cache's blocks: who holds them, how often, and the index of prefixes. Knows no torch and no
clock: the runner reads `sequence.blocks` and does the copies. The token at position p of a sequence lies in block
`blocks[p // block_tokens]` at offset `p % block_tokens`.

Prefixes are found by a chain of SHA-256 over whole units of tokens: equal hashes mean equal tokens from the first one
on. A chain starts from the tenant, so that nobody finds what another tenant computed: a hit is faster than a miss, and
who could hit another's prompt could guess it piece by piece. What a tenant computed for one of its users is found for
the next.
"""

import heapq
from array import array
from collections import OrderedDict
from hashlib import sha256
from typing import NamedTuple, Protocol

from gpumeter_worker.engine.sequence import Sequence

_UNIT_TOKENS = 16
"""Slots are matched in units of this many tokens, as the paged cache is with blocks of 16."""
_KEPT_SLOTS = 8
"""How many slots keep what was pushed out of the lowest ones: a few conversations that take turns, and a bounded part
of a cache whose memory is taken only where it is written."""


class Copy(NamedTuple):
    """The first `tokens` tokens of block `source` are needed in block `target`, in every layer."""

    source: int
    target: int
    tokens: int


class KvBlocks(Protocol):
    """What the scheduler asks of a cache. A sequence holds blocks from `admit` to `release`."""

    @property
    def finds_prefixes(self) -> bool:
        """Whether a sequence may start with what another one computed."""

    @property
    def unit_tokens(self) -> int:
        """Prefixes are found in whole units of this many tokens."""

    @property
    def longest(self) -> int:
        """How many tokens one sequence can have in the cache when it is alone there."""

    @property
    def used_tokens(self) -> int:
        """Tokens of the cache that running sequences keep from being used otherwise."""

    def admit(self, sequence: Sequence) -> bool:
        """Give it blocks for all its tokens; `computed` and `cached` say how many of them were found. False: no room.

        At least its last token is left to be computed, because that is what yields the next one.
        """

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Room for `count` tokens more than are computed. False: there is none, and nothing was changed."""

    def computed(self, sequence: Sequence) -> None:
        """The tokens before `sequence.computed` are in the cache; whole units of them can be found from now on."""

    def release(self, sequence: Sequence) -> None:
        """It is done, cancelled or preempted. What it computed is found until its blocks are used again."""

    def discard(self, sequence: Sequence) -> None:
        """What it computed itself may be no numbers: nobody shall find it. Its release follows."""

    def take_copies(self) -> list[Copy]:
        """What the runner must copy, in this order, before the next step."""


class PagedBlocks:
    """Many small blocks a sequence, counted by reference: a prefix that is found is shared, never copied.

    Only whole blocks are shared, and those are never written again: one writer a block. A block that nobody holds
    keeps its contents in the line of free blocks, longest unused first; it is forgotten when it is taken.
    """

    def __init__(self, blocks: int, block_tokens: int, prefix: bool) -> None:
        if blocks < 1 or block_tokens < 1:
            raise ValueError("a paged cache needs at least one block of at least one token")
        self.finds_prefixes = prefix
        self.unit_tokens = block_tokens
        self.longest = blocks * block_tokens
        self._blocks = blocks
        self._holders = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._names: list[bytes | None] = [None] * blocks  # under which name the index knows a block
        self._index: dict[bytes, int] = {}
        self._findable: dict[Sequence, int] = {}  # how many blocks of a holder went through the index

    @property
    def used_tokens(self) -> int:
        """Blocks that somebody holds, in tokens; a shared block counts once."""
        return (self._blocks - len(self._free)) * self.unit_tokens

    def admit(self, sequence: Sequence) -> bool:
        """Leaves a free block for every running sequence: else the newcomer would be preempted at once."""
        found = self._find(sequence) if self.finds_prefixes else []
        new = -(-len(sequence.tokens) // self.unit_tokens) - len(found)
        unheld = sum(not self._holders[block] for block in found)
        if len(self._free) - unheld - new < len(self._findable):
            return False
        for block in found:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1
        sequence.blocks = found + [self._take() for _ in range(new)]
        sequence.computed = sequence.cached = len(found) * self.unit_tokens
        self._findable[sequence] = len(found)
        return True

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Takes the blocks that have been unused for longest."""
        missing = -((-sequence.computed - count) // self.unit_tokens) - len(sequence.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.blocks.append(self._take())
        return True

    def computed(self, sequence: Sequence) -> None:
        """Names each block that has become full, unless an equal one is known already."""
        full, findable = sequence.computed // self.unit_tokens, self._findable[sequence]
        if full == findable or not self.finds_prefixes:
            return
        _extend_chain(sequence, full, self.unit_tokens)
        for place in range(findable, full):
            name, block = sequence.chain[place], sequence.blocks[place]
            if self._index.setdefault(name, block) == block:
                self._names[block] = name
        self._findable[sequence] = full

    def release(self, sequence: Sequence) -> None:
        """The end of a prefix is used again before its beginning, without which it could not be found."""
        del self._findable[sequence]
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._names[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.blocks = []

    def discard(self, sequence: Sequence) -> None:
        """See KvBlocks; blocks that others hold as well were found, not computed."""
        for block in sequence.blocks:
            name = self._names[block]
            if name is not None and self._holders[block] == 1:
                del self._index[name]
                self._names[block] = None

    def take_copies(self) -> list[Copy]:
        """Nothing: sharing needs no copy."""
        return []

    def _find(self, sequence: Sequence) -> list[int]:
        most = (len(sequence.tokens) - 1) // self.unit_tokens
        _extend_chain(sequence, most, self.unit_tokens)
        found = []
        for name in sequence.chain[:most]:
            block = self._index.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        if (name := self._names[block]) is not None:
            del self._index[name]
            self._names[block] = None
        self._holders[block] = 1
        return block


class SlotBlocks:
    """One long block a sequence, a slot, so that attention reads it in one piece. A prefix elsewhere is copied.

    The lowest free slot is always the one that is taken, so that a batch lies in one piece, too. If it holds the
    prefix, that stays in place; else the prefix is copied into it, and what it held is first moved to the least
    recently used free slot of the last few. A copy costs less than a hundredth of computing the same tokens.
    """

    def __init__(self, slots: int, block_tokens: int, prefix: bool) -> None:
        if slots < 1 or block_tokens < 1:
            raise ValueError("a cache of slots needs at least one slot of at least one token")
        self.finds_prefixes = prefix
        self.unit_tokens = _UNIT_TOKENS
        self.longest = block_tokens
        self._slots = slots
        self._free = list(range(slots))  # a heap
        self._holder: list[Sequence | None] = [None] * slots
        self._names: list[list[bytes]] = [[] for _ in range(slots)]  # the units that lie in a slot, in order
        self._index: dict[bytes, dict[int, None]] = {}
        self._touched = [0] * slots
        self._touches = 0
        self._copies: list[Copy] = []

    @property
    def used_tokens(self) -> int:
        """Tokens of the sequences that hold a slot; the rest of a slot is nobody's."""
        return sum(holder.computed for holder in self._holder if holder is not None)

    def admit(self, sequence: Sequence) -> bool:
        """Takes the lowest free slot; whatever was found of the prefix is there before the next step."""
        if not self._free or len(sequence.tokens) > self.longest:
            return False
        target = heapq.heappop(self._free)
        self._holder[target] = sequence
        sequence.blocks = [target]
        units = self._settle(sequence, target) if self.finds_prefixes else 0
        sequence.computed = sequence.cached = units * self.unit_tokens
        return True

    def grow(self, sequence: Sequence, count: int) -> bool:
        """A slot has room for every length that the model serves."""
        return sequence.computed + count <= self.longest

    def computed(self, sequence: Sequence) -> None:
        """Names each unit that has become full."""
        if not self.finds_prefixes:
            return
        slot = sequence.blocks[0]
        names, full = self._names[slot], sequence.computed // self.unit_tokens
        if full > len(names):
            _extend_chain(sequence, full, self.unit_tokens)
            self._name(slot, sequence.chain[len(names) : full])

    def release(self, sequence: Sequence) -> None:
        """The slot keeps what it holds until it is taken again."""
        slot = sequence.blocks[0]
        self._holder[slot] = None
        heapq.heappush(self._free, slot)
        self._touch(slot)
        sequence.blocks = []

    def discard(self, sequence: Sequence) -> None:
        """See KvBlocks."""
        self._forget(sequence.blocks[0], 0)

    def take_copies(self) -> list[Copy]:
        """Sources are read before anything later in the list, or the next step, writes them."""
        copies, self._copies = self._copies, []
        return copies

    def _settle(self, sequence: Sequence, target: int) -> int:
        """Bring the longest known prefix into the target; how many units it has."""
        units, source = self._find(sequence, target)
        if len(self._names[target]) > (units if source == target else 0):
            self._keep(target, source)
        if source == target:
            self._forget(target, units)
            return units
        self._forget(target, 0)
        if source is not None:
            self._copies.append(Copy(source, target, units * self.unit_tokens))
            self._name(target, sequence.chain[:units])
            if units == len(self._names[source]):
                self._touched[source] = 0  # the target holds all of it now, and soon more
            else:
                self._touch(source)
        return units

    def _find(self, sequence: Sequence, preferred: int) -> tuple[int, int | None]:
        most = (len(sequence.tokens) - 1) // self.unit_tokens
        _extend_chain(sequence, most, self.unit_tokens)
        units, slots = 0, {}
        for name in sequence.chain[:most]:
            holding = self._index.get(name)
            if not holding:
                break
            units, slots = units + 1, holding
        return units, preferred if preferred in slots else next(iter(slots), None)

    def _keep(self, slot: int, source: int | None) -> None:
        """Move what a slot holds out of the way, unless it lies elsewhere too or everything kept is younger."""
        names = self._names[slot]
        if len(self._index[names[-1]]) > 1:
            return
        last = range(max(0, self._slots - _KEPT_SLOTS), self._slots)
        places = [place for place in last if self._holder[place] is None and place != source]
        place = min(places, key=self._touched.__getitem__, default=slot)
        if self._touched[place] < self._touched[slot]:
            self._copies.append(Copy(slot, place, len(names) * self.unit_tokens))
            self._forget(place, 0)
            self._name(place, names)
            self._touched[place] = self._touched[slot]

    def _touch(self, slot: int) -> None:
        self._touches += 1
        self._touched[slot] = self._touches

    def _name(self, slot: int, names: list[bytes]) -> None:
        for name in names:
            self._index.setdefault(name, {})[slot] = None
        self._names[slot] += names

    def _forget(self, slot: int, but: int) -> None:
        """All units of a slot but the first few."""
        names = self._names[slot]
        for name in names[but:]:
            holding = self._index[name]
            del holding[slot]
            if not holding:
                del self._index[name]
        del names[but:]


def _extend_chain(sequence: Sequence, units: int, unit_tokens: int) -> None:
    """Hash the sequence's first `units` units; what is hashed stays hashed, because tokens are only ever added."""
    chain = sequence.chain
    known = len(chain)
    if known >= units:
        return
    name = chain[-1] if chain else sha256(sequence.tenant.encode()).digest()
    tokens = array("q", sequence.tokens[known * unit_tokens : units * unit_tokens])
    raw, width = tokens.tobytes(), tokens.itemsize * unit_tokens
    for start in range(0, len(raw), width):
        name = sha256(name + raw[start : start + width]).digest()
        chain.append(name)
