"""Whole migrations of random memory, sealed, plain, and by every other encrypted way there is.

    python bench/migrate.py [--memory MIB] [--repeats N] [--channels 1,2,4] [--guest quiesced|dirtying]
                            [--paths sealift,ssh,...] [--resume FILE] [--json FILE] [--write-docs]

Everything runs on this machine over loopback, and all paths take turns within one run. With `--resume` each run is
kept as it is measured; the same command again goes on where it was interrupted, and when nothing is left to measure
only reports. docs/benchmarks.md says what is measured and how, bench/parts/routes.py what the paths are.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
from pathlib import Path

from parts.machines import GUESTS, scene
from parts.measure import machine, table, write_json
from parts.peers import peers
from parts.report import write_migrations
from parts.rounds import end_as_by_hand, measure_round, rows
from parts.routes import ROUTES
from parts.runs import Runs

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SEALIFT_CACHE", ROOT / ".cache"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="of the guest (3072), less 8 KiB")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which medians are taken (5)")
    parser.add_argument("--channels", default="1,2,4", help="how many; more than 1 is that many of multifd (1,2,4)")
    parser.add_argument("--paths", default=",".join(ROUTES), help="which ways, in this order (all)")
    parser.add_argument("--guest", choices=GUESTS, help="one kind of guest only")
    parser.add_argument("--cold", action="store_true", help="leave the target's memory untouched before the migration")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the runs here, and go on with those in it")
    parser.add_argument("--json", metavar="FILE", help="write the medians here")
    parser.add_argument("--write-docs", action="store_true", help="write tables and chart into docs/benchmarks.*")
    options = parser.parse_args()
    paths = options.paths.split(",")
    if unknown := set(paths) - set(ROUTES):
        parser.error(f"unknown paths: {', '.join(sorted(unknown))}; there are: {', '.join(ROUTES)}")
    channels = [int(word) for word in options.channels.split(",")]
    guests = [options.guest] if options.guest else list(GUESTS)
    end_as_by_hand()

    programs = peers(CACHE)
    settings = {"guest_mib": options.memory, "cold": options.cold}
    described = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    described |= asyncio.run(machine()) | programs.versions()
    runs = Runs(options.resume, settings, described)
    wanted = {(g, p, c, n) for g in guests for p in paths for c in channels for n in range(options.repeats)}
    if not all(key in runs for key in wanted):
        with scene(options.memory, cold=options.cold) as shared:
            for number in range(options.repeats):
                for guest in guests:
                    measure_round(number, guest, guest, paths, channels, shared, programs, runs)
    found = rows(guests, paths, channels, runs)
    for key, value in (settings | runs.machine).items():
        print(f"{key}: {value}")
    print(f"\n{table(found)}")
    if options.json:
        write_json(options.json, runs.machine | settings, found)
    if options.write_docs:
        write_migrations(ROOT / "docs", runs.machine | settings, found)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
