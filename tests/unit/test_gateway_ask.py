import json
import time
import tracemalloc

import pytest

from gpumeter_operator.gateway.ask import body_for, read
from gpumeter_operator.gateway.refusal import Refusal


def test_model_and_stream_are_read_and_nothing_else_is_judged() -> None:
    asked = read(b'{"model": "smollm2", "stream": true, "temperature": "warm", "messages": 7}')
    assert (asked.model, asked.stream) == ("smollm2", True)
    assert read(b'{"model":"m"}').stream is False
    assert read(b'{"model":"m","stream":null}').stream is False


def test_an_unqualified_body_travels_unchanged_to_the_byte() -> None:
    body = b'\n{ "seed":1e400 , "n": 1.000, "model" : "smollm2","x":"\\ud83d\\ude00 \xc3\xa9"}  '
    assert body_for(read(body), "smollm2", body) is body


def test_only_the_models_name_changes_when_it_was_qualified() -> None:
    values = (b'"\\"model\\": \\"x\\""', b"1.000", b'[ 1e400, {"a" : "\\u00e9"} ]', '"🙂"'.encode())
    body = b'{"a": %s, "model" :  "team-a/smollm2" , "n": %s, "n": %s, "\\"\xc3\xa9": %s}' % values
    changed = body_for(read(body), 'Smol "2"', body)
    assert changed == b'{"a":%s,"model":"Smol \\"2\\"","n":%s,"n":%s,"\\"\xc3\xa9":%s}' % values
    assert json.loads(changed)["model"] == 'Smol "2"'


@pytest.mark.parametrize("filling", [b"[]", b"1", b'{"a":1}', b'"\\n"'], ids=["arrays", "numbers", "objects", "texts"])
def test_a_body_of_ten_mebibytes_costs_no_memory_beside_itself_and_holds_nobody_up(filling: bytes) -> None:
    body = b'{"model": "m", "messages": [' + b",".join([filling] * ((10 << 20) // (len(filling) + 1) - 10)) + b"]}"
    tracemalloc.start()
    read(body)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000
    started_s = time.thread_time()
    read(body)
    assert time.thread_time() - started_s < 0.25


def test_a_model_inside_another_field_is_not_the_model() -> None:
    body = b'{"messages": [{"model": "other"}], "model": "m", "metadata": {"stream": true}}'
    asked = read(body)
    assert (asked.model, asked.stream) == ("m", False)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON: it ends too early"),
        (b"[]", "must be a JSON object, not array"),
        (b'"model"', "must be a JSON object, not str"),
        (b'{"model": "m"', "not valid JSON: it ends too early"),
        (b'{"model": "m",}', "not valid JSON: trailing comma in object (byte 14)"),
        (b'{"model" "m"}', "not valid JSON: expected ':' (byte 9)"),
        (b'{"model": }', "not valid JSON: invalid character (byte 10)"),
        (b'{"model": "m"} {}', "not valid JSON: trailing characters (byte 16)"),
        (b'{"model": "m", "temperature": NaN}', "not valid JSON: invalid character (byte 30)"),
        (b'{"model": "m", "temperature": -Infinity}', "not valid JSON: invalid character (byte 31)"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"\xff": "m"}', "not UTF-8"),
        (b'{"model": "m", "x": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"model": "m"' + b', "x": 1' * 1_000 + b"}", "more than 1000 fields"),
        (b"{}", "must be the name of a model"),
        (b'{"model": 7}', "must be the name of a model"),
        (b'{"model": ""}', "must be the name of a model"),
        (b'{"model": "' + b"m" * 600 + b'"}', "at most 512"),
        (b'{"model": "m", "model": "n"}', "occurs twice"),
        (b'{"model": "m", "mod\\u0065l": "n"}', "occurs twice"),
        (b'{"stream": true, "model": "m", "stream": false}', "occurs twice"),
        (b'{"model": "m", "stream": 1}', "true or false"),
    ],
)
def test_a_body_that_cannot_be_understood_is_refused_with_a_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert refused.value.status == 400
    assert sentence in refused.value.message
    assert len(refused.value.message) < 200
