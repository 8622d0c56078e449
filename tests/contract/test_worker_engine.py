"""The engine with the real model in fp32 gives the tokens of transformers' own `generate`, however it is batched."""

from collections.abc import Callable, Sequence

import pytest

from gpumeter_worker.engine.loop import Engine
from gpumeter_worker.engine.messages import Cancel, Ended, EngineOptions, Event, StepReport, Submit
from gpumeter_worker.engine.scheduler import Limits
from gpumeter_worker.engine.sequence import Sampling
from gpumeter_worker.metering.clock import HostClock
from rigs.worker import model_path

pytestmark = pytest.mark.shared

QUESTIONS = (
    "What is the capital of France?",
    "Count to ten.",
    "Why is the sky blue? " * 7,
    "Write a short poem about the rain in spring.",
    "Name three primary colours. " * 12,
    "Hi",
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def runner() -> object:
    from gpumeter_worker.engine.model import ModelRunner

    options = EngineOptions(
        model_path=model_path(),
        device="cpu",
        dtype="float32",
        max_model_len=512,
        max_batch_size=4,
        max_batch_tokens=64,
        max_wait_ms=0,
        threads=1,
        memory_bytes=0,
    )
    return ModelRunner(options)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What transformers says, one request at a time, by its own attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def new_engine(runner: object, slots: int, step_tokens: int) -> Engine:
    return Engine(runner, HostClock(), Limits(slots, step_tokens), frozenset({2}), 512)  # type: ignore[arg-type]


def run(engine: Engine, submits: Sequence[Submit], between: Callable[[int], None] = lambda turn: None) -> list[Event]:
    events: list[Event] = []
    for submit in submits:
        engine.submit(submit)
    turn = 0
    while engine.busy:
        events += engine.turn()
        turn += 1
        between(turn)
    return events


def tokens_of(events: Sequence[Event]) -> dict[str, list[int]]:
    given: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, StepReport):
            for token in event.tokens:
                given.setdefault(token.session_id, []).append(token.token)
    return given


def greedy(number: int, prompt: list[int]) -> Submit:
    return Submit(str(number), prompt, Sampling(max_tokens=NEW_TOKENS, temperature=0))


def test_alone_a_request_gets_generates_tokens(
    runner: object, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    for number, prompt in enumerate(prompts):
        events = run(new_engine(runner, 1, 512), [greedy(number, prompt)])
        assert tokens_of(events)[str(number)] == expected[number]


@pytest.mark.parametrize(("slots", "step_tokens"), [(4, 64), (4, 7), (3, 33)])
def test_in_mixed_batches_with_forced_chunks_every_request_gets_generates_tokens(
    runner: object, prompts: list[list[int]], expected: list[list[int]], slots: int, step_tokens: int
) -> None:
    engine = new_engine(runner, slots, step_tokens)
    late = list(enumerate(prompts))[3:]

    def one_more(turn: int) -> None:
        if turn % 3 == 0 and late:
            engine.submit(greedy(*late.pop(0)))

    events = run(engine, [greedy(*one) for one in list(enumerate(prompts))[:3]], one_more)
    assert tokens_of(events) == {str(number): tokens for number, tokens in enumerate(expected)}
    mixed = [event for event in events if isinstance(event, StepReport) and len({p.prefill for p in event.parts}) == 2]
    assert mixed, "no step held both a prompt's chunk and a decode"


def test_a_cancelled_neighbour_and_a_slot_used_again_change_no_token(
    runner: object, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = new_engine(runner, 2, 64)

    def cancel(turn: int) -> None:
        if turn == 4:
            engine.cancel(Cancel("0"))

    events = run(engine, [greedy(number, prompts[number]) for number in (0, 2, 3)], cancel)
    given = tokens_of(events)
    assert given["2"] == expected[2]
    assert given["3"] == expected[3]
    assert given["0"] == expected[0][: len(given["0"])]
    assert {event.session_id for event in events if isinstance(event, Ended)} == {"0", "2", "3"}


def test_the_same_seed_draws_the_same_tokens_alone_and_in_company(runner: object, prompts: list[list[int]]) -> None:
    def drawn(number: int) -> Submit:
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=1.2, top_p=0.9, top_k=50, seed=number)
        return Submit(str(number), prompts[number], sampling)

    alone = {str(n): tokens_of(run(new_engine(runner, 1, 512), [drawn(n)]))[str(n)] for n in range(4)}
    together = tokens_of(run(new_engine(runner, 4, 33), [drawn(n) for n in range(4)]))
    assert together == alone
