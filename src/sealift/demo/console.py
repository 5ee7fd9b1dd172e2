"""What the guest says on its serial console, wherever it runs: one stream out of the hosts' files, and when."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LOOK_S = 0.004
_TICK = re.compile(r"TICK (\d+) (\d+)")
_CHECK = re.compile(r"CHECK pass=(\d+) pages=(\d+) bad=(\d+)")


@dataclass
class Ticks:
    """The guest's ticks as they arrived here: number and seconds on our monotonic clock."""

    seen: list[tuple[int, float]] = field(default_factory=list)

    def lost(self) -> int:
        """Ticks missing or out of order."""
        return sum(after != before + 1 for (before, _), (after, _) in zip(self.seen, self.seen[1:], strict=False))

    def largest_gap_ms(self, since: float) -> float:
        """The longest silence between two ticks of which the later came after ``since``, in milliseconds."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return max((later - earlier for (_, earlier), (_, later) in pairs if later > since), default=0.0) * 1000


class Console:
    """Follows several files of which only one grows at a time, since only one copy of the guest runs.

    A line that began on one host and ended on another is whole here: the console's state moves with the guest.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._offsets = dict.fromkeys(paths, 0)
        self._rest = b""
        self._lines: list[str] = []
        self._ticks = Ticks()
        self._bad = self._passes = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def follow(self, path: Path) -> None:
        """Follow one more file: that of a host which came later."""
        self._offsets.setdefault(path, 0)

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        self._thread.join()

    def wait_for(self, text: str, timeout: float, *, count: int = 1) -> bool:
        """Whether ``count`` lines containing ``text`` have come, or come within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: sum(text in line for line in self._lines) >= count, timeout)

    def count(self, text: str) -> int:
        """How many lines containing ``text`` have come."""
        with self._changed:
            return sum(text in line for line in self._lines)

    def wait_for_ticks(self, count: int, timeout: float) -> bool:
        """Whether ``count`` more ticks come within ``timeout`` seconds."""
        with self._changed:
            wanted = len(self._ticks.seen) + count
            return self._changed.wait_for(lambda: len(self._ticks.seen) >= wanted, timeout)

    def wait_for_check(self, timeout: float) -> int:
        """Wait for a check of all memory that began after this call; how many bad pages the guest has ever found.

        Raises TimeoutError.
        """
        with self._changed:
            wanted = self._passes + 2
            if not self._changed.wait_for(lambda: self._passes >= wanted, timeout):
                raise TimeoutError(f"the guest did not check its memory within {timeout:g} s")
            return self._bad

    @property
    def ticks(self) -> Ticks:
        """Every tick so far."""
        with self._changed:
            return Ticks(list(self._ticks.seen))

    @property
    def lines(self) -> list[str]:
        """Every other line so far."""
        with self._changed:
            return list(self._lines)

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_S):
            for path, offset in list(self._offsets.items()):
                try:
                    with path.open("rb") as file:
                        file.seek(offset)
                        data = file.read()
                except FileNotFoundError:
                    continue
                if data:
                    self._offsets[path] = offset + len(data)
                    self._take(data, time.monotonic())

    def _take(self, data: bytes, now: float) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        with self._changed:
            for raw in whole:
                line = raw.decode(errors="replace").strip()
                if found := _TICK.fullmatch(line):
                    self._ticks.seen.append((int(found[1]), now))
                    continue
                if found := _CHECK.fullmatch(line):
                    self._passes, self._bad = int(found[1]), int(found[3])
                self._lines.append(line)
            self._changed.notify_all()
