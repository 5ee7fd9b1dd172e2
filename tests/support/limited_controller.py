"""A controller whose sealed channels have the rekey limits of its arguments, for tests that must see keys change.

Run as a module with the state directory, the number of records and the number of bytes after which a key is changed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sealift.controller.services import open_services
from sealift.demo.cluster import Cluster
from sealift.domain.move import ChannelLimits
from sealift.entry.controller import server
from sealift.entry.logs import log_to_stderr
from sealift.process import forbid_dumps


@contextmanager
def limited(cluster: Cluster, *, records: int, size: int) -> Iterator[None]:
    """The cluster under such a controller; its own is back afterwards."""
    cluster.kill_controller()
    state = cluster.directory / "controller"
    with (cluster.directory / "controller.log").open("ab") as log:
        controller = subprocess.Popen(
            [sys.executable, "-m", "support.limited_controller", str(state), str(records), str(size)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        cluster.take_controller(controller)
        yield
    finally:
        cluster.kill_controller()
        cluster.start_controller()


async def _serve(state: Path, limits: ChannelLimits) -> None:
    await server(await open_services(state, limits=limits)).serve()


if __name__ == "__main__":
    forbid_dumps()
    log_to_stderr()
    asyncio.run(_serve(Path(sys.argv[1]), ChannelLimits(rekey_records=int(sys.argv[2]), rekey_bytes=int(sys.argv[3]))))
