"""Main of the doorman process: ``python -I -m sealift.entry.doorman --listen HOST:PORT --doors DIR --lock FILE``."""

from __future__ import annotations

import argparse
import os
import sys

from sealift.channel.doorman import Doorman
from sealift.errors import SealiftError


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sealift-doorman", description="Accepts the moves of one host.")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0 takes a free one")
    parser.add_argument("--doors", required=True, metavar="DIR", help="where relays wait for their connections")
    parser.add_argument("--lock", required=True, metavar="FILE", help="held and filled with our pid while we run")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="the port is written here when we listen")
    options = parser.parse_args(arguments)
    try:
        doorman = Doorman(options.listen, options.doors, options.lock)
    except (SealiftError, OSError) as error:
        print(f"sealift-doorman: {options.listen}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, SealiftError) else 1
    doorman.obey_signals()
    if options.ready_fd is not None:
        os.write(options.ready_fd, f"{doorman.port}\n".encode())
        os.close(options.ready_fd)
    doorman.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
