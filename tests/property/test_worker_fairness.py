"""Two tenants that always wait get the same service, whatever their requests look like; and everybody gets some."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumeter_worker.engine.blocks import PagedBlocks, SlotBlocks
from gpumeter_worker.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT
from gpumeter_worker.engine.scheduler import Limits, Scheduler
from gpumeter_worker.engine.sequence import Sampling, Sequence
from rigs.thoroughness import examples

SEQUENCES = 4
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 30))  # of a prompt and of its answer
KINDS = st.lists(SIZES, min_size=1, max_size=4)  # a tenant's requests, over and over


class Backlog:
    """A scheduler whose tenants always have more waiting than can run; `served` is measured from outside."""

    def __init__(self, kinds: dict[str, list[tuple[int, int]]], mixed: int, pages: int) -> None:
        cache = PagedBlocks(pages, 16, prefix=False) if pages else SlotBlocks(SEQUENCES, 96, prefix=False)
        self.scheduler = Scheduler(Limits(SEQUENCES, 64, mixed), cache)
        self.kinds = kinds
        self.served = dict.fromkeys(kinds, 0)
        self.waiting = dict.fromkeys(kinds, 0)
        self.asked = dict.fromkeys(kinds, 0)
        self.ended = dict.fromkeys(kinds, 0)

    def refill(self, tenant: str) -> None:
        while self.waiting[tenant] <= SEQUENCES:
            prompt, wanted = self.kinds[tenant][self.asked[tenant] % len(self.kinds[tenant])]
            self.asked[tenant] += 1
            self.waiting[tenant] += 1
            self.scheduler.add(
                Sequence(f"{tenant}{self.asked[tenant]}", 0, tenant, [1] * prompt, prompt, Sampling(max_tokens=wanted))
            )

    def step(self) -> None:
        for work in self.scheduler.plan():
            sequence = work.sequence
            if not work.recompute and work.prefill:
                self.waiting[sequence.tenant] -= sequence.computed == 0
                self.served[sequence.tenant] += PROMPT_WEIGHT * work.count
            sequence.computed += work.count
            self.scheduler.computed(sequence)
            if work.samples:
                self.served[sequence.tenant] += OUTPUT_WEIGHT
                sequence.tokens.append(0)
                if sequence.generated == sequence.sampling.max_tokens:
                    self.scheduler.leave(sequence)
                    self.ended[sequence.tenant] += 1


@settings(max_examples=examples(60), deadline=None)
@given(KINDS, KINDS, st.sampled_from((0, 8, 32)), st.sampled_from((0, 12)))
def test_between_two_backlogged_tenants_service_differs_by_a_bounded_amount(
    one: list[tuple[int, int]], other: list[tuple[int, int]], mixed: int, pages: int
) -> None:
    backlog = Backlog({"one": one, "other": other}, mixed, pages)
    largest = max(PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * wanted for prompt, wanted in one + other)
    for _ in range(600):
        backlog.refill("one")
        backlog.refill("other")
        backlog.step()
        # VTC's bound: what all running sequences of one tenant may still be served, on either side.
        assert abs(backlog.served["one"] - backlog.served["other"]) <= 2 * SEQUENCES * largest


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(KINDS, min_size=2, max_size=6), st.sampled_from((0, 8, 32)), st.sampled_from((0, 12)))
def test_nobody_starves_however_much_the_others_ask_for(
    kinds: list[list[tuple[int, int]]], mixed: int, pages: int
) -> None:
    backlog = Backlog({str(number): kind for number, kind in enumerate(kinds)}, mixed, pages)
    for tenant in list(backlog.kinds)[1:]:
        backlog.refill(tenant)
    for _ in range(50):
        backlog.step()
        for tenant in list(backlog.kinds)[1:]:
            backlog.refill(tenant)
    backlog.refill("0")  # comes late, and the others never stop
    steps = 0
    while not backlog.ended["0"]:
        backlog.step()
        for tenant in list(backlog.kinds)[1:]:
            backlog.refill(tenant)
        steps += 1
        assert steps < 1000, "a tenant waits for ever"
