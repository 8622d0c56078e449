"""What becomes of a session's tokens: whose text, in which order, with which log probabilities, who is taken back."""

import asyncio
import json
import time
from typing import Any

import pytest

from gpumeter_usage.record import Status
from gpumeter_worker.api.answer import Answer, ChoiceText, Piece, send_whole, taken, while_connected
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.generate import BatchAnswer
from gpumeter_worker.api.keeping import KEPT_BY_ALL_MAX, KEPT_ENTRIES_MAX, Keeping
from gpumeter_worker.api.logprobs import LEAST, Placed, chat_logprobs, completion_logprobs
from gpumeter_worker.api.requests import GenerateRequest
from gpumeter_worker.api.responses import CHAT, COMPLETION, Shape, Wanted, WholeAnswer
from gpumeter_worker.api.sessions import Choice, End, Finished, Session
from gpumeter_worker.api.tokenizer import Tokenizer, TokenText
from gpumeter_worker.engine.messages import Token
from gpumeter_worker.engine.sequence import Finish, Sampling
from gpumeter_worker.metering.running import Totals
from rigs.worker import model_path

EOS = 0


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Desk:
    """Stands where the worker stands: notes what was taken back."""

    def __init__(self) -> None:
        self.keeping = Keeping()
        self.taken: list[tuple[Status, int | None]] = []
        self.cut: list[Refused] = []
        self.was_cut = asyncio.Event()

    def cut_off(self, session: Session, why: Refused) -> None:
        self.cut.append(why)
        self.was_cut.set()

    def take_back(self, session: Session, outcome: Status, index: int | None = None) -> None:
        self.taken.append((outcome, index))


def answer(samplings: list[Sampling], stops: tuple[str, ...] = ()) -> tuple[Answer, Desk]:
    choices = [Choice([65], sampling) for sampling in samplings]
    session, desk = Session("s-1", "acme", choices), Desk()
    texts = [ChoiceText(Bytes(), choice, stops, frozenset({EOS})) for choice in choices]  # type: ignore[arg-type]
    return Answer(desk, session, Bytes(), texts), desk  # type: ignore[arg-type]


def keeping(sampling: Sampling) -> ChoiceText:
    return ChoiceText(Bytes(), Choice([65], sampling), (), frozenset({EOS}), keeps=True)  # type: ignore[arg-type]


def token(choice: int, value: int, logprob: float | None = None) -> Token:
    return Token("s-1", choice, value, logprob)


async def pieces(made: Answer, items: list[Token | Finished]) -> list[Piece]:
    for item in items:
        made.session.line.put_nowait(item)
    made.session.end = End(Status.FINISHED, Totals())
    made.session.over.set()
    return [piece async for some in made.pieces() for piece in some]


async def test_choices_are_said_in_the_order_in_which_their_tokens_come() -> None:
    made, _ = answer([Sampling(max_tokens=2)] * 2)
    said = await pieces(
        made,
        [
            token(0, ord("a")),
            token(1, ord("x")),
            token(0, EOS),
            Finished(0, Finish.STOP),
            token(1, ord("y")),
            Finished(1, Finish.LENGTH),
        ],
    )
    assert [(one.choice, one.text, one.finish_reason) for one in said] == [
        (0, "a", None),
        (1, "x", None),
        (0, "", "stop"),
        (1, "y", None),
        (1, "", "length"),
    ]


async def test_a_stop_string_takes_back_its_own_choice_and_says_nothing_of_what_came_after_it() -> None:
    made, desk = answer([Sampling(max_tokens=9)] * 2, ("st",))
    said = await pieces(
        made,
        [
            *(token(0, byte) for byte in b"as"),
            *(token(1, byte) for byte in b"as"),
            *(token(0, byte) for byte in b"top"),
            Finished(0, Finish.CANCELLED),
            token(1, ord("o")),
            Finished(1, Finish.LENGTH),
        ],
    )
    assert desk.taken == [(Status.FINISHED, 0)]
    assert "".join(one.text for one in said if one.choice == 0) == "a"
    assert "".join(one.text for one in said if one.choice == 1) == "aso"
    assert [one.finish_reason for one in said if one.finish_reason] == ["stop", "length"]


