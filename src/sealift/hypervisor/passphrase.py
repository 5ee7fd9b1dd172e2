"""The way of a data-encryption key to QEMU and qemu-img: an anonymous file that a child inherits, never its arguments.

A key is given as LUKS passphrase in 64 lower-case hexadecimal digits without a newline. They lie in a memfd
(memfd_create(2)), which has no name and no place on any disk; the child reads it as /proc/self/fd/N through a
``secret`` object of its own (QEMU's manual, "Providing secret data"; ``file`` with ``format=raw``). What a child reads
that way, nobody reads back from it: QEMU answers with an empty string.
"""

from __future__ import annotations

import os
from types import TracebackType

from sealift.domain.deks import DEK_BYTES
from sealift.secret import Secret

PASSPHRASE_BYTES = 2 * DEK_BYTES
LUKS_ITER_TIME_MS = 10
"""Time that the slowing of guesses (PBKDF2) may take. The passphrase has 256 random bits: nothing guesses it."""

_DIGITS = b"0123456789abcdef"


class Passphrase:
    """One anonymous file, empty until ``fill``; as a context it is emptied and closed at its end."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("sealift-passphrase", os.MFD_CLOEXEC)

    @property
    def path(self) -> str:
        """Where a child that has inherited the descriptor (``pass_fds``) finds it."""
        return f"/proc/self/fd/{self.fd}"

    def fill(self, dek: Secret) -> None:
        """Write the key's digits. The caller empties the file as soon as it has been read."""
        text = bytearray(PASSPHRASE_BYTES)
        try:
            for place, byte in enumerate(dek.reveal()):
                text[2 * place] = _DIGITS[byte >> 4]
                text[2 * place + 1] = _DIGITS[byte & 15]
            os.pwrite(self.fd, text, 0)
        finally:
            text[:] = bytes(len(text))

    def empty(self) -> None:
        """Overwrite what is in it and cut it to nothing, for everybody who has it open."""
        os.pwrite(self.fd, bytes(PASSPHRASE_BYTES), 0)
        os.ftruncate(self.fd, 0)

    def __enter__(self) -> Passphrase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.empty()
        os.close(self.fd)
