"""What is asked: a seeded, endless list of requests of one tenant. Pure; knows no network."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a request is meant to become."""

    PLAIN = "plain"
    STREAMED = "streamed"
    ABORTED = "aborted"  # streamed, and the client leaves after some tokens
    BAD_PARAMETER = "bad_parameter"
    TOO_LONG = "too_long"


WEIGHTS = {Kind.PLAIN: 4, Kind.STREAMED: 5, Kind.ABORTED: 2, Kind.BAD_PARAMETER: 1, Kind.TOO_LONG: 1}
SUBJECTS = ("a ledger", "the sea", "a kilowatt-hour", "an honest scale", "a night train", "bread", "prime numbers")
QUESTIONS = ("What is {}?", "Tell me a short story about {}.", "Give me three facts about {}.", "Write a haiku on {}.")
TOKENS = (4, 8, 16, 24, 40)
LONGEST_TOKENS = max(TOKENS)
FAR_TOO_LONG_WORDS = 60_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `leave_after` is the number of content events after which an aborting client leaves."""

    number: int
    kind: Kind
    body: dict[str, Any]
    leave_after: int = 0


def asks(seed: int, tenant: str, model: str, longest: int = LONGEST_TOKENS) -> Iterator[Ask]:
    """The same seed and tenant give the same requests. The first five are one of each kind, so none is ever missing."""
    dice = random.Random(f"{seed}:{tenant}")
    first = list(Kind)
    dice.shuffle(first)
    number = 0
    while True:
        kind = first[number] if number < len(first) else dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        yield _ask(dice, number, kind, model, longest)
        number += 1


def _ask(dice: random.Random, number: int, kind: Kind, model: str, longest: int) -> Ask:
    question = dice.choice(QUESTIONS).format(dice.choice(SUBJECTS))
    padding = " ".join(["Please think of all that you know."] * dice.choice((0, 0, 1, 5, 20)))
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{question} {padding}".strip()}],
        "max_tokens": min(dice.choice(TOKENS), longest),
        "temperature": dice.choice((0, 0.7, 1)),
        "seed": dice.randrange(1_000_000),
    }
    leave_after = 0
    if kind in (Kind.STREAMED, Kind.ABORTED):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind is Kind.ABORTED:
        leave_after = dice.randint(1, 4)
        body["max_tokens"] = 64  # there is something left to abort
    if kind is Kind.BAD_PARAMETER:
        body |= dice.choice(({"temperature": -5}, {"top_p": 7}, {"max_tokens": -1}, {"messages": "hello"}))
    if kind is Kind.TOO_LONG:
        body["messages"][0]["content"] = "word " * FAR_TOO_LONG_WORDS
    return Ask(number, kind, body, leave_after)