async def test_one_choice_that_fails_takes_back_the_whole_session() -> None:
    made, desk = answer([Sampling(max_tokens=9)] * 2)
    await pieces(made, [token(0, 97), Finished(0, Finish.FAILED), Finished(1, Finish.CANCELLED)])
    assert desk.taken == [(Status.CANCELLED, None)]


async def test_the_token_that_ends_an_answer_is_no_text_unless_it_was_to_be_ignored() -> None:
    for sampling, tokens, text in (
        (Sampling(max_tokens=9, stop_ids=(98,)), (97, 98), "a"),
        (Sampling(max_tokens=9), (97, 98, EOS), "ab"),
        (Sampling(max_tokens=3, ignore_eos=True), (97, EOS, 98), "a\0b"),
    ):
        made, _ = answer([sampling])
        said = await pieces(made, [*(token(0, one) for one in tokens), Finished(0, Finish.STOP)])
        assert "".join(one.text for one in said) == text


async def test_every_token_of_the_text_is_placed_once_with_the_text_that_holds_it() -> None:
    made, _ = answer([Sampling(max_tokens=9, logprobs=0)])
    said = await pieces(
        made, [*(token(0, byte, -1.0) for byte in "aéb".encode()), token(0, EOS, -1.0), Finished(0, Finish.STOP)]
    )
    assert [(one.text, [placed.offset for placed in one.placed]) for one in said] == [
        ("a", [0]),
        ("é", [1, 1]),
        ("b", [2]),
        ("", []),
    ]


@pytest.mark.parametrize(("text", "placed"), [("xxstop", 2), ("xxsto", 5)])
async def test_tokens_of_a_stop_string_are_not_listed_and_those_held_back_in_vain_are(text: str, placed: int) -> None:
    made, _ = answer([Sampling(max_tokens=9, logprobs=0)], ("stop",))
    said = await pieces(made, [*(token(0, byte, -1.0) for byte in text.encode()), Finished(0, Finish.LENGTH)])
    assert sum(len(one.placed) for one in said) == placed


def test_only_who_writes_all_at_once_keeps_log_probabilities() -> None:
    sampling = Sampling(max_tokens=9, logprobs=2)
    streamed = answer([sampling])[0].texts[0]
    kept = keeping(sampling)
    for text in (streamed, kept):
        for _ in range(3):
            text.push(Token("s-1", 0, 97, -1.0, ((97, -1.0), (98, -2.0))))
    assert (streamed.tokens, streamed.kept) == ([], 0)
    assert (len(kept.tokens), kept.kept) == (3, 9)


