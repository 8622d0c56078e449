import json
import logging
import sys

import pytest

from gpumeter_operator.logs import JsonLines, configure_logs


def test_a_line_is_one_json_object_even_with_a_traceback() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        record = logging.LogRecord("a.b", logging.ERROR, "f", 1, "%s failed", ("it",), sys.exc_info())
    text = JsonLines().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "a.b", "it failed")
    assert "RuntimeError" in line["traceback"]
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize("environ", [{"GPUMETER_LOG_LEVEL": "loud"}, {"GPUMETER_LOG_FORMAT": "xml"}])
def test_a_level_or_format_that_there_is_not_is_refused_with_the_choices(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"set one of \w+, \w+"):
        configure_logs(environ)
