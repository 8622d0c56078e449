"""When does an observed object still hold what was asked for."""

from typing import Any

import pytest

from gpumeter_operator.decide.drift import covers


@pytest.mark.parametrize(
    ("observed", "desired"),
    [
        ({"a": 1, "more": 2}, {"a": 1}),
        ({"memory": "1Gi"}, {"memory": "1024Mi"}),
        ({"cpu": "500m"}, {"cpu": "0.5"}),
        ({"name": "X"}, {"name": "X", "value": ""}),
        ({"emptyDir": None}, {"emptyDir": {}}),
        ({}, {"emptyDir": {}}),
        ({"env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]}, {"env": [{"name": "A", "value": "1"}]}),
        ({"drop": ["ALL"]}, {"drop": ["ALL"]}),
        ({"items": []}, {"items": []}),
        ({}, {"items": []}),
    ],
)
def test_what_others_add_and_how_the_server_writes_it_is_no_drift(observed: Any, desired: Any) -> None:
    assert covers(observed, desired)


@pytest.mark.parametrize(
    ("observed", "desired"),
    [
        ({"a": 2}, {"a": 1}),
        ({}, {"a": 1}),
        ({"memory": "2Gi"}, {"memory": "1Gi"}),
        ({"memory": "1G"}, {"memory": "1Gi"}),
        ({"value": "10"}, {"value": "1"}),
        ({"value": "1.2.3"}, {"value": "1.2.4"}),
        ({"hostAliases": [{"ip": "10.0.0.1"}]}, {"hostAliases": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}),
        ({"env": [{"name": "A", "value": "2"}]}, {"env": [{"name": "A", "value": "1"}]}),
        ({"drop": ["ALL", "X"]}, {"drop": ["ALL"]}),
        ({"drop": "ALL"}, {"drop": ["ALL"]}),
        ({"a": "text"}, {"a": {"b": 1}}),
        ({"replicas": 0}, {"replicas": 1}),
        ({"flag": True}, {"flag": False}),
        ({"selector": {"a": "b", "theirs": "c"}}, {"selector": {"a": "b"}}),
        ({"ingress": [{"from": [{"podSelector": {}}]}, {}]}, {"ingress": [{"from": [{"podSelector": {}}]}]}),
    ],
)
def test_a_changed_or_missing_field_is_drift(observed: Any, desired: Any) -> None:
    assert not covers(observed, desired)
