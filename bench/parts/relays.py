"""A pair of relays (or splices) on this machine, with the doorman between them, as two agents would start them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parts.clear_relay import without_cipher
from parts.ends import LOOPBACK, Ends
from sealift.channel.doorman import door_path
from sealift.channel.protocol import CHANNEL_VERSION, KEY_BYTES, NONCE_BYTES, ROUTE_BYTES, ChannelSpec, Plan
from sealift.channel.relay_client import RelayClient, start_doorman, start_relay
from sealift.channel.relay_spec import RECORD_BYTES, RelaySpec
from sealift.domain.move import ChannelLimits
from sealift.hypervisor.process import ProcessRef

Kind = Literal["relay", "no-cipher", "splice"]
"""A sealed move's relays; the same with the cipher taken out; a plain move's splices."""

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Side:
    """One relay: its process, its directory (the local socket is in there) and how to talk to it."""

    pid: int
    directory: Path
    client: RelayClient

    async def until(self, event: str) -> None:
        """Wait until the relay reports ``event``; raises RuntimeError when it reports that the move is broken."""
        seen = 0
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                for found in await self.client.wait(seen, 1):
                    seen = found["seq"]
                    if found["type"] == event:
                        return
                    if found["type"] == "broken":
                        raise RuntimeError(f"the relays broke: {found}")


@dataclass(frozen=True)
class Pair:
    """Both relays, connected."""

    source: Side
    target: Side

    @property
    def roles(self) -> dict[str, int]:
        return {"relay_source": self.source.pid, "relay_target": self.target.pid}


@contextlib.asynccontextmanager
async def connected_pair(
    kind: Kind,
    root: Path,
    channels: int,
    *,
    source_pid: int,
    target_pid: int,
    record_bytes: int = RECORD_BYTES,
    ends: Ends = LOOPBACK,
) -> AsyncIterator[Pair]:
    """Start doorman and both relays under ``root`` and wait until they know each other; ended on the way out.

    The two pids are those of the processes that each relay serves.
    """
    processes: list[ProcessRef] = []
    doors, log = root / "doors", str(root / "relays.log")
    try:
        for directory in (doors, root / "out", root / "in"):
            directory.mkdir(mode=0o700)
        with ends.target.inside():
            pid, port = await start_doorman(f"{ends.target.address}:0", str(doors), str(root / "lock"), log)
        processes.append(ProcessRef.of(pid))
        sealed, limits = kind != "splice", ChannelLimits()
        spec = ChannelSpec(
            uuid.uuid4().bytes,
            uuid.uuid4().bytes,
            uuid.uuid4().bytes,
            uuid.uuid4().bytes,
            Plan.SEALED if sealed else Plan.PLAIN,
            CHANNEL_VERSION,
            channels,
            limits.window_bytes,
            limits.rekey_records,
            limits.rekey_bytes,
        )
        secret = secrets.token_bytes(KEY_BYTES + NONCE_BYTES if sealed else ROUTE_BYTES)
        specs = (
            RelaySpec(
                "target",
                spec,
                str(root / "in"),
                target_pid,
                door=door_path(str(doors), spec.attempt if sealed else secret),
                source_address="" if sealed else ends.source.address,
                record_bytes=record_bytes,
            ),
            RelaySpec(
                "source",
                spec,
                str(root / "out"),
                source_pid,
                target=f"{ends.target.address}:{port}",
                record_bytes=record_bytes,
            ),
        )
        sides = []
        for half, end in zip(specs, (ends.target, ends.source), strict=True):
            with end.inside(), without_cipher() if kind == "no-cipher" else contextlib.nullcontext():
                pid = await start_relay("relay" if sealed else "splice", half, secret, log)
            processes.append(ProcessRef.of(pid))
            sides.append(Side(pid, Path(half.directory), await RelayClient.connect(half.directory)))
        target, source = sides
        await source.until("connected")
        await target.until("connected")
        yield Pair(source, target)
        await source.client.close()
        await target.client.close()
    except Exception:
        _print(log)  # it goes away with the directory
        raise
    finally:
        for process in reversed(processes):
            process.kill(signal.SIGTERM)
        for process in processes:
            if not await process.wait_exit(5):
                process.kill()


def _print(log: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        print(Path(log).read_text(errors="replace"), end="", file=sys.stderr)
