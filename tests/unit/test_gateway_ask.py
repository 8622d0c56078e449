import json

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
    body = '{"a": "\\"model\\": \\"x\\"", "model" :  "team-a/smollm2" , "n": 1.000, "é": "🙂"}'.encode()
    changed = body_for(read(body), 'Smol "2"', body)
    assert changed == body.replace(b'"team-a/smollm2"', b'"Smol \\"2\\""')
    assert json.loads(changed)["model"] == 'Smol "2"'


def test_a_model_inside_another_field_is_not_the_model() -> None:
    body = b'{"messages": [{"model": "other"}], "model": "m", "metadata": {"stream": true}}'
    asked = read(body)
    assert (asked.model, asked.stream) == ("m", False)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "must be an object"),
        (b"[]", "must be an object"),
        (b'"model"', "must be an object"),
        (b'{"model": "m"', "comma or the end"),
        (b'{"model": "m",}', "field's name is expected"),
        (b'{"model" "m"}', "colon"),
        (b'{"model": }', "Expecting value"),
        (b'{"model": "m"} {}', "something follows"),
        (b'{"model": "m", "temperature": NaN}', "NaN is not a JSON value"),
        (b'{"model": "m", "temperature": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "m", "x": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"model": "m", "x": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"{}", "must be the name of a model"),
        (b'{"model": 7}', "must be the name of a model"),
        (b'{"model": ""}', "must be the name of a model"),
        (b'{"model": "' + b"m" * 600 + b'"}', "at most 512"),
        (b'{"model": "m", "model": "n"}', "occurs twice"),
        (b'{"model": "m", "stream": 1}', "true or false"),
    ],
)
def test_a_body_that_cannot_be_understood_is_refused_with_a_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert refused.value.status == 400
    assert sentence in refused.value.message
    assert len(refused.value.message) < 200
