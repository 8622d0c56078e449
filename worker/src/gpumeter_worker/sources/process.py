"""`python -m gpumeter_worker.sources.process`: fetches one model and tells how far it is.

Owns the life of the process that fetches. A process of its own, because the libraries' threads cannot be cancelled, and
a worker that is told to leave must not wait for a download. It is asked by one JSON line on its standard input and
answers with JSON lines: `told` now and then, in the end `path`, or `reason` and `message`. What else is printed, by a
library or what it starts, goes to the log. It ends when its input closes, so it never outlives the worker.
"""

import json
import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path
from typing import TextIO

from gpumeter_worker.failure import MODEL_SOURCE_UNREACHABLE, StartupFailed, first_line
from gpumeter_worker.log import configure_logging
from gpumeter_worker.sources.fetch import Patience, fetch
from gpumeter_worker.sources.location import Location, remote
from gpumeter_worker.sources.progress import Progress

log = logging.getLogger("gpumeter_worker.sources.process")

_TELL_S = 1.0
_MESSAGE_CHARS_MAX = 4000  # what a termination message holds, and less than a line that the worker reads
_LOG_EVERY = 5  # seconds, and at once when something else is being done


def main() -> int:
    """Serve one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when a terminal's Ctrl-C ends it
    configure_logging()
    answers = _answers()
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with, args=(sys.stdin,), name="leave", daemon=True).start()
    progress = Progress()
    threading.Thread(target=_tell, args=(progress, answers), name="tell", daemon=True).start()
    location = Location(asked["uri"], asked["revision"], asked["allow_pickle"])
    owner = f"{asked['owner'][:60]}-{uuid.uuid4().hex[:8]}"
    patience = Patience(**asked.get("patience", {}))
    try:
        path = fetch(remote(location, os.environ), Path(asked["cache"]), owner, progress, patience)
    except StartupFailed as failure:
        _say(answers, reason=failure.reason, message=failure.message[:_MESSAGE_CHARS_MAX])
    except Exception as error:
        log.exception("fetching the model failed")
        how = f"{type(error).__name__}: {first_line(error)}"
        message = f"{asked['uri']} cannot be fetched ({how}); see the worker's log"
        _say(answers, reason=MODEL_SOURCE_UNREACHABLE, message=message)
    else:
        log.info("the model is in %s", path)
        _say(answers, path=str(path))
    os._exit(0)  # the libraries' threads may still hold connections; nothing is left to be written


def _answers() -> TextIO:
    """Where the worker reads. From now on whatever is printed is no answer: the standard output is that of errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _tell(progress: Progress, answers: TextIO) -> None:
    ended = threading.Event()
    last, logged, since = "", "", 0
    while not ended.wait(_TELL_S):
        text = progress.text()
        if text != last:
            _say(answers, told=text[:_MESSAGE_CHARS_MAX])
        last, since = text, since + 1
        what = text.partition(":")[0]
        if what != logged or since >= _LOG_EVERY:
            log.info("%s", text)
            logged, since = what, 0


def _say(answers: TextIO, **what: str) -> None:
    print(json.dumps(what), file=answers, flush=True)


def _leave_with(parent: TextIO) -> None:
    parent.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
