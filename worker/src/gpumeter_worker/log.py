"""The worker's log: one line an event, JSON or text, on stderr.

Owns the format, which is the operator's too. What is logged is the caller's to choose, and never a prompt, a completion
or a credential.
"""

import json
import logging
import os
from datetime import UTC, datetime

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A JSON object a line; what is passed as `extra` becomes fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def is_log_line(line: str) -> bool:
    """Whether a line of another process of this worker is in the log's format already."""
    return not _is_json() or line.startswith('{"time": ')


def configure_logging() -> None:
    """Read GPUMETER_LOG_FORMAT (json or text; json by default) and GPUMETER_LOG_LEVEL."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if _is_json() else text)
    level = logging.getLevelNamesMapping().get(os.environ.get("GPUMETER_LOG_LEVEL", "info").upper(), logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "uvicorn.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _is_json() -> bool:
    return os.environ.get("GPUMETER_LOG_FORMAT", "json") != "text"
