"""Records by the beginning of their id, as people type them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from uuid import UUID

from sealift.errors import InvalidInput, NotFound

SHORT = 8


class _Record(Protocol):
    @property
    def id(self) -> UUID | None:
        """Its id."""


_R = TypeVar("_R", bound=_Record)


def short(identifier: UUID | None) -> str:
    """The beginning of an id, as tables and hints show it; ``find`` takes it back."""
    return str(identifier or "")[:SHORT]


def find(kind: str, identifier: str, one: Callable[[UUID], _R], recent: Callable[[], Sequence[_R]]) -> _R:
    """The record with this id, asked for with ``one``; or the one of ``recent`` whose id begins so.

    ``kind`` is what the records are, and the command that lists them. Raises NotFound, and InvalidInput when several
    ids begin so.
    """
    try:
        return one(UUID(identifier))
    except ValueError:
        pass
    prefix = identifier.lower()
    found = [each for each in recent() if prefix and str(each.id).startswith(prefix)]
    if not found:
        raise NotFound(f"no recent {kind}'s id begins with {prefix!r}", todo=f"see `sealift {kind} list`")
    if len(found) > 1:
        raise InvalidInput(f"several {kind}s' ids begin with {prefix!r}", todo="give more of it")
    return found[0]
