"""An input of the fuzzer read as a list of decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decisions from the front of an input. When it is used up every further one is 0, so any input means something."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        """Whether nothing is left to decide with."""
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes as they are, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(len(self._data))

    def number(self, most: int) -> int:
        """A number from 0 to ``most``."""
        size = max(1, (most.bit_length() + 7) // 8)
        return int.from_bytes(self.take(size), "big") % (most + 1)

    def flag(self) -> bool:
        """Yes or no."""
        return self.number(1) == 1

    def one_of(self, things: Sequence[T]) -> T:
        """One of a few things."""
        return things[self.number(len(things) - 1)]


def altered(genuine: bytes, choices: Choices) -> bytes:
    """``genuine`` with one byte changed, or cut short, or with bytes behind it, or as it was."""
    match choices.number(3):
        case 0:
            at = choices.number(max(0, len(genuine) - 1))
            changed = bytearray(genuine)
            changed[at : at + 1] = bytes(byte ^ choices.number(255) for byte in genuine[at : at + 1])
            return bytes(changed)
        case 1:
            return genuine[: choices.number(len(genuine))]
        case 2:
            return genuine + choices.take(choices.number(64))
        case _:
            return genuine
