"""The sockets between a relay and the QEMU it serves: only the expected process, as often as planned, in order."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import Final

from sealift.channel.wire import shut, widen
from sealift.errors import LocalClosed, LocalPeerRefused

SOURCE_SOCKET: Final = "migrate.sock"
TARGET_SOCKET: Final = "incoming.sock"
_UCRED: Final = struct.Struct("3i")


class ExpectedPeer:
    """The one process that may be at the other end, held by a pidfd so that its number cannot be taken over."""

    def __init__(self, pid: int) -> None:
        """Raises LocalPeerRefused if there is no such process."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError):
            raise LocalPeerRefused(f"there is no process {pid} to serve") from None
        self._pid = pid

    def check(self, sock: socket.socket) -> None:
        """Raise LocalPeerRefused unless the connected socket's other end is that process and it is alive."""
        pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid != self._pid:
            raise LocalPeerRefused(f"process {pid} is at the local socket, expected was {self._pid}")
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if ended.poll(0):
            raise LocalPeerRefused(f"process {pid} has ended")

    def close(self) -> None:
        """Forget the process."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class SourceListener:
    """Where the source's QEMU connects: listens from construction to ``close``, which also unlinks it."""

    def __init__(self, directory: str, peer: ExpectedPeer, backlog: int) -> None:
        self._path = os.path.join(directory, SOURCE_SOCKET)
        self._peer = peer
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(self._path)
        os.chmod(self._path, 0o600)
        self._sock.listen(backlog)

    def accept(self) -> socket.socket:
        """The next connection of the expected process.

        Raises LocalPeerRefused for any other, after which accepting goes on, and LocalClosed after ``close``.
        """
        try:
            sock, _ = self._sock.accept()
        except OSError:
            raise LocalClosed("the local socket was closed before every channel had connected") from None
        try:
            self._peer.check(sock)
        except LocalPeerRefused:
            sock.close()
            raise
        widen(sock)
        return sock

    def close(self) -> None:
        """Unlink and close; a thread in ``accept`` is woken."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        shut(self._sock)
        self._sock.close()


def dial_target(directory: str, peer: ExpectedPeer) -> socket.socket:
    """A connection to the target's QEMU; raises LocalClosed if it does not listen, LocalPeerRefused."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.path.join(directory, TARGET_SOCKET))
        peer.check(sock)
    except OSError as error:
        sock.close()
        raise LocalClosed(f"the process served here does not listen for the move: {error.strerror}") from None
    except LocalPeerRefused:
        sock.close()
        raise
    widen(sock)
    return sock
