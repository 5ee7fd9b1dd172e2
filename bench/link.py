"""Whole migrations through a link of 1 and of 10 Gbit/s: what sealing leaves of the rate that plain TCP reaches there.

    python bench/link.py [--memory MIB] [--repeats N] [--rates 1,10] [--channels 1,4] [--paths sealift,qemu-plain]
                         [--resume FILE] [--json FILE] [--write-docs]

The hosts are two network namespaces of this machine with a shaped veth pair between them (bench/parts/ends.py): needs
root. The guest is the quiesced one of migrate.py.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
from pathlib import Path

from parts.ends import shaped_link
from parts.machines import scene
from parts.measure import machine, table, write_json
from parts.peers import peers
from parts.report import write_links
from parts.rounds import end_as_by_hand, measure_round, rows
from parts.routes import ROUTES
from parts.runs import Runs

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SEALIFT_CACHE", ROOT / ".cache"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="of the guest (3072), less 8 KiB")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which medians are taken (5)")
    parser.add_argument("--rates", default="1,10", help="of the link, in Gbit/s (1,10)")
    parser.add_argument("--channels", default="1,4", help="how many; more than 1 is that many of multifd (1,4)")
    parser.add_argument("--paths", default="sealift,qemu-plain", help="which ways, in this order")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the runs here, and go on with those in it")
    parser.add_argument("--json", metavar="FILE", help="write the medians here")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    paths = options.paths.split(",")
    if unknown := set(paths) - set(ROUTES):
        parser.error(f"unknown paths: {', '.join(sorted(unknown))}; there are: {', '.join(ROUTES)}")
    channels = [int(word) for word in options.channels.split(",")]
    rates = {f"{float(word):g} Gbit/s": int(float(word) * 1e9) for word in options.rates.split(",")}
    if os.geteuid() != 0:
        parser.error("only root can make network namespaces and shape links")
    end_as_by_hand()

    programs = peers(CACHE)
    settings = {"guest_mib": options.memory}
    described = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    described |= asyncio.run(machine()) | programs.versions()
    runs = Runs(options.resume, settings, described)
    wanted = {(r, p, c, n) for r in rates for p in paths for c in channels for n in range(options.repeats)}
    if not all(key in runs for key in wanted):
        with scene(options.memory, cold=False) as shared:
            for number in range(options.repeats):
                for name, rate in rates.items():
                    with shaped_link(rate) as ends:
                        measure_round(number, name, "quiesced", paths, channels, shared, programs, runs, ends)
    found = rows(list(rates), paths, channels, runs)
    for key, value in (settings | runs.machine).items():
        print(f"{key}: {value}")
    print(f"\n{table(found)}")
    if options.json:
        write_json(options.json, runs.machine | settings, found)
    if options.write_docs:
        write_links(ROOT / "docs", runs.machine | settings, found)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
