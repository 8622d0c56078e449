"""A line to an API server that can be cut and mended: a TCP proxy on 127.0.0.1.

Owns the proxy's thread. While it is cut, open connections are dead and new ones are refused, as where a control plane
restarts; the programs behind it notice nothing else. TLS goes through untouched.
"""

import json
import selectors
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from rigs.ports import hold_port


class CutLine:
    """Forwards to `target` until `close`; `cut` and `mend` at will."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener: socket.socket | None = None
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = hold_port()
        self.mend()

    def cut(self) -> None:
        """Connections end, and new ones are refused."""
        with self._lock:
            listener, self._listener = self._listener, None
            sockets, self._sockets = self._sockets, set()
        for one in [*sockets, *([listener] if listener else [])]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def mend(self) -> None:
        """Connections are forwarded, at the same port as before."""
        listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        with self._lock:
            self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def kubeconfig(self, original: Path, copy: Path) -> Path:
        """The same rights over this line."""
        config = json.loads(original.read_text())
        for cluster in config["clusters"]:
            cluster["cluster"]["server"] = f"https://127.0.0.1:{self.port}"
        copy.write_text(json.dumps(config))
        return copy

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    near.close()
                    far.close()
                    return
                self._sockets |= {near, far}
            threading.Thread(target=self._forward, args=(near, far), daemon=True).start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in ready.select():
                        part = key.fileobj.recv(65_536)  # type: ignore[union-attr]
                        if not part:
                            return
                        key.data.sendall(part)
        except (OSError, ValueError):
            return
        finally:
            for one in (near, far):
                one.close()
            with self._lock:
                self._sockets -= {near, far}


def address_of(kubeconfig: Path) -> tuple[str, int]:
    """Where the API server of a kubeconfig is."""
    server = urlparse(json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
    return server.hostname or "", server.port or 443
