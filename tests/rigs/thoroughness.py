"""How often chance is tried: as often as every run has time for, or more often where somebody asks for that.

Owns one number, GPUMETER_THOROUGH: `make test-thorough` sets it to 10. What is tried by named seeds stays as
it is.
"""

import os

TIMES = int(os.environ.get("GPUMETER_THOROUGH", "1"))


def examples(count: int) -> int:
    """How many examples to try of a property, of which `count` are enough for every run."""
    return count * TIMES
