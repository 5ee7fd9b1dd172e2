"""What sealing costs: the relays alone, without QEMU (whole migrations: migrate.py).

    python bench/relay.py [--runs N] [--quick] [--json FILE]

Everything runs on this machine over loopback, and the paths that are compared take turns within one run, so that a slow
minute hits all of them. `cpu_s_per_gb` is what to compare: wall time on a shared machine, with both hosts on it, is not
what two hosts would give. docs/benchmarks.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from parts.measure import Row, Run, machine, row, table, write_json
from parts.pair import pair_run
from parts.relays import Kind

from sealift.channel.relay_spec import RECORD_BYTES

_BYTES, _QUICK_BYTES = 2 << 30, 32 << 20
_STREAMS = (1, 4)


async def measure_pairs(options: argparse.Namespace) -> list[Row]:
    """Relays alone, the same without their cipher, and the splices of plain moves, which only copy."""
    kinds: dict[Kind, tuple[str, str]] = {
        "relay": ("relay pair", "sealift"),
        "no-cipher": ("relay pair", "no-cipher"),
        "splice": ("splice pair", "sealift-plain"),
    }
    measured: dict[tuple[Kind, int], list[Run]] = {(kind, n): [] for kind in kinds for n in _STREAMS}
    total = _QUICK_BYTES if options.quick else int(options.gib * 2**30)
    for number in range(options.runs):
        for (kind, channels), runs in measured.items():
            progress(f"{kinds[kind][0]}, {channels} channels, run {number + 1}")
            with tempfile.TemporaryDirectory(prefix="slb-") as root:
                runs.append(await pair_run(kind, channels, total, options.record_bytes, Path(root)))
    return [row(*kinds[kind], channels, runs) for (kind, channels), runs in measured.items()]


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


async def measure(options: argparse.Namespace) -> None:
    described = await machine()
    rows = await measure_pairs(options)
    for key, value in described.items():
        print(f"{key}: {value}")
    print(f"\n{table(rows)}")
    if options.json:
        write_json(options.json, described, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="runs of which medians are taken (5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="32 MiB instead of 2 GiB: only to see that it works")
    parser.add_argument("--gib", type=float, default=_BYTES / 2**30, help="GiB pumped in each run")
    parser.add_argument("--record-bytes", type=int, default=RECORD_BYTES, help="payload of a record")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    if options.runs is None:
        options.runs = 1 if options.quick else 5
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    signal.signal(signal.SIGTERM, _stop)
    asyncio.run(measure(options))
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave through every clean-up: what was started is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
