"""The engine with the real model in fp32 gives generate's greedy tokens: alone, mixed, found, chunked, preempted.

And whatever was found, shared or lost, each prompt's tokens are counted once.

GPUMETER_EQUALITY_PROMPTS says for how many prompts; `make bench-equality` asks for 200.
"""

import os
from collections.abc import Sequence as Row
from random import Random
from typing import Any

import pytest

from gpumeter_worker.engine.blocks import KvBlocks, PagedBlocks, SlotBlocks
from gpumeter_worker.engine.loop import Engine, Runner
from gpumeter_worker.engine.messages import Cancel, Ended, EngineOptions, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Finish, Sampling, Sequence
from gpumeter_worker.metering.clock import HostClock
from gpumeter_worker.metering.parts import Part
from rigs.worker import model_path

pytestmark = pytest.mark.shared

COUNT = int(os.environ.get("GPUMETER_EQUALITY_PROMPTS", "20"))
NEW_TOKENS = 8
MAX_MODEL_LEN = 512
EOS = frozenset({2})
BLOCKS = 160

SYSTEM = "You are a patient teacher who answers in one short sentence and never invents what you do not know."
SUBJECTS = (
    "the moon",
    "a bicycle",
    "Paris",
    "bread",
    "the number seven",
    "rain",
    "a violin",
    "chess",
    "honey",
    "glass",
)
ASKED = (
    "What is {}?",
    "Tell me a fact about {}.",
    "Who likes {} and why? Think of children, too.",
    "Describe {}, please.",
)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Half of them begin alike, so that there are prefixes to find; some are several times as long as others."""
    random = Random(7)
    found = []
    for number in range(count):
        question = " ".join(
            random.choice(ASKED).format(random.choice(SUBJECTS)) for _ in range(random.choice((1, 1, 2, 6)))
        )
        said = [{"role": "user", "content": f"{number}. {question}"}]
        found.append(([{"role": "system", "content": SYSTEM}] if number % 2 else []) + said)
    return found


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    return [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
        for one in conversations(COUNT)
    ]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What transformers says, one request at a time, by its own attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    made = (model.generate(torch.tensor([one]), max_new_tokens=NEW_TOKENS, do_sample=False)[0] for one in prompts)
    return [tokens[len(one) :].tolist() for tokens, one in zip(made, prompts, strict=True)]


@pytest.fixture(scope="module")
def slots() -> Runner:
    from gpumeter_worker.engine.model import ModelRunner

    return ModelRunner(EngineOptions(model_path(), "cpu", "float32", MAX_MODEL_LEN, 16, 128, 0, 1, 0))


@pytest.fixture(scope="module")
def paged() -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    from rigs.paged import PagedRunner

    yield PagedRunner(
        AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval(), 160, MAX_MODEL_LEN
    )


class ScarceSlots(SlotBlocks):
    """With every slot in use there is now and then no room for a sequence's next token, until somebody has gone."""

    def grow(self, sequence: Sequence, count: int) -> bool:
        return None in self._holder or bool(sequence.generated % 3)


class Scarce(PagedBlocks):
    """Where more than four sequences hold blocks there is now and then none for the next token, until somebody goes."""

    def grow(self, sequence: Sequence, count: int) -> bool:
        roomy = len(self._findable) <= 4 or bool(sequence.generated % 3)
        return roomy and super().grow(sequence, count)


def given(
    runner: Runner, blocks: KvBlocks, limits: Limits, prompts: Row[list[int]], at_once: int
) -> tuple[list[list[int]], list[Part]]:
    """Every prompt's tokens; `at_once` of them are in the engine together, and now and then one is cancelled beside."""
    engine = Engine(runner, HostClock(), limits, EOS, MAX_MODEL_LEN, blocks)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    parts: list[Part] = []
    coming = list(enumerate(prompts))
    turns = 0
    while coming or engine.busy:
        while coming and engine.waiting + engine.running < at_once:
            number, prompt = coming.pop(0)
            engine.submit(
                Submit(str(number), prompt, Sampling(NEW_TOKENS, temperature=0), tenant=f"t{number % 3 // 2}")
            )
            if at_once > 1 and number % 5 == 0:
                engine.submit(Submit(f"stray-{number}", prompt[:-3], Sampling(NEW_TOKENS, temperature=0)))
        for event in engine.turn():
            if isinstance(event, StepReport):
                parts += event.parts
                for token in event.tokens:
                    tokens.setdefault(token.session_id, []).append(token.token)
        turns += 1
        if at_once > 1 and turns % 4 == 0:
            engine.cancel(Cancel(f"stray-{turns // 4 * 5 % max(1, len(prompts))}"))
    return [tokens[str(number)] for number in range(len(prompts))], parts


