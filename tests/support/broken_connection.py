"""A connection that can be cut: everything that comes to this port is passed to another, until it does not."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Connection:
    """Passes TCP connections on to a port of this machine."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pairs: list[socket.socket] = []
        self._listen(0)

    @property
    def port(self) -> int:
        """Address to connect to."""
        return self._port

    def cut(self) -> None:
        """End all connections and take no new ones."""
        self._listener.shutdown(socket.SHUT_RDWR)  # closing it alone would let the thread that waits take one more
        self._listener.close()
        for end in self._pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._pairs.clear()

    def mend(self) -> None:
        """Take connections again."""
        self._listen(self._port)

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                here, _ = listener.accept()
            except OSError:
                return  # cut
            there = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [here, there]
            for source, target in ((here, there), (there, here)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
