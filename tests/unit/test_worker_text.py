"""Streaming text: whole characters, whole stop strings, and the same text however it is cut."""

from hypothesis import given
from hypothesis import strategies as st

from gpumeter_worker.api.answer import gpu_seconds
from gpumeter_worker.api.text import TextStream


def decode(tokens: list[int]) -> str:
    """A tokenizer of bytes: the hardest case, every character beyond ASCII is several tokens."""
    return bytes(tokens).decode("utf-8", "replace")


def stream(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    out = TextStream(decode, list(b"prompt"), stops)
    pieces = []
    for token in text.encode():
        pieces.append(out.push(token))
        if out.stopped:
            break
    return [*pieces, out.finish()], out.stopped


@given(st.text())
def test_the_pieces_are_the_text_and_none_holds_half_a_character(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="abé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1))
def test_nothing_of_a_stop_string_and_nothing_after_it_is_said(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(text, tuple(stops))
    said = "".join(pieces)
    if stopped:
        assert text.startswith(said)
        assert any(text[len(said) :].startswith(stop) for stop in stops)
        assert not any(stop in said for stop in stops)
    else:
        assert said == text
        assert not any(stop in text for stop in stops)


def test_a_character_that_never_becomes_whole_is_shown_at_the_end() -> None:
    out = TextStream(decode, [], ())
    assert [out.push(0xC3), out.finish()] == ["", "\ufffd"]


def test_text_is_said_as_soon_as_it_cannot_be_a_stop_string() -> None:
    out = TextStream(decode, [], ("stop",))
    assert [out.push(byte) for byte in b"a stone"] == ["a", " ", "", "", "", "ston", "e"]


@given(st.text(alphabet="aé\ufffd😀", min_size=8, max_size=60))
def test_replacement_characters_that_are_text_stay_whole(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == text


def test_bytes_that_never_become_text_are_said_soon_and_cost_the_same_at_any_length() -> None:
    decoded = 0

    def counting(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode(tokens)

    out = TextStream(counting, list(b"prompt"), ())
    said = [out.push(0xC3) for _ in range(400)]
    assert sum(map(bool, said[:40])) >= 5
    first = decoded
    for _ in range(400):
        out.push(0xC3)
    assert decoded - first <= 1.2 * first
    assert set(out.finish()) == {"\ufffd"}


@given(st.text(alphabet="abé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=2))
def test_seen_and_said_count_the_characters(text: str, stops: list[str]) -> None:
    out = TextStream(decode, [], stops)
    said = ""
    for token in text.encode():
        said += out.push(token)
        assert out.said == len(said) <= out.seen
    said += out.finish()
    assert out.said == len(said)


def test_gpu_seconds_are_exact_where_a_float_would_not_be() -> None:
    assert gpu_seconds(1) == "0.000000001"
    assert gpu_seconds(2**53 + 1) == "9007199.254740993"
    assert gpu_seconds(12_345_678_901_234_567_890) == "12345678901.234567890"