def test_alone(slots: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    found, _ = given(slots, SlotBlocks(16, MAX_MODEL_LEN, prefix=False), Limits(16, 2048), prompts, at_once=1)
    assert found == expected


def test_mixed_with_chunks_and_with_prefixes_found_in_other_slots(
    slots: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    found, parts = given(slots, SlotBlocks(16, MAX_MODEL_LEN, prefix=True), Limits(16, 128, 24), prompts, at_once=14)
    assert found == expected
    assert sum(part.cached_tokens for part in parts) > 0
    assert any(part.prefill and part.new_tokens <= 24 and part.context_tokens for part in parts)


def test_mixed_on_shared_blocks_with_prefixes_and_preemptions(
    paged: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    found, parts = given(paged, Scarce(BLOCKS, 16, prefix=True), Limits(16, 128, 48), prompts, at_once=14)
    assert found == expected
    assert sum(part.cached_tokens for part in parts) > 0
    assert any(part.recompute for part in parts), "nobody was preempted"


FEW = slice(1, 8, 2)
"""Four that begin alike."""


def together(
    runner: Runner, blocks: SlotBlocks, prompts: Row[list[int]], answers: int = 1
) -> tuple[dict[tuple[str, int], list[int]], list[Part]]:
    """All at once in three slots, each prompt with several answers; the tokens by session and choice."""
    engine = Engine(runner, HostClock(), Limits(3, 48, 16), EOS, MAX_MODEL_LEN, blocks)
    for number, prompt in enumerate(prompts):
        for choice in range(answers):
            sampling = Sampling(NEW_TOKENS, temperature=0)
            engine.submit(Submit(str(number), prompt, sampling, choice, counts_prompt=choice == 0))
    tokens: dict[tuple[str, int], list[int]] = {}
    parts: list[Part] = []
    while engine.busy:
        for event in engine.turn():
            assert not (isinstance(event, Ended) and event.finish is Finish.FAILED)
            if isinstance(event, StepReport):
                parts += event.parts
                for token in event.tokens:
                    tokens.setdefault((token.session_id, token.choice), []).append(token.token)
    return tokens, parts


def test_prompts_that_begin_alike_compute_the_beginning_once(
    slots: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    blocks = SlotBlocks(3, MAX_MODEL_LEN, prefix=True)
    for again in range(2):  # one after the other, then the same again: other slots, other copies
        for number, (prompt, tokens) in enumerate(zip(prompts[FEW], expected[FEW], strict=True)):
            found, parts = together(slots, blocks, [prompt])
            assert found == {("0", 0): tokens}
            assert sum(part.cached_tokens for part in parts) >= 16 or (number == again == 0)
            assert sum(part.prompt_tokens for part in parts) == len(prompt)


def test_choices_that_share_a_prompt_get_the_same_tokens_and_count_it_once(
    slots: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    found, parts = together(slots, SlotBlocks(3, MAX_MODEL_LEN, prefix=True), prompts[FEW], answers=2)
    assert found == {(str(n), choice): tokens for n, tokens in enumerate(expected[FEW]) for choice in range(2)}
    assert sum(part.prompt_tokens for part in parts) == sum(map(len, prompts[FEW]))


@pytest.mark.parametrize("prefix", [False, True])
def test_what_preemptions_lost_in_slots_is_computed_again_and_counted_once(
    slots: Any, prompts: list[list[int]], expected: list[list[int]], prefix: bool
) -> None:
    found, parts = together(slots, ScarceSlots(3, MAX_MODEL_LEN, prefix), prompts[FEW])
    assert found == {(str(n), 0): tokens for n, tokens in enumerate(expected[FEW])}
    again = [part for part in parts if part.recompute]
    assert again, "nothing was preempted"
    assert not any(part.prompt_tokens or part.sampled for part in again)
    assert sum(part.prompt_tokens for part in parts) == sum(map(len, prompts[FEW]))
