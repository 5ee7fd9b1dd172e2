"""Main of the relay process: ``python -I -m sealift.entry.relay --spec-fd N``. Started by the agent."""

from __future__ import annotations

import argparse
import os
import sys

from sealift.channel.relay import open_relay, rehearse
from sealift.channel.relay_process import run
from sealift.process import forbid_dumps, lock_memory


def main(arguments: list[str] | None = None) -> int:
    """Carry out one move; returns the exit status."""
    forbid_dumps()
    lock_memory()
    parser = argparse.ArgumentParser(prog="sealift-relay", description="One side of one move; started by the agent.")
    parser.add_argument("--spec-fd", type=int, required=True, help="inherited socket that hands the specification over")
    spec_fd = parser.parse_args(arguments).spec_fd
    rehearse()
    return run(spec_fd, open_relay)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads may still stand in system calls, and have nothing left to do
