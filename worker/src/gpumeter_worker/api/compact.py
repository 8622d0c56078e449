"""JSON as this API writes it. Knows nothing of what is written."""

import json


def to_json(document: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
