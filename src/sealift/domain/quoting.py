"""What somebody wrote, as it may stand in a message. Pure."""

from __future__ import annotations

from typing import Final

MOST: Final = 60


def quoted(text: str) -> str:
    """``text`` in quotes, without control characters, and cut where it is long."""
    return repr(text) if len(text) <= MOST else f"{text[:MOST]!r}..."
