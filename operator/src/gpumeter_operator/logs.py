"""The form of log lines: one JSON object or one line of text each, on stderr.

Owns that form and the variables that choose it, GPUMETER_LOG_LEVEL and GPUMETER_LOG_FORMAT. Logs nothing itself.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from gpumeter_operator.environment import Environment

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "text")
# Libraries that report every request of theirs at info.
_CHATTY = ("aiohttp.access",)


def configure_logs(environ: Mapping[str, str]) -> None:
    """Set the root logger up. Raises SettingsInvalid for a level or a format that there is not."""
    read = Environment(environ)
    level = read.choice("GPUMETER_LOG_LEVEL", "info", LEVELS)
    form = read.choice("GPUMETER_LOG_FORMAT", "json", FORMATS)
    read.check()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