async def test_a_whole_answer_with_more_log_probabilities_than_are_kept_is_cut_off_and_says_why() -> None:
    made, desk = answer([Sampling(max_tokens=9, logprobs=20)])
    top = tuple((number, -1.0) for number in range(20))
    crowd = [Token("s-1", 0, 97, -1.0, top)] * (KEPT_ENTRIES_MAX // 21 + 1)
    for item in (*crowd, Finished(0, Finish.CANCELLED)):
        made.session.line.put_nowait(item)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def end() -> None:
        await desk.was_cut.wait()
        made.session.end = End(Status.CANCELLED, Totals(), "", desk.cut[0])
        made.session.over.set()

    ending = asyncio.create_task(end())
    await WholeAnswer(made, Wanted(CHAT, "m", logprobs=True, include_usage=False))({"type": "http"}, receive, send)
    await ending
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert error["code"] == "answer_too_large"
    assert "set stream to true" in error["message"]


def test_what_all_answers_keep_together_is_bounded_and_the_largest_one_is_cut_off_for_it() -> None:
    keeping, sessions = Keeping(), [Session(f"s-{number}", "acme", []) for number in range(5)]
    large, rest = sessions[0], sessions[1:]
    assert keeping.keep(large, KEPT_ENTRIES_MAX) == []
    for one in rest[:-1]:
        assert keeping.keep(one, KEPT_ENTRIES_MAX - 2) == []
    assert keeping.entries == KEPT_BY_ALL_MAX - 6
    assert keeping.keep(rest[-1], 6) == []
    ((cut, why),) = keeping.keep(rest[-1], 7)
    assert (cut, why.status, why.code) == (large, 400, "answers_too_large")
    large.cut_off = why
    assert keeping.entries == 3 * (KEPT_ENTRIES_MAX - 2) + 7
    assert keeping.keep(large, KEPT_ENTRIES_MAX) == [], "it grows no further"
    for one in rest:
        keeping.release(one)
    assert keeping.entries == 0


def test_an_answer_that_is_being_written_is_not_cut_off_for_one_that_grows() -> None:
    keeping, sessions = Keeping(), [Session(f"s-{number}", "acme", []) for number in range(5)]
    for one in sessions[:-1]:
        keeping.keep(one, KEPT_ENTRIES_MAX)
        one.end = End(Status.FINISHED, Totals())
    ((cut, _),) = keeping.keep(sessions[-1], 1)
    assert cut is sessions[-1]


async def whole(made: Answer, shape: Shape, items: list[Token | Finished], turns: list[int]) -> dict[str, Any]:
    for item in items:
        made.session.line.put_nowait(item)
    made.session.end = End(Status.FINISHED, Totals())
    made.session.over.set()
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        if not sent:
            turns.append(count)
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    count = 0

    async def stream() -> None:
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0)

    streaming = asyncio.create_task(stream())
    await WholeAnswer(made, Wanted(shape, "m", logprobs=True, include_usage=False))({"type": "http"}, receive, send)
    streaming.cancel()
    found: dict[str, Any] = json.loads(b"".join(one["body"] for one in sent[1:]))
    return found


@pytest.mark.parametrize(("shape", "shaped"), [(CHAT, chat_logprobs), (COMPLETION, completion_logprobs)])
async def test_streams_go_on_while_a_large_answer_is_written_whole(shape: Shape, shaped: Any) -> None:
    class Named(Bytes):
        def token(self, value: int) -> TokenText:
            return TokenText(chr(value), bytes([value]))

    made, desk = answer([Sampling(max_tokens=9, logprobs=2)])
    made = Answer(made.worker, made.session, Named(), made.texts)  # type: ignore[arg-type]
    tokens = [Token("s-1", 0, 97 + number % 5, -1.0 - number, ((98, -0.5), (99, -2.0))) for number in range(1000)]
    turns: list[int] = []
    document = await whole(made, shape, [*tokens, Finished(0, Finish.LENGTH)], turns)
    assert turns[0] >= 1000 // 64
    (choice,) = document["choices"]
    assert choice["finish_reason"] == "length"
    placed = [Placed(token, offset) for offset, token in enumerate(tokens)]
    assert choice["logprobs"] == shaped(placed, Named().token)
    assert desk.keeping.entries == 0, "it is written, and nothing is kept"


