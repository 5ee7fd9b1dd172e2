"""How long it takes from `migrate` until the first byte of a guest goes out sealed, and what takes how long of it.

    python bench/setup.py [--runs N] [--json FILE]

A controller and two hosts on this machine, each a process of its own, and a guest of 16 MiB that only has its firmware.
It is moved to and fro through the command line. Every step says on the wall clock when it was done, and a migration's
record holds that (`timeline`); here all clocks are one. docs/benchmarks.md says what the parts are.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from parts.measure import Row, machine, write_json

from sealift.demo.cluster import Cluster

VM = 'name = "tiny"\nvcpus = 1\nmemory = "16392KiB"\n'

STEPS = (
    ("plan", ("phase", "planned")),
    ("order to the target", ("target", "ordered")),
    ("QEMU's start at the target", ("target", "qemu")),
    ("relay at the target", ("target", "relay")),
    ("QEMU listens", ("target", "listening")),
    ("order to the source", ("source", "ordered")),
    ("relay at the source", ("source", "relay")),
    ("control channel", ("source", "connected")),
    ("order to QEMU", ("source", "migrate")),
    ("QEMU connects", ("source", "local")),
    ("first sealed byte", ("source", "first_byte")),
)
"""Each part and the step that ends it; a part begins where the one before ended."""
QEMU = "QEMU's start at the target"


def parts_of(record: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each part. What went on beside an earlier part, and was done before that, took no time."""
    done = {(step["where"], step["step"]): _seconds(step["at"]) for step in record["timeline"]}
    done |= {("phase", phase["state"]): _seconds(phase["at"]) for phase in record["phases"]}
    before = done[("phase", "requested")]
    found = {}
    for name, step in STEPS:
        at = max(before, done[step])
        found[name] = (at - before) * 1000
        before = at
    return found


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def measure(runs: int) -> list[dict[str, float]]:
    """The parts of so many migrations, after one that is not counted."""
    found = []
    with tempfile.TemporaryDirectory(prefix="sls-") as directory:
        cluster = Cluster(Path(directory, "c"))
        try:
            cluster.start()
            for name in "ab":
                cluster.add_host(name)
            file = cluster.directory / "tiny.toml"
            file.write_text(VM)
            cluster.ask("vm", "create", str(file), "--host", "a")
            cluster.sealift("vm", "start", "tiny")
            for number in range(runs + 1):
                print(f"bench: migration {number} of {runs}", file=sys.stderr, flush=True)
                found.append(parts_of(cluster.ask("migrate", "tiny", "--to", "ba"[number % 2])))
        finally:
            cluster.close()
    return found[1:]


def row_of(found: Sequence[dict[str, float]]) -> Row:
    """Medians, each figure for itself; so the parts need not add up to the totals."""
    totals = [sum(parts.values()) for parts in found]
    without = [sum(parts.values()) - parts[QEMU] for parts in found]
    return {
        "name": "set-up",
        "path": "sealift",
        "channels": 1,
        "runs": len(found),
        "seconds": round(statistics.median(totals) / 1000, 4),
        "seconds_without_qemu": round(statistics.median(without) / 1000, 4),
        "least_seconds_without_qemu": round(min(without) / 1000, 4),
        "most_seconds_without_qemu": round(max(without) / 1000, 4),
        "parts_ms": {name: round(statistics.median(parts[name] for parts in found), 2) for name, _ in STEPS},
    }


def table(row: Row) -> str:
    """The row for people."""
    lines = [f"{name:<28} {value:8.1f} ms" for name, value in row["parts_ms"].items()]
    lines.append(f"{'all':<28} {row['seconds'] * 1000:8.1f} ms")
    least, most = (row[f"{which}_seconds_without_qemu"] * 1000 for which in ("least", "most"))
    spread = f"{row['seconds_without_qemu'] * 1000:8.1f} ms  ({least:.1f} to {most:.1f})"
    return "\n".join([*lines, f"{'all but the start of QEMU':<28} {spread}", f"medians of {row['runs']} migrations"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="migrations of which medians are taken")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    signal.signal(signal.SIGTERM, _stop)
    described = asyncio.run(machine())
    row = row_of(measure(options.runs))
    for key, value in described.items():
        print(f"{key}: {value}")
    print(f"\n{table(row)}")
    if options.json:
        write_json(options.json, described, [row])
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave through every clean-up: what was started is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
