"""The layout of one packed step over a paged cache: every number that the device must be told, in one buffer.

Owns which number stands where, so that a step costs one copy to the device and a CUDA graph finds its inputs where it
was captured with them. Pure: knows no torch, no device and no model.

A step of decodes may be laid out in a frame that is larger than it, a bucket: its padding rows are sequences of length
0 that write to the spare block and attend to nothing.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from gpumeter_worker.engine.scheduler import Work

BLOCK_TOKENS = 16
_ALIGN = 16
"""Fields start at multiples of 64 bytes: kernels are compiled anew for pointers of another alignment."""

_SPARED_MIN = 16_384
"""So many numbers of a table, 64 KiB, take about as long to fill and send as the two copies on the device do."""

_MAX_SPLITS = 32


@dataclass(frozen=True)
class Frame:
    """The sizes of a step's fields, all of int32.

    `rows` tokens of `sequences`, whose tables have `width` blocks; `programs` kernel programs of at most `block_q` rows
    of one sequence each; `samples` rows whose logits are wanted, 0 for all of them.
    """

    rows: int
    sequences: int
    programs: int
    width: int
    samples: int
    block_q: int

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Where each field stands: its first number and its length."""
        lengths = {
            "tokens": self.rows,
            "positions": self.rows,
            "slots": self.rows,
            "lengths": self.sequences,
            "query_start": self.sequences + 1,
            "program_sequence": self.programs,
            "program_first": self.programs,
            "keep": self.samples,
            "table": self.sequences * self.width,
        }
        places, start = {}, 0
        for name, length in lengths.items():
            places[name] = (start, length)
            start += -(-length // _ALIGN) * _ALIGN
        return places

    @cached_property
    def size(self) -> int:
        """How many numbers the buffer holds."""
        start, length = self.fields["table"]
        return max(1, start + length)


def only_decodes(rows: Sequence[Work]) -> bool:
    """Whether a step is one token of every sequence in it, with every row's logits wanted: what a graph can replay."""
    return all(work.count == 1 and work.samples for work in rows)


def frame(rows: Sequence[Work], block_q: int) -> Frame:
    """The frame that fits a step exactly, but for its tables' width: whole cache lines of it."""
    if all(work.count == 1 for work in rows):
        block_q = 1
    return Frame(
        rows=sum(work.count for work in rows),
        sequences=len(rows),
        programs=sum(-(-work.count // block_q) for work in rows),
        width=_width(max(work.sequence.computed + work.count for work in rows)),
        samples=sum(work.samples for work in rows),
        block_q=block_q,
    )


def bucket_frame(sequences: int, max_model_len: int) -> Frame:
    """The frame of a graph for up to so many decodes of any length."""
    width = _width(max_model_len)
    return Frame(rows=sequences, sequences=sequences, programs=sequences, width=width, samples=0, block_q=1)


def narrowed(into: Frame, rows: Sequence[Work]) -> Frame:
    """A bucket's frame with tables as wide as a step's longest sequence needs, or as it is where that spares little.

    All other fields stand where they stood. What lies beyond in a table on the device is of former steps, and nobody
    reads it: attention goes as far as a sequence's length.
    """
    width = _width(max(work.sequence.computed + work.count for work in rows))
    return replace(into, width=width) if (into.width - width) * into.sequences >= _SPARED_MIN else into


def _width(tokens: int) -> int:
    """How many blocks a table has for so many tokens: whole cache lines of it."""
    return -(-blocks_for(tokens) // _ALIGN) * _ALIGN


def lay_out(rows: Sequence[Work], into: Frame, spare: int) -> "array[int]":
    """Fill a frame with a step. `spare` is the block that padding writes to; no sequence holds it.

    Raises ValueError when the step does not fit into the frame.
    """
    numbers = array("i", bytes(4 * into.size))
    tokens, positions, slots, lengths = array("i"), array("i"), array("i"), array("i")
    query_start, program_sequence, program_first, keep = array("i", [0]), array("i"), array("i"), array("i")
    table_start, _ = into.fields["table"]
    for index, work in enumerate(rows):
        sequence, start = work.sequence, work.sequence.computed
        end = start + work.count
        held = blocks_for(end)
        if held > into.width or index >= into.sequences or held > len(sequence.blocks):
            raise ValueError(f"a sequence of {end} tokens in {len(sequence.blocks)} blocks does not fit into {into}")
        tokens.extend(sequence.tokens[start:end])
        positions.extend(range(start, end))
        for position in range(start, end):
            slots.append(sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
        lengths.append(end)
        query_start.append(query_start[-1] + work.count)
        for first in range(0, work.count, into.block_q):
            program_sequence.append(index)
            program_first.append(first)
        if work.samples:
            keep.append(query_start[-1] - 1)
        row = table_start + index * into.width
        numbers[row : row + held] = array("i", sequence.blocks[:held])
    padding = into.sequences - len(rows)
    if padding and into.block_q != 1:
        raise ValueError("only a frame of decodes has room for padding rows")
    for index in range(len(rows), into.sequences):
        tokens.append(0)
        positions.append(0)
        slots.append(spare * BLOCK_TOKENS)
        lengths.append(0)
        query_start.append(query_start[-1] + 1)
        program_sequence.append(index)
        program_first.append(0)
    if not into.samples:
        keep = array("i")
    filled = {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "lengths": lengths,
        "query_start": query_start,
        "program_sequence": program_sequence,
        "program_first": program_first,
        "keep": keep,
    }
    for name, values in filled.items():
        start, length = into.fields[name]
        if len(values) != length:
            raise ValueError(f"{len(values)} {name} do not fit into {into}")
        numbers[start : start + length] = values
    return numbers


def blocks_for(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def splits_for(programs: int, kv_heads: int, longest: int, multiprocessors: int) -> int:
    """Into how many parts each program is split along the keys, so that every multiprocessor has work for two.

    A part is at least 256 keys: joining parts costs more than a shorter one saves. A power of two.
    """
    wanted = 2 * multiprocessors // max(1, programs * kv_heads)
    splits = 1
    while splits * 2 <= min(wanted, longest // 256, _MAX_SPLITS):
        splits *= 2
    return splits
