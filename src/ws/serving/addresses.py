"""Addresses to listen at: which of them are this machine's own, and whether a port is free."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ws.base.errors import UserError

MOST_PORT = 65535


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at the address; a port in use or a wrong one, or a wrong host, is a `UserError`."""
    if not 0 <= port <= MOST_PORT:  # the system would take the rest of a division
        raise UserError(f"--port is {port}", f"Give 1 to {MOST_PORT}, or 0 for a free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        problem = f"cannot listen at {host}:{port} ({error.strerror})"
        raise UserError(problem, "Choose another --port or --host.") from error
    with listener:
        yield listener


def require_free(host: str, port: int) -> int:
    """A port that is free at the host: the given one, or any for 0. Raises `UserError` if it is in use."""
    with bound(host, port) as listener:
        return int(listener.getsockname()[1])
