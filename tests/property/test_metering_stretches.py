"""A step that is said in a word is booked as if every row had been said: the same records, to the byte."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gpumeter_usage.period import MINUTE_NS
from gpumeter_usage.record import Status
from gpumeter_worker.engine.channel import Known, decode, encode
from gpumeter_worker.engine.messages import StepReport, Token
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.attribution import Rule, of_a_context_token, uncalibrated, weights
from gpumeter_worker.metering.meter import Flush, Identity, Meter
from gpumeter_worker.metering.parts import Onward, Part

START_NS = 1_000_000 * MINUTE_NS + 5
IDENTITY = Identity("worker", "boot", "team/model", "model", "cpu", "host")
RULES = st.sampled_from((Rule.KNEE, Rule.TOKENS))
TIMES = st.one_of(st.integers(0, 10**8), st.integers(MINUTE_NS - 10**9, 2 * MINUTE_NS))
BATCHES = st.lists(st.sampled_from(("a", "b", "c", "nobodys")), min_size=1, max_size=6)
"""One session may stand in several rows, as its choices do; and a row may be of a session that is gone."""
SEQUENCES = {"a": 6, "b": 2, "c": 1}
HAPPENINGS = st.one_of(
    st.tuples(st.just("batch"), BATCHES, st.booleans()),
    st.tuples(st.just("steps"), st.lists(st.tuples(TIMES, TIMES, TIMES), min_size=1, max_size=6), st.just(None)),
    st.tuples(st.sampled_from(("end", "begin")), st.sampled_from(("a", "b", "c")), st.just(None)),
    st.tuples(st.sampled_from(("cut", "lose")), st.just(None), st.just(None)),
    st.tuples(st.just("adopt"), RULES, st.just(None)),
)


class Books:
    """A meter, and all that it has said."""

    def __init__(self) -> None:
        self.meter = Meter(IDENTITY, uncalibrated(Rule.KNEE, "host"), START_NS)
        self.meter.kv_token_bytes = 12_345_678
        self.meter.enter(Phase.SERVING, START_NS)
        self.said: list[object] = []
        for session, sequences in SEQUENCES.items():
            self.meter.begin(session, "acme", START_NS, sequences)


@given(st.lists(HAPPENINGS, max_size=25))
def test_a_stretch_of_steps_is_booked_as_its_rows_would_be(happenings: list[tuple[str, object, object]]) -> None:
    rows, words = Books(), Books()
    now_ns, alive = START_NS, {"a", "b", "c"}
    first: tuple[Part, ...] = ()
    further = itertools.count(1)

    def both(*what: object) -> None:
        for books in (rows, words):
            name, *arguments = what
            books.said.append(getattr(books.meter, str(name))(*arguments))

    for what, value, prefill in [*happenings, ("cut", None, None)]:
        if what == "batch":
            first = tuple(
                Part(name, 1, 7 + 13 * number, prefill=bool(prefill and not number), sampled=1)
                for number, name in enumerate(value)
            )
            further = itertools.count(1)
            both("step", now_ns, now_ns + 1000, 900, first)
            now_ns += 1000
        elif what == "steps" and first:
            for gap_ns, lasted_ns, gpu_ns in value:
                onward = Onward(first, next(further))
                step = now_ns + gap_ns, now_ns + gap_ns + lasted_ns, gpu_ns
                rows.said.append(rows.meter.step(*step, tuple(onward)))
                words.said.append(words.meter.step(*step, onward))
                now_ns += gap_ns + lasted_ns
        elif what == "end" and value in alive:
            alive.remove(value)
            both("end", value, Status.FINISHED, now_ns)
        elif what == "begin" and value not in alive:
            alive.add(value)
            both("begin", value, "acme", now_ns, SEQUENCES[value])
        elif what in ("cut", "lose"):
            both(what, now_ns)
        elif what == "adopt":
            both("adopt", uncalibrated(value, "host"))
    assert words.said == rows.said
    assert isinstance(words.said[-1], Flush | None)
    assert words.meter.accounts.totals_ns == rows.meter.accounts.totals_ns


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(1, 10**4), RULES)
def test_a_decodes_weight_grows_by_the_same_with_every_token(contexts: list[int], further: int, of: Rule) -> None:
    profile = uncalibrated(of, "cuda")
    grown = of_a_context_token(len(contexts), profile) * further
    later = weights([(1, context + further) for context in contexts], profile)
    assert later == [weight + grown for weight in weights([(1, context) for context in contexts], profile)]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20))
def test_whatever_is_said_in_a_word_arrives_whole(steps: list[tuple[int, bool]]) -> None:
    sender, receiver = Known(), Known()
    batches = [tuple(Part(f"s-{row}", 1, row, False, 1) for row in range(size)) for size in range(1, 5)]
    for number, (size, onward) in enumerate(steps):
        parts = Onward(batches[size], number) if onward else batches[size]
        report = StepReport(1, 2, 1, parts, (Token("s-1", 0, 17),), 1, 0)
        body = encode(sender.short([report, "other"]))
        assert receiver.whole(decode(body)) == [report, "other"]
