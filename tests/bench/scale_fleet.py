"""One process that answers for every worker of a simulated fleet: /metrics and /readyz, on every address.

    python -m bench.scale_fleet --port 8000

Owns what a worker at rest would tell, in its own length. A worker is one of many addresses of one network namespace;
the operator keeps a connection to each, as it does to real ones. Does not know which workers there are.
"""

import argparse
import asyncio
import json

METRICS = (
    "".join(f'gpumeter_step_duration_seconds_bucket{{le="{one}"}} 0.0\n' for one in range(200))
    + 'vllm:num_requests_waiting{model_name="m"} 0\nvllm:num_requests_running{model_name="m"} 1\n'
    + 'gpumeter_gpu_utilization_ratio{gpu="0"} 0.4\ngpumeter_sessions_total{model_name="m"} 4\n'
)
READY = json.dumps({"ready": True, "reason": "Ready", "message": "The worker answers requests."})


def main() -> None:
    """Serve until killed; says `ready` when it listens, for whoever started it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    asyncio.run(_serve(parser.parse_args().port))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Worker, "0.0.0.0", port, backlog=8_192)
    print("ready", flush=True)
    await server.serve_forever()


class _Worker(asyncio.Protocol):
    """One connection. A request of these has no body, so it ends with the empty line."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._held = b""

    def data_received(self, data: bytes) -> None:
        *requests, self._held = (self._held + data).split(b"\r\n\r\n")
        for request in requests:
            self._transport.write(_ANSWERS.get(request.split(b" ", 2)[1], _NONE))  # type: ignore[attr-defined]


def _answer(status: str, kind: str, text: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n"
    return (head + text).encode()


_ANSWERS = {
    b"/metrics": _answer("200 OK", "text/plain; version=0.0.4; charset=utf-8", METRICS),
    b"/readyz": _answer("200 OK", "application/json", READY),
}
_NONE = _answer("404 Not Found", "text/plain", "")


if __name__ == "__main__":
    main()
