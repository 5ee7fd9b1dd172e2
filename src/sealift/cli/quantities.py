"""Sizes, rates and durations as people write and read them."""

from __future__ import annotations

import re
from datetime import datetime

from sealift.errors import InvalidInput

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_RATE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(?:([KMGT]?)(?:iB)?|([KMGT]?)bit)(?:/s)?")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) *(ms|s|min|m|h)")
_MILLISECONDS = {"ms": 1, "s": 1000, "min": 60_000, "m": 60_000, "h": 3_600_000}


def parse_rate(text: str) -> int:
    """Bytes per second of ``2G``, ``1.5GiB/s`` (powers of 1024) or ``10Gbit`` (powers of 1000); InvalidInput."""
    found = _RATE.fullmatch(text.strip())
    if not found:
        raise InvalidInput("the bandwidth is not valid", todo='write it as "2G" or "800MiB/s" (bytes), or "10Gbit"')
    if found[3] is not None:
        return int(float(found[1]) * _DECIMAL[found[3]] / 8)
    return int(float(found[1]) * _BINARY[found[2]])


def parse_duration_ms(text: str) -> int:
    """Milliseconds of ``300ms``, ``1.5s``, ``2min``, ``2m`` or ``1h``, at least 1; raises InvalidInput."""
    found = _DURATION.fullmatch(text.strip())
    value = round(float(found[1]) * _MILLISECONDS[found[2]]) if found else 0
    if value < 1:
        raise InvalidInput("the duration is not valid", todo='write it as "300ms", "1.5s", "2m" or "1h"')
    return value


def size(count: float) -> str:
    """Bytes with three digits or so: ``512 B``, ``1.50 GiB``, ``131 MiB``."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1000:
            break
        count, unit = count / 1024, larger
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def rate(bytes_per_s: float) -> str:
    """A rate: ``1.50 GiB/s``."""
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    """A duration: ``85 ms``, ``8.4 s``, ``2 min 05 s``, ``3 h 20 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def moment(at: datetime) -> str:
    """A moment in local time, to the second."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def count(number: int, word: str) -> str:
    """``1 channel``, ``3 channels``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
