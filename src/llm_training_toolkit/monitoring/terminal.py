"""Text stream to a terminal, pipe or log file that never blocks, delays or fails its writer.

A thread writes from a bounded queue. If the other end fails or does not read, text is dropped: the driver's log has it.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections import deque

from llm_training_toolkit.monitoring.logs import DRIVER_LOGGER

_CAPACITY_BYTES = 256 * 1024  # about three thousand lines, until a slow reader reads again
_CLOSE_PATIENCE_SECONDS = 2.0  # at the end, without a single byte taken by the reader
_POLL_SECONDS = 0.05
_CHUNK_BYTES = 4096  # PIPE_BUF: what a pipe that polls as writable takes at once


class TerminalStream(io.TextIOBase):
    """Copy of a standard stream that survives `redirect_output`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._is_terminal = os.isatty(self._descriptor)
        self._pieces: deque[bytes] = deque()
        self._waiting = self._dropped = 0
        self._has_failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_pieces, daemon=True, name="terminal")
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the text."""
        return "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._is_terminal

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Queue the text, or drop it if the other end has failed or is far behind."""
        piece = text.encode("utf-8", "replace")
        with self._changed:
            if not self._has_failed and self._waiting + len(piece) > _CAPACITY_BYTES:
                self._dropped += 1
            elif piece and not self._has_failed:
                self._pieces.append(piece)
                self._waiting += len(piece)
                self._changed.notify()
        return len(text)

    def drain(self) -> None:
        """Wait until the text is written, the other end fails, or it takes nothing for two seconds."""
        left, until = self._waiting, time.monotonic() + _CLOSE_PATIENCE_SECONDS
        while self._waiting and time.monotonic() < until:
            time.sleep(_POLL_SECONDS / 10)
            if self._waiting != left:
                left, until = self._waiting, time.monotonic() + _CLOSE_PATIENCE_SECONDS

    def close(self) -> None:
        """Drain the stream. The descriptor stays open for a thread that is blocked in a write."""
        if not self.closed:
            self.drain()
        super().close()

    def _write_pieces(self) -> None:
        while True:
            with self._changed:
                while not self._pieces:
                    self._changed.wait()
                piece = self._pieces.popleft()
                if self._dropped and not self._pieces:
                    notice = f"… {self._dropped} messages were not taken in time: see logs/driver.log\n".encode()
                    piece += notice
                    self._waiting, self._dropped = self._waiting + len(notice), 0
            try:
                self._write_piece(piece)
            except OSError as error:
                self._fall_silent(error)
                return

    def _write_piece(self, piece: bytes) -> None:
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        while piece:
            room.poll()
            try:
                written = os.write(self._descriptor, piece[:_CHUNK_BYTES])
            except BlockingIOError:  # a terminal that another process made non-blocking
                time.sleep(_POLL_SECONDS)
                continue
            piece = piece[written:]
            with self._changed:
                self._waiting = max(0, self._waiting - written)

    def _fall_silent(self, error: OSError) -> None:
        with self._changed:
            self._has_failed, self._waiting = True, 0
            self._pieces.clear()
        DRIVER_LOGGER.warning("the screen takes no more text (%s): messages go to this log alone", error)


def open_terminal_copy(descriptor: int) -> TerminalStream:
    """Return a stream on the current standard output (1) or error (2) that survives `redirect_output`."""
    return TerminalStream(descriptor)


def open_missing_streams() -> None:
    """Open the standard streams that this process was started without, on /dev/null.

    Otherwise the next file would take their number, and redirected output would replace it. Python has None for them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - until the end
