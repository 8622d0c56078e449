"""Ports of 127.0.0.1 for servers that start later, and ports at which nobody listens.

Owns the sockets that keep them, to the end of the tests' process. Does not know who is to listen.
"""

import socket

_held: list[socket.socket] = []


def hold_port() -> int:
    """A port that the kernel gives to nobody who asks for any, nor to an outgoing connection.

    It is bound and never listened at, so connections are refused. On Linux a server that is told
    the number and sets SO_REUSEADDR, as all do, may listen there, end, and listen again.
    """
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    _held.append(one)
    port: int = one.getsockname()[1]
    return port
