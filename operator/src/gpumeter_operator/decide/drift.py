"""Does an observed object still hold everything that a manifest asks for?

Owns the comparison that saves a settled service from being written again. Does not know which objects there are.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# Maps and lists of owned objects that are one whole: an entry that somebody added to a selector cuts workers off, and
# one in a policy's rules lets strangers in.
_WHOLE = ("selector", "podSelector", "ingress", "egress", "policyTypes")
_QUANTITY = re.compile(r"^([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")
_SCALE = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), start=1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)},
}


def covers(observed: Any, desired: Any) -> bool:
    """True when every field of `desired` is in `observed` with the same value.

    What others added (labels, defaults, injected containers) is no drift. The API server writes quantities in its own
    form (1024Mi as 1Gi) and leaves out what is empty, so both count as equal. Selectors and a policy's rules are one
    whole, of which nothing may be more either.
    """
    if isinstance(desired, Mapping):
        if not isinstance(observed, Mapping):
            return not desired and observed is None
        return all(
            (observed.get(key) or None) == (value or None) if key in _WHOLE else covers(observed.get(key), value)
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return _covers_list(observed or [], desired)
    if observed is None:
        return desired in (None, "", 0, False)
    return bool(observed == desired) or _same_quantity(observed, desired)


def _covers_list(observed: Any, desired: list[Any]) -> bool:
    if not isinstance(observed, list):
        return False
    if all(isinstance(item, Mapping) for item in desired):
        return all(any(covers(candidate, item) for candidate in observed) for item in desired)
    return observed == desired


def _same_quantity(one: Any, other: Any) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    parsed = [_QUANTITY.match(text) for text in (one, other)]
    if parsed[0] is None or parsed[1] is None:
        return False
    first, second = (Decimal(match[1]) * _SCALE[match[2] or ""] for match in parsed if match)
    return first == second