async def test_a_long_text_is_put_together_once_and_not_with_every_token() -> None:
    class Long(Bytes):
        def decode(self, tokens: list[int]) -> str:
            return "x" * 10_000 * len(tokens)

    choice = Choice([], Sampling(max_tokens=9))
    made, _ = answer([choice.sampling])
    text = ChoiceText(Long(), choice, (), frozenset({EOS}))  # type: ignore[arg-type]
    made = Answer(made.worker, made.session, Long(), [text])  # type: ignore[arg-type]
    asked = GenerateRequest(None, ["p"], single=True, details=False, full_text=False)  # type: ignore[arg-type]
    for item in (*[token(0, 97)] * 6000, Finished(0, Finish.LENGTH)):
        made.session.line.put_nowait(item)
    made.session.end = End(Status.FINISHED, Totals())
    made.session.over.set()
    size = 0

    async def send(message: Any) -> None:
        nonlocal size
        size += len(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    began_s = time.process_time()
    await BatchAnswer(made, asked)({"type": "http"}, receive, send)
    assert size > 6000 * 10_000
    assert time.process_time() - began_s < 8, "60 MB once, and not 180 GB"


async def test_a_whole_answer_is_written_a_piece_at_a_time() -> None:
    made, _ = answer([Sampling(max_tokens=9)])
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = bytes(range(256)) * 1000
    await send_whole(send, made.session, 200, body)
    assert dict(sent[0]["headers"])[b"content-length"] == b"256000"
    assert b"".join(one["body"] for one in sent[1:]) == body
    assert [one["more_body"] for one in sent[1:]] == [True, True, True, False]


async def test_a_client_that_takes_nothing_is_given_up_and_the_engine_works_for_it_no_longer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, desk = answer([Sampling(max_tokens=9)])

    async def never(_: asyncio.Event) -> None:
        await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def write() -> None:
        await taken(never(asyncio.Event()), 0.05)

    await asyncio.wait_for(while_connected(write(), receive, made), 10)
    assert desk.taken == [(Status.CANCELLED, None)]
    assert "took nothing" in caplog.text


TEXTS = {1: TokenText(" Paris", b" Paris"), 2: TokenText("bytes:\\xc3", b"\xc3"), 3: TokenText("<s>", None)}


def test_log_probabilities_have_openais_shapes_and_no_infinity() -> None:
    placed = [
        Placed(Token("s", 0, 1, -0.25, ((1, -0.25), (2, -1.5))), 0),
        Placed(Token("s", 0, 3, float("-inf"), ((2, -0.1), (1, -3.0))), 6),
    ]
    assert chat_logprobs(placed, TEXTS.__getitem__) == {
        "content": [
            {
                "token": " Paris",
                "logprob": -0.25,
                "bytes": list(b" Paris"),
                "top_logprobs": [
                    {"token": " Paris", "logprob": -0.25, "bytes": list(b" Paris")},
                    {"token": "bytes:\\xc3", "logprob": -1.5, "bytes": [0xC3]},
                ],
            },
            {
                "token": "<s>",
                "logprob": LEAST,
                "bytes": None,
                "top_logprobs": [
                    {"token": "bytes:\\xc3", "logprob": -0.1, "bytes": [0xC3]},
                    {"token": " Paris", "logprob": -3.0, "bytes": list(b" Paris")},
                ],
            },
        ],
        "refusal": None,
    }
    listed = completion_logprobs(placed, TEXTS.__getitem__)
    assert listed == {
        "tokens": [" Paris", "<s>"],
        "token_logprobs": [-0.25, LEAST],
        "top_logprobs": [
            {" Paris": -0.25, "bytes:\\xc3": -1.5},
            {"bytes:\\xc3": -0.1, " Paris": -3.0, "<s>": LEAST},
        ],
        "text_offset": [0, 6],
    }
    assert json.loads(json.dumps(listed, allow_nan=False)) == listed


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(model_path())


async def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(tokenizer: Tokenizer) -> None:
    text = "Paris, naïve 東京 😀 \ufffd"
    ids = await tokenizer.text(text, 1000, "prompt")
    tokens = [tokenizer.token(one) for one in ids]
    assert b"".join(one.raw or b"" for one in tokens) == text.encode()
    assert any(one.text.startswith("bytes:") for one in tokens)
    assert all("\ufffd" not in one.text for one in tokens if one.raw != "\ufffd".encode())


async def test_a_special_token_is_named_and_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token(2).text == "<|im_end|>"
    assert tokenizer.is_special(2)
    assert tokenizer.decode([2]) == ""
