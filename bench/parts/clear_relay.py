"""A relay with the cipher taken out, to see what the cipher costs: every other step is the product's own.

Payloads are copied where they would be sealed or opened, and tags are zeros that nobody looks at. The product cannot
start this: it is a script of the benchmarks, which put it in the place of the relay's process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from sealift.channel import records, relay_client
from sealift.channel.protocol import TAG_BYTES


class NoCipher:
    """Has the shape of cryptography's AESGCM."""

    def __init__(self, key: bytes) -> None:
        del key

    def encrypt(self, iv: bytes, data: bytes, associated: bytes | None) -> bytes:
        del iv, associated
        return data + bytes(TAG_BYTES)

    def encrypt_into(self, iv: bytes, data: memoryview, associated: bytes, out: memoryview) -> int:
        del iv, associated
        out[: len(data)] = data
        out[len(data) :] = bytes(TAG_BYTES)
        return len(out)

    def decrypt_into(self, iv: bytes, data: memoryview, associated: bytes, out: memoryview) -> int:
        del iv, associated
        out[:] = data[: len(out)]
        return len(out)


@contextmanager
def without_cipher() -> Iterator[None]:
    """Relays that this process starts in here have no cipher."""
    start = os.posix_spawn

    def spawn(executable: str, arguments: list[str], *rest: object, **named: object) -> int:
        script = [str(Path(__file__).resolve()) if a == "sealift.entry.relay" else a for a in arguments if a != "-m"]
        return start(executable, script, *rest, **named)  # type: ignore[arg-type]

    with mock.patch.object(relay_client.os, "posix_spawn", spawn):
        yield


if __name__ == "__main__":
    records.AESGCM = NoCipher  # type: ignore[assignment,misc]
    from sealift.entry.relay import main

    status = main()
    sys.stderr.flush()
    os._exit(status)
