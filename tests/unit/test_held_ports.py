"""A port that a test tells a process is taken by no other before the process listens, nor between two of its lives."""

import socket
import struct

import pytest

from rigs.ports import hold_port

HERE = "127.0.0.1"
IP_LOCAL_PORT_RANGE = 51  # Linux 6.3 and newer; Python does not name it


def is_given(port: int, connects_to: tuple[str, int] | None) -> bool:
    """Whether the kernel gives this port to one that does not name it: to bind, or to connect from."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", port << 16 | port))
        except OSError:
            pytest.skip("this kernel cannot limit one socket's choice to one port")
        try:
            if connects_to is None:
                one.bind((HERE, 0))
            else:
                one.connect(connects_to)
        except OSError:
            return False
        return int(one.getsockname()[1]) == port


def closed_port() -> int:
    with socket.create_server((HERE, 0)) as one:
        return int(one.getsockname()[1])


@pytest.mark.parametrize("connects", [False, True])
def test_a_held_port_is_given_to_nobody_else_before_and_between_its_servers(connects: bool) -> None:
    with socket.create_server((HERE, 0)) as server:
        connects_to = server.getsockname() if connects else None
        assert any(is_given(closed_port(), connects_to) for _ in range(9)), "one that nobody holds is"
        held = hold_port()
        assert not is_given(held, connects_to)
        for _ in range(2):
            socket.create_server((HERE, held)).close()
            assert not is_given(held, connects_to)


def test_at_a_held_port_nobody_answers_until_one_listens() -> None:
    held = hold_port()
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HERE, held))
        with socket.create_server((HERE, held)):
            socket.create_connection((HERE, held)).close()
