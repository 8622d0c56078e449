"""What is found in the cache, copied, or lost and computed again changes no token: the real model in fp32."""

from collections.abc import Sequence as Row

import pytest

from gpumeter_worker.engine.blocks import SlotBlocks
from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Ended, EngineOptions, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Finish, Sampling, Sequence
from gpumeter_worker.metering.clock import HostClock
from gpumeter_worker.metering.meter import Part
from rigs.worker import model_path

NEW_TOKENS = 8
SLOTS = 3
LONGEST = 256
COMMON = "You are a patient teacher of geography who answers in one short sentence and never guesses. " * 2
QUESTIONS = ("What is the capital of France?", "Name a river in Egypt.", "Where is Peru?", "How high is Mont Blanc?")


@pytest.fixture(scope="module")
def runner() -> object:
    from gpumeter_worker.engine.model import ModelRunner

    return ModelRunner(
        EngineOptions(
            model_path=model_path(),
            device="cpu",
            dtype="float32",
            max_model_len=LONGEST,
            max_batch_size=SLOTS,
            max_batch_tokens=64,
            max_wait_ms=0,
            threads=2,
            memory_bytes=0,
        )
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": COMMON}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    made = [model.generate(torch.tensor([one]), max_new_tokens=NEW_TOKENS, do_sample=False) for one in prompts]
    return [one[0, len(prompt) :].tolist() for one, prompt in zip(made, prompts, strict=True)]


class Scarce(SlotBlocks):
    """With every slot in use there is now and then no room for a sequence's next token, until somebody has gone."""

    def grow(self, sequence: Sequence, count: int) -> bool:
        return None in self._holder or bool(sequence.generated % 3)


def run(runner: object, blocks: SlotBlocks, submits: Row[Submit]) -> list[Event]:
    engine = Engine(runner, HostClock(), Limits(SLOTS, 48, 16), frozenset({2}), LONGEST, blocks)  # type: ignore[arg-type]
    for submit in submits:
        engine.submit(submit)
    events: list[Event] = []
    while engine.busy:
        events += engine.turn()
    assert all(event.finish is not Finish.FAILED for event in events if isinstance(event, Ended))
    return events


def asked(prompts: list[list[int]], answers: int = 1) -> list[Submit]:
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0)
    return [
        Submit(str(number), prompt, sampling, choice, counts_prompt=choice == 0)
        for number, prompt in enumerate(prompts)
        for choice in range(answers)
    ]


def tokens_of(events: Row[Event]) -> dict[tuple[str, int], list[int]]:
    given: dict[tuple[str, int], list[int]] = {}
    for event in events:
        if isinstance(event, StepReport):
            for token in event.tokens:
                given.setdefault((token.session_id, token.choice), []).append(token.token)
    return given


def parts_of(events: Row[Event]) -> list[Part]:
    return [part for event in events if isinstance(event, StepReport) for part in event.parts]


def test_prompts_that_begin_alike_compute_the_beginning_once(
    runner: object, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    blocks = SlotBlocks(SLOTS, LONGEST, prefix=True)
    for again in range(2):  # one after the other, then the same again: other slots, other copies
        for number, prompt in enumerate(prompts):
            events = run(runner, blocks, asked([prompt]))
            assert tokens_of(events) == {("0", 0): expected[number]}
            cached = sum(part.cached_tokens for part in parts_of(events))
            assert cached >= 32 or (number == again == 0)
            assert sum(part.prompt_tokens for part in parts_of(events)) == len(prompt)


def test_choices_that_share_a_prompt_get_generates_tokens(
    runner: object, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    events = run(runner, SlotBlocks(SLOTS, LONGEST, prefix=True), asked(prompts, answers=2))
    assert tokens_of(events) == {(str(n), choice): expected[n] for n in range(len(prompts)) for choice in range(2)}
    assert sum(part.prompt_tokens for part in parts_of(events)) == sum(map(len, prompts))


@pytest.mark.parametrize("prefix", [False, True])
def test_what_preemptions_lost_is_computed_again_and_changes_no_token(
    runner: object, prompts: list[list[int]], expected: list[list[int]], prefix: bool
) -> None:
    events = run(runner, Scarce(SLOTS, LONGEST, prefix), asked(prompts))
    assert tokens_of(events) == {(str(n), 0): tokens for n, tokens in enumerate(expected)}
    again = [part for part in parts_of(events) if part.recompute]
    assert again, "nothing was preempted"
    assert not any(part.prompt_tokens or part.sampled for part in again)
    assert sum(part.prompt_tokens for part in parts_of(events)) == sum(map(len, prompts))
