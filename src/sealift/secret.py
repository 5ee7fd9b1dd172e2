"""The type of every secret: no repr, no equality, no hash, no pickling, no copying.

It lies at the bottom of the stack beside ``errors``, because both the channel and the key rooms need it and neither
may import the other (docs/decisions).
"""

from __future__ import annotations

from typing import NoReturn


class Secret:
    """Holds secret bytes; ``reveal()`` is the one greppable way to read them, ``wipe()`` the one way to drop them.

    The bytes live in a ``bytearray`` that ``wipe`` overwrites. Copies that Python made on the way cannot be erased;
    docs/security/model.md says what that means.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes | bytearray | memoryview, *, length: int) -> None:
        """Copy ``raw``, which must be exactly ``length`` bytes; raises ValueError without quoting it."""
        if len(raw) != length:
            raise ValueError(f"a secret of {length} bytes was given as {len(raw)}")
        self._raw = bytearray(raw)

    def reveal(self) -> bytes:
        """The bytes themselves; raises ValueError after ``wipe``."""
        if not self._raw:
            raise ValueError("this secret was wiped")
        return bytes(self._raw)

    def wipe(self) -> None:
        """Overwrite and forget the bytes; doing it twice is fine."""
        self._raw[:] = bytes(len(self._raw))
        self._raw = bytearray()

    def __repr__(self) -> str:
        return "<Secret>"

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("secrets are not compared")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets are not pickled or copied")

    def __format__(self, spec: str) -> NoReturn:
        raise TypeError("secrets are not formatted")
