"""A field that a request may not have is refused with the name that was probably meant."""

import pytest

from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.requests import chat_request, completion_request, generate_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"model": "m", "mesages": []}, "the parameter mesages is not supported; did you mean messages?"),
        (CHAT | {"max_toknes": 3}, "the parameter max_toknes is not supported; did you mean max_tokens?"),
        (CHAT | {"guided_json": {}}, "the parameter guided_json is not supported"),
    ],
)
def test_an_unknown_field_of_a_chat_is_told_with_its_neighbour(sent: dict[str, object], told: str) -> None:
    with pytest.raises(Refused) as refused:
        chat_request(sent, 100)
    assert refused.value.message == told


def test_each_route_proposes_its_own_fields() -> None:
    with pytest.raises(Refused) as refused:
        completion_request({"model": "m", "promt": "x"}, 100)
    assert refused.value.message.endswith("; did you mean prompt?")
    with pytest.raises(Refused) as refused:
        generate_request({"input": "x"}, "m")
    assert refused.value.message == "the field input is not supported; did you mean inputs?"
    with pytest.raises(Refused) as refused:
        generate_request({"inputs": "x", "parameters": {"max_new_token": 1}}, "m")
    assert refused.value.message == "parameters.max_new_token is not supported; did you mean max_new_tokens?"
