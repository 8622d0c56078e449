"""One request and what became of it, over plain http.client: headers, events and aborts are seen as they are."""

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from traffic.asks import Ask, Kind


class Outcome(StrEnum):
    """How a request ended, as its client saw it."""

    FINISHED = "finished"
    ABORTED = "aborted"  # by this client, on purpose
    REFUSED = "refused"  # a 4xx that the request deserved
    BUSY = "busy"  # 429 or 503: come back later
    FAILED = "failed"


EXPECTED = {
    Kind.PLAIN: Outcome.FINISHED,
    Kind.STREAMED: Outcome.FINISHED,
    Kind.ABORTED: Outcome.ABORTED,
    Kind.BAD_PARAMETER: Outcome.REFUSED,
    Kind.TOO_LONG: Outcome.REFUSED,
}


@dataclass(slots=True)
class Exchange:
    """Everything that a client can know. `gpu_seconds` is what the answer stated, as text, empty where it did not."""

    tenant: str
    number: int
    kind: Kind
    outcome: Outcome = Outcome.FAILED
    session: str = ""
    status: int = 0
    tokens: int = 0
    gpu_seconds: str = ""
    started_at_ns: int = 0
    ended_at_ns: int = 0
    first_token_ms: int = 0
    retry_after_s: float = 0
    note: str = ""

    @property
    def surprising(self) -> bool:
        """Whether it ended otherwise than it was meant to. An aborter whose answer was short may finish."""
        finished_early = self.kind is Kind.ABORTED and self.outcome is Outcome.FINISHED
        return self.outcome not in (EXPECTED[self.kind], Outcome.BUSY) and not finished_early


def exchange(host: str, port: int, tenant: str, key: str, ask: Ask, *, timeout_s: float) -> Exchange:
    """Send one request over a connection of its own and follow it to its end. Never raises for what a server does."""
    seen = Exchange(tenant, ask.number, ask.kind, started_at_ns=time.time_ns())
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(ask.body), headers)
        response = connection.getresponse()
        seen.status = response.status
        seen.session = response.getheader("X-Gpumeter-Session", "")
        seen.retry_after_s = float(response.getheader("Retry-After", "0"))
        if response.status != 200:
            _take_error(seen, response.read())
        elif ask.body.get("stream"):
            _follow(seen, response, ask.leave_after)
        else:
            _take_answer(seen, response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        seen.outcome, seen.note = Outcome.FAILED, f"{type(error).__name__}: {error}"
    finally:
        connection.close()
        seen.ended_at_ns = time.time_ns()
    return seen


def _take_error(seen: Exchange, body: bytes) -> None:
    seen.outcome = Outcome.REFUSED if 400 <= seen.status < 500 else Outcome.FAILED
    if seen.status in (429, 503):
        seen.outcome = Outcome.BUSY
    seen.note = str(json.loads(body)["error"]["message"])[:200]


def _take_answer(seen: Exchange, body: bytes) -> None:
    answer = json.loads(body, parse_float=Decimal)
    _take_usage(seen, answer["usage"])
    if answer["choices"][0]["finish_reason"]:
        seen.outcome = Outcome.FINISHED


def _follow(seen: Exchange, response: http.client.HTTPResponse, leave_after: int) -> None:
    begun_ns = time.monotonic_ns()
    content_events = 0
    for event in _events(response):
        if event == "[DONE]":
            seen.outcome = Outcome.FINISHED
            return
        value = json.loads(event, parse_float=Decimal)
        if "error" in value:
            seen.note = str(value["error"]["message"])[:200]
            return
        if value.get("usage"):
            _take_usage(seen, value["usage"])
        if any(choice.get("delta", {}).get("content") for choice in value.get("choices", ())):
            content_events += 1
            seen.tokens = max(seen.tokens, content_events)
            seen.first_token_ms = seen.first_token_ms or (time.monotonic_ns() - begun_ns) // 1_000_000
            if content_events == leave_after:
                seen.outcome = Outcome.ABORTED
                return  # the connection is closed by the caller: this is how real clients leave
    seen.note = "the stream ended without its end"


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline():
        text = line.decode().rstrip("\r\n")
        if text.startswith("data:"):
            yield text.removeprefix("data:").strip()


def _take_usage(seen: Exchange, usage: dict[str, Any]) -> None:
    seen.tokens = int(usage["completion_tokens"])
    if "gpu_seconds" in usage:
        seen.gpu_seconds = format(Decimal(usage["gpu_seconds"]), "f")
