"""A connection to the first process that outlives it.

jax's client aborts its process, with a stack of C++, at the moment in which the
connection to the coordination service breaks; no option prevents that. So it connects
to a relay in its own process, which keeps the client's connection open and records that
the other side is gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 16
_RETRY_SECONDS = 0.1


class Relay:
    """Forwards the data that reach a port of this machine, in threads.

    Args:
        host: The destination.
        port: The destination's port; it need not listen yet.
        timeout: Seconds without an answer to sent data, after which the other machine
            counts as dead.

    Attributes:
        address: Of this machine, for the client.
        gone: Set when the other side has closed a connection, or does not answer.
    """

    def __init__(self, host: str, port: int, timeout: float):
        self.gone = threading.Event()
        self._target = host, port
        self._timeout = timeout
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._run(self._serve)

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._server.accept()
            self._run(self._forward, near)

    def _forward(self, near: socket.socket) -> None:
        far = self._connect()
        if far is None:
            return  # `near` stays open
        self._run(self._send, near, far)
        with contextlib.suppress(OSError):  # a side that is gone, as is its end
            while data := far.recv(_CHUNK):
                near.sendall(data)
        if near.fileno() != -1:
            self.gone.set()

    def _send(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(_CHUNK):
                try:
                    far.sendall(data)
                except OSError:
                    return  # the reading side records it, and `near` stays open
        # The client has closed it: the other side is not gone.
        near.close()
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket | None:
        while not self.gone.is_set():
            try:
                far = socket.create_connection(self._target, self._timeout)
            except OSError:
                time.sleep(_RETRY_SECONDS)
                continue
            far.settimeout(None)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                limit = int(1000 * self._timeout)
                far.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
            return far
        return None
