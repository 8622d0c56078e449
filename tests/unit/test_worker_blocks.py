"""The cache's blocks, shared by prefix: pages and slots behind one port."""

from collections.abc import Callable

import pytest

from gpumeter_worker.engine.blocks import Copy, KvBlocks, PagedBlocks, SlotBlocks
from gpumeter_worker.engine.sequence import Sampling, Sequence

CACHES: tuple[Callable[[bool], KvBlocks], ...] = (
    lambda prefix: PagedBlocks(20, 16, prefix),
    lambda prefix: SlotBlocks(4, 160, prefix),
)


def sequence(tokens: list[int], tenant: str = "acme") -> Sequence:
    return Sequence("s", 0, tenant, tokens, len(tokens), Sampling(max_tokens=9))


def compute(blocks: KvBlocks, one: Sequence, until: int | None = None) -> None:
    one.computed = len(one.tokens) if until is None else until
    blocks.computed(one)


def admitted(blocks: KvBlocks, tokens: list[int], tenant: str = "acme") -> Sequence:
    one = sequence(tokens, tenant)
    assert blocks.admit(one)
    return one


def counting(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_finds_the_whole_units_that_another_one_computed(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    compute(blocks, admitted(blocks, counting(40)))
    found = admitted(blocks, counting(36) + [7] * 10)
    assert (found.computed, found.cached) == (32, 32)


@pytest.mark.parametrize("cache", CACHES)
def test_the_last_token_of_a_prompt_is_computed_even_if_all_of_it_is_known(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    compute(blocks, admitted(blocks, counting(32)))
    assert admitted(blocks, counting(32)).cached == 16


@pytest.mark.parametrize("cache", CACHES)
def test_only_what_is_computed_is_found(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    compute(blocks, admitted(blocks, counting(48)), until=20)
    assert admitted(blocks, counting(48)).cached == 16


@pytest.mark.parametrize("cache", CACHES)
def test_another_tenant_finds_nothing(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    compute(blocks, admitted(blocks, counting(40)))
    assert admitted(blocks, counting(40), tenant="rival").cached == 0


@pytest.mark.parametrize("cache", CACHES)
def test_the_same_tokens_after_others_are_another_prefix(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    compute(blocks, admitted(blocks, counting(48)))
    assert admitted(blocks, [99] * 16 + counting(48)[16:]).cached == 0


@pytest.mark.parametrize("cache", CACHES)
def test_without_a_prefix_cache_nothing_is_found(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(False)
    first = admitted(blocks, counting(40))
    compute(blocks, first)
    blocks.release(first)
    assert admitted(blocks, counting(40)).cached == 0
    assert not blocks.take_copies()


@pytest.mark.parametrize("cache", CACHES)
def test_what_has_ended_is_still_found_with_the_answer_it_was_given(cache: Callable[[bool], KvBlocks]) -> None:
    blocks = cache(True)
    first = admitted(blocks, counting(20))
    compute(blocks, first)
    first.tokens += [5] * 30
    assert blocks.grow(first, 30)
    compute(blocks, first, until=49)
    blocks.release(first)
    assert blocks.used_tokens == 0
    assert admitted(blocks, first.tokens + [6] * 8).cached == 48


def test_pages_are_shared_and_stay_until_the_last_holder_has_left() -> None:
    blocks = PagedBlocks(8, 16, prefix=True)
    first = admitted(blocks, counting(40))
    compute(blocks, first)
    second = admitted(blocks, counting(40))
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]  # not full, so not shared
    assert blocks.used_tokens == 4 * 16
    blocks.release(first)
    assert blocks.used_tokens == 3 * 16
    newcomer = admitted(blocks, [9] * 60)
    assert not set(newcomer.blocks) & set(second.blocks)


def test_pages_that_nobody_holds_are_forgotten_longest_unused_first_and_from_the_end() -> None:
    blocks = PagedBlocks(6, 16, prefix=True)
    for start in (0, 100):
        one = admitted(blocks, [start + place for place in range(48)])
        compute(blocks, one)
        blocks.release(one)
    other = admitted(blocks, [500] * 16)
    compute(blocks, other)
    blocks.release(other)
    older, younger = admitted(blocks, counting(48)), sequence([100 + place for place in range(60)])
    assert older.cached == 32
    blocks.release(older)
    assert blocks.admit(younger)
    assert younger.cached == 32  # its last block had to go for the older one's


def test_a_page_without_a_whole_unit_is_used_before_one_that_can_be_found() -> None:
    blocks = PagedBlocks(2, 16, prefix=True)
    whole = admitted(blocks, counting(16))
    compute(blocks, whole)
    blocks.release(whole)
    for _ in range(3):
        blocks.release(admitted(blocks, [7] * 4))
    assert admitted(blocks, counting(17)).cached == 16


def test_a_newcomer_leaves_a_page_for_each_that_runs() -> None:
    blocks = PagedBlocks(6, 16, prefix=False)
    for _ in range(2):
        admitted(blocks, [1] * 16)
    assert not blocks.admit(sequence([2] * 48))
    assert blocks.admit(sequence([2] * 32))


def test_refused_growth_changes_nothing() -> None:
    blocks = PagedBlocks(3, 16, prefix=True)
    one = admitted(blocks, counting(16))
    compute(blocks, one)
    assert not blocks.grow(one, 33)
    assert len(one.blocks) == 1
    assert blocks.grow(one, 32)
    assert len(one.blocks) == 3


def test_a_sequence_takes_the_lowest_free_slot() -> None:
    blocks = SlotBlocks(3, 64, prefix=True)
    held = [admitted(blocks, [number] * 20) for number in range(3)]
    assert [one.blocks for one in held] == [[0], [1], [2]]
    assert not blocks.admit(sequence([9] * 4))
    blocks.release(held[2])
    blocks.release(held[0])
    assert admitted(blocks, [9] * 20).blocks == [0]


def test_a_prefix_in_another_slot_is_copied() -> None:
    blocks = SlotBlocks(3, 64, prefix=True)
    compute(blocks, admitted(blocks, counting(40)))
    found = admitted(blocks, counting(40))
    assert blocks.take_copies() == [Copy(0, 1, 32)]
    assert found.blocks == [1]
    assert not blocks.take_copies()


def test_a_prefix_in_the_slot_that_is_taken_stays_where_it_is() -> None:
    blocks = SlotBlocks(3, 64, prefix=True)
    first = admitted(blocks, counting(40))
    compute(blocks, first)
    blocks.release(first)
    again = admitted(blocks, counting(32) + [7] * 8)
    assert (again.blocks, again.cached) == ([0], 32)
    assert not blocks.take_copies()


def test_conversations_that_take_turns_find_their_beginnings_again() -> None:
    blocks = SlotBlocks(8, 160, prefix=True)
    talks = [[100 * number + place for place in range(32)] for number in range(5)]
    for turn in range(3):
        for number, talk in enumerate(talks):
            one = admitted(blocks, list(talk))
            blocks.take_copies()
            assert one.blocks == [0], "a single sequence lies in the first slot"
            assert one.cached == 32 * turn, f"talk {number}, turn {turn}"
            compute(blocks, one)
            blocks.release(one)
            talk.extend([turn] * 32)


def test_what_a_slot_held_is_kept_before_it_is_written_and_read_before_that_is() -> None:
    blocks = SlotBlocks(2, 160, prefix=True)
    for start in (0, 100):
        one = admitted(blocks, [start + place for place in range(40)])
        compute(blocks, one)
        blocks.release(one)
    blocks.take_copies()
    back = admitted(blocks, counting(40))  # was moved to slot 1, and slot 0 holds the other one
    assert back.cached == 32
    assert blocks.take_copies() == [Copy(1, 0, 32)]


def test_a_prompt_longer_than_a_slot_is_not_admitted() -> None:
    assert not SlotBlocks(2, 64, prefix=True).admit(sequence(counting(65)))


@pytest.mark.parametrize("make", [lambda: PagedBlocks(0, 16, True), lambda: SlotBlocks(0, 16, True)])
def test_a_cache_of_nothing_is_refused(make: Callable[[], KvBlocks]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        make()
