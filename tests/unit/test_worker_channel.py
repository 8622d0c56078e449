"""The channel between the two processes: what arrives is what was sent, whatever short way it took."""

from dataclasses import fields

from gpumeter_worker.engine import messages
from gpumeter_worker.engine.channel import decode, encode
from gpumeter_worker.engine.messages import Ended, StepReport, Token
from gpumeter_worker.engine.sequence import Finish
from gpumeter_worker.metering.parts import Part

PART = Part("s-1", 3, 40, True, 1, 3, 2, True)
TOKEN = Token("s-1", 2, 17, -0.5, ((17, -0.5), (4, -1.25)))


def test_a_steps_report_arrives_with_all_that_it_says() -> None:
    numbers = {one.name: number for number, one in enumerate(fields(StepReport), 1) if one.name not in FILLED}
    report = StepReport(**FILLED, **numbers)
    assert decode(encode(report)) == report
    assert [type(one) for one in decode(encode(report)).parts + decode(encode(report)).tokens] == [Part, Token]


def test_what_the_clock_does_not_know_is_not_made_up_on_the_way() -> None:
    report = StepReport(1, 2, 1, (), (), 0, 0)
    assert decode(encode(report)).drift_ppb is None


def test_other_messages_arrive_as_they_are() -> None:
    for message in (Ended("s-1", Finish.FAILED, 1, "why"), [Ended("s-2", Finish.STOP), TOKEN], messages.Cancel("s-3")):
        assert decode(encode(message)) == message


FILLED = {"parts": (PART,), "tokens": (TOKEN,)}
