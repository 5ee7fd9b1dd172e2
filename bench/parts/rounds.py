"""Taking turns: every combination once, then every one once more, so that a slow minute hits all of them."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parts.ends import LOOPBACK, Ends
from parts.machines import Guest, Scene
from parts.measure import Row, row
from parts.migration import migration_run
from parts.peers import Peers
from parts.runs import Key, Runs

_ATTEMPTS = 5


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def end_as_by_hand() -> None:
    """Take SIGTERM for an interrupt from the keyboard: asyncio then lets the run leave through every clean-up."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def measure_round(
    number: int,
    name: str,
    guest: Guest,
    paths: Sequence[str],
    channels: Sequence[int],
    scene: Scene,
    peers: Peers,
    runs: Runs,
    ends: Ends = LOOPBACK,
) -> None:
    """Measure what ``runs`` does not have yet of one round. Attempts that fail are noted, and repeated a few times."""
    # Each round begins with another path, so that none always follows the same one.
    turned = [*paths[number % len(paths) :], *paths[: number % len(paths)]]
    for count in channels:
        for path in turned:
            key: Key = (name, path, count, number)
            for _ in range(_ATTEMPTS):
                if key in runs:
                    break
                progress(f"round {number + 1}, {name}, {path}, {count} channels")
                try:
                    with tempfile.TemporaryDirectory(prefix="slb-") as root:
                        found = migration_run(path, count, guest, scene, Path(root), peers, ends)
                        runs.add(key, asyncio.run(found))
                except (RuntimeError, TimeoutError) as error:
                    progress(f"failed: {error}")
                    runs.add_failure(key, str(error) or type(error).__name__)


def rows(names: Sequence[str], paths: Sequence[str], channels: Sequence[int], runs: Runs) -> list[Row]:
    """The medians of what was measured, in the order of the arguments; ``failed`` counts attempts without a result."""
    found = []
    for name in names:
        for count in channels:
            for path in paths:
                measured, failures = runs.of(name, path, count), runs.failures(name, path, count)
                if measured:
                    found.append(row(name, path, count, measured) | {"failed": len(failures)})
    return found
