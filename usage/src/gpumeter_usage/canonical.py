"""The one form in which data is written where its bytes are hashed, signed or compared.

Owns that form: JSON in UTF-8, keys sorted, no spaces. Does not know what is written. A record's own `canonical` gives
the same bytes, and takes a shorter way to them.
"""

import json


def canonical_json(value: object) -> bytes:
    """The bytes of a value that JSON can hold. Half of a surrogate pair, which no UTF-8 has, is written as it is: what
    somebody put into a ledger must be told, not stumbled over."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")
