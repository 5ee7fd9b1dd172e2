"""What encryption at rest costs: conversions of disks, a new key for many VMs at once, the start of a VM.

    python bench/atrest.py [--size GIB] [--runs N] [--vms N] [--starts N] [--parts convert,rekey,start]
                           [--json FILE] [--write-docs]

A controller, a host and a KMIP key server on this machine, each a process of its own, and the commands that a person
would give. Conversions take turns with `qemu-img convert` doing the same. docs/benchmarks.md says what is measured and
how. Needs four times the size of the image in SEALIFT_CACHE.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from parts.at_rest import PARTS, Bench, table
from parts.measure import Row, machine, write_json
from parts.report import write_at_rest

from sealift.demo.cluster import Cluster
from sealift.demo.kmip import KmipServers

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SEALIFT_CACHE", ROOT / ".cache"))


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Everything started; all of it ended and removed afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="slb-"))  # short: UNIX sockets lie below it
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        datastore = Path(tempfile.mkdtemp(prefix="atrest-", dir=CACHE))  # a tmpfs has no O_DIRECT
        stack.callback(shutil.rmtree, datastore, ignore_errors=True)
        cluster = Cluster(directory / "c")
        stack.callback(cluster.close)
        cluster.start()
        cluster.add_host("a")
        servers = KmipServers(directory / "kmip", members=1)
        stack.callback(servers.close)
        servers.start()
        yield Bench(cluster, servers, datastore)


def measure(options: argparse.Namespace, parts: list[str]) -> list[Row]:
    """The rows of the parts that are wanted."""
    rows = []
    with bench() as made:
        if "start" in parts:
            rows += made.starts(options.starts)
        if "rekey" in parts:
            rows += made.rekeys(options.vms, options.runs)
        if "convert" in parts:
            rows += made.conversions(int(options.size * 2**30) // 65536 * 65536, options.runs)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=10.0, metavar="GIB", help="of the image that is converted (10)")
    parser.add_argument("--runs", type=int, default=3, help="conversions and rekeys of which medians are taken (3)")
    parser.add_argument("--vms", type=int, default=100, help="how many are rekeyed in one command (100)")
    parser.add_argument("--starts", type=int, default=15, help="starts of each VM of which medians are taken (15)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/benchmarks.md")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if min(options.runs, options.vms, options.starts) < 1 or options.size < 0.001:
        parser.error("--runs, --vms and --starts must be 1 or more, --size 0.001 or more")
    signal.signal(signal.SIGTERM, _stop)
    described = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()} | asyncio.run(machine())
    rows = measure(options, parts)
    for key, value in described.items():
        print(f"{key}: {value}")
    print(f"\n{table(rows)}")
    settings = {"size_gib": options.size, "vms": options.vms}
    if options.json:
        write_json(options.json, described | settings, rows)
    if options.write_docs:
        write_at_rest(ROOT / "docs", described | settings, rows)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave through every clean-up: what was started is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
