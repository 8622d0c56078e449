"""Any schedule of requests, cancels and steps: tokens, cache, counts and ends stay right, in slots and in pages.

The device writes down what lies in the cache, and every step checks all that it reads (rigs.cache): a block shared,
copied, evicted or preempted wrongly fails there. What a client must get is known beforehand.
"""

from collections import Counter
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gpumeter_worker.engine.blocks import KvBlocks, PagedBlocks, SlotBlocks
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Cancel, Ended, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Finish, Sampling, Sequence
from rigs.cache import RecordingCache, next_token
from rigs.thoroughness import examples

EOS = 49
LONGEST = 96
BACKLOG_STEPS = 32
"""With more prompts than running streams can bear, their backlog is still worked off in about so many steps."""

PROMPTS = st.builds(
    lambda family, shared, own: [100 * family + place for place in range(shared)] + own,
    st.integers(1, 2),
    st.integers(1, 50),
    st.lists(st.integers(0, 2), max_size=20),
)


class Schedules(RuleBasedStateMachine):
    """`asked` and `given` are what the clients know; `counted` is what the bill is made of."""

    paged: ClassVar[bool]

    @initialize(
        prefix=st.booleans(),
        sequences=st.integers(1, 5),
        extra=st.integers(0, 40),
        mixed=st.sampled_from((0, 1, 7, 20)),
        unit=st.sampled_from((1, 4, 16)),
        spare=st.integers(0, 30),
    )
    def start(  # noqa: PLR0917
        self, prefix: bool, sequences: int, extra: int, mixed: int, unit: int, spare: int
    ) -> None:
        self.blocks: KvBlocks
        if self.paged:  # little more room than one sequence needs, so that preemptions are common
            self.blocks = PagedBlocks(LONGEST // unit + spare, unit, prefix)
        else:
            self.blocks = SlotBlocks(sequences, LONGEST, prefix)
        self.limits = Limits(sequences, sequences + extra, mixed)
        self.device = RecordingCache(unit if self.paged else LONGEST)
        self.engine = Engine(self.device, self.device, self.limits, frozenset({EOS}), LONGEST, self.blocks)
        self.asked: dict[tuple[str, int], Submit] = {}
        self.given: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], Finish] = {}
        self.cancelled: set[tuple[str, int]] = set()
        self.counted: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.computed: dict[tuple[str, int], Counter[int]] = {}
        self.decoding: set[tuple[str, int]] = set()
        self.stepped: set[tuple[str, int]] = set()
        self.sound = True

    @rule(tenant=st.sampled_from("ab"), prompt=PROMPTS, answers=st.integers(1, 3), wanted=st.integers(1, 20))
    def submit(self, tenant: str, prompt: list[int], answers: int, wanted: int) -> None:
        name = f"s{len(self.asked)}"
        for choice in range(answers):
            command = Submit(
                name, prompt, Sampling(max_tokens=wanted, temperature=0), choice, tenant, counts_prompt=choice == 0
            )
            self.asked[name, choice] = command
            self.given[name, choice] = []
            self.computed[name, choice] = Counter()
            self.engine.submit(command)

    @rule(data=st.data(), whole=st.booleans())
    def cancel(self, data: st.DataObject, whole: bool) -> None:
        alive = sorted(self.asked.keys() - self.ended.keys() - self.cancelled)
        if not alive:
            return
        name, choice = data.draw(st.sampled_from(alive))
        self.cancelled |= {key for key in alive if key[0] == name and (whole or key[1] == choice)}
        self.engine.cancel(Cancel(name, None if whole else choice))

    @rule(turns=st.integers(1, 6))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self._turn()

    @rule()
    def a_step_runs_out_of_memory(self) -> None:
        self.device.out_of_memory = self.engine.stepping
        self._turn()

    def _turn(self) -> None:
        self.sound = False
        stepping, steps, short = self.engine.stepping, len(self.device.steps), self.device.out_of_memory
        try:
            events = self.engine.turn()
        except MemoryError:
            events = self.engine.shed("no memory")
            assert any(isinstance(event, Ended) for event in events), "what was too much must become less"
        ran = self.device.steps[steps:]
        assert bool(ran) == (stepping and not short), "with something to do every turn is a step"
        if ran:
            self._check_step()
        for event in events:
            if isinstance(event, StepReport):
                self._book(event)
            elif isinstance(event, Ended):
                key = event.session_id, event.choice
                assert key not in self.ended, "a sequence ends once"
                assert short or event.finish is not Finish.FAILED
                self.ended[key] = event.finish
        assert self.engine.stepping or not self.blocks.used_tokens, "a block is held by nobody"
        self.sound = True

    def _check_step(self) -> None:
        step = self.device.steps[-1]
        keys = [(row.session_id, row.choice) for row in step]
        assert len(set(keys)) == len(keys) <= self.limits.sequences
        assert not self.cancelled & set(keys), "a cancelled sequence is in a step"
        assert not self.ended.keys() & set(keys), "a sequence that has ended is in a step"
        assert sum(row.count for row in step) <= self.limits.step_tokens
        decodes = [row for row in step if not row.prefill]
        assert step[: len(decodes)] == decodes, "decodes come first"
        assert all(row.count == 1 and row.samples for row in decodes)
        streams = [row for row in decodes if (row.session_id, row.choice) in self.decoding]
        if streams and self.limits.mixed_prefill_tokens:
            alive = self.asked.keys() - self.ended.keys() - self.cancelled
            backlog = sum(len(self.asked[key].prompt) + len(self.given[key]) for key in alive)
            prompts = sum(row.count for row in step if row.prefill)
            first_tokens = len([key for key in alive if key not in self.decoding])
            enough = max(self.limits.mixed_prefill_tokens, backlog // BACKLOG_STEPS)
            assert prompts <= enough or first_tokens > len(streams)
        missing = self.decoding - set(keys) - self.cancelled - self.ended.keys()
        assert not missing or self.paged, "a stream was left out of a step"
        order = list(self.asked)
        if (
            oldest := min(self.stepped - self.cancelled - self.ended.keys(), key=order.index, default=None)
        ) is not None:
            assert oldest in keys, "the oldest sequence was preempted"
        self.stepped = set(keys)
        self.decoding = {(row.session_id, row.choice) for row in step if row.samples}
        for row in step:
            places = range(row.start, row.start + row.count)
            before = self.computed[row.session_id, row.choice]
            if row.recompute:
                assert not row.samples
                assert all(place < max(before) + 1 for place in places), "recompute of what was never there"
            else:
                assert not any(before[place] for place in places), "a token was computed twice at the tenant's cost"
                before.update(places)

    def _book(self, report: StepReport) -> None:
        assert report.kv_tokens <= max(self.blocks.longest, self.limits.sequences * LONGEST)
        for part in report.parts:
            assert part.cached_tokens <= part.prompt_tokens
            assert not part.recompute or not part.prompt_tokens
            self.counted[part.session_id] += part.prompt_tokens
            self.cached[part.session_id] += part.cached_tokens
            prompt = len(self.asked[part.session_id, 0].prompt)
            assert self.counted[part.session_id] <= prompt
            assert self.cached[part.session_id] < prompt, "the last token of a prompt is always computed"
        for token in report.tokens:
            key = token.session_id, token.choice
            assert token.token == next_token(self.asked[key].prompt + self.given[key])
            self.given[key].append(token.token)

    def teardown(self) -> None:
        if not getattr(self, "sound", False):
            return
        for _ in range(5000):
            if not self.engine.busy:
                break
            self._turn()
        assert not self.engine.busy, "the engine does not come to an end"
        assert self.ended.keys() == self.asked.keys()
        for key, command in self.asked.items():
            given, prompt = self.given[key], len(command.prompt)
            if self.ended[key] is Finish.STOP:
                assert given[-1] == EOS
            elif self.ended[key] is Finish.LENGTH:
                assert len(given) == command.sampling.max_tokens or prompt + len(given) == LONGEST
            elif self.ended[key] is Finish.CANCELLED:
                assert key in self.cancelled
            if given:
                assert self.counted[key[0]] == prompt, "a prompt is counted once, whoever computed it"
        if not self.blocks.finds_prefixes:
            assert not any(self.cached.values())
        # Nothing leaked: one sequence can have the whole cache.
        everything = [200 + place for place in range(self.blocks.longest)]
        last = Sequence("last", 0, "c", everything, len(everything), Sampling(max_tokens=1))
        assert self.blocks.admit(last)
        assert not last.cached


class InSlots(Schedules):
    """One slot a sequence."""

    paged = False


class InPages(Schedules):
    """Many shared blocks a sequence."""

    paged = True


_SETTINGS = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestInSlots = InSlots.TestCase
TestInSlots.settings = _SETTINGS
TestInPages = InPages.TestCase
TestInPages.settings = _SETTINGS
