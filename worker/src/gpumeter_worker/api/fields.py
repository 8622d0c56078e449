"""Reads single fields of a request: a truth value, a whole number, a number, a text; or refuses them by name.

Pure. Owns what a type means here: true is no number, 1.0 is no whole number, null is a field that was not sent. Knows
no request and no parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gpumeter_worker.api.errors import bad_parameter


def boolean(values: Mapping[str, Any], name: str, at: str = "") -> bool:
    """True or false; false where it was not sent. Raises Refused."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_parameter(at + name, f"{at}{name} must be true or false")
    return bool(value)


def whole(values: Mapping[str, Any], name: str, default: int, lowest: int, highest: int, *, at: str = "") -> int:
    """A whole number inside its bounds. Raises Refused."""
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not int or not lowest <= value <= highest:
        raise bad_parameter(at + name, f"{at}{name} must be a whole number from {lowest} to {highest}")
    return value


def number(
    values: Mapping[str, Any],
    name: str,
    default: float,
    allowed: Callable[[float], bool],
    meaning: str,
    *,
    at: str = "",
) -> float:
    """A finite number that is allowed. Raises Refused with what it means to be."""
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not allowed(value):
        raise bad_parameter(at + name, f"{at}{name} must be {meaning}")
    return float(value)


def text(value: str, at: str) -> str:
    """The text itself, if it can be written down. Raises Refused."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_parameter(at, f"{at} holds half of a surrogate pair, which is no text") from None
    return value


def token_id(value: object, vocabulary: int) -> bool:
    """Whether this is the number of a token of the model."""
    return type(value) is int and 0 <= value < vocabulary
