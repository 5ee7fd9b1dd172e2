"""A controller whose one-time key and nonce are those on its standard input, for tests that look for them.

Run as a module with the state directory as its argument, 32 + 8 bytes on standard input. Good for one sealed move.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

from sealift.controller.services import open_services
from sealift.domain.move import KEY_BYTES, NONCE_BYTES, MoveSecret, SealedSecret
from sealift.entry.controller import server
from sealift.entry.logs import log_to_stderr
from sealift.process import forbid_dumps
from sealift.secret import Secret


async def _serve(state: Path, secret: SealedSecret) -> None:
    def draw(protection: Literal["sealed", "plain"]) -> MoveSecret:
        assert protection == "sealed"
        return secret

    await server(await open_services(state, draw=draw)).serve()


def main() -> None:
    """Serve until a signal."""
    forbid_dumps()
    log_to_stderr()
    raw = sys.stdin.buffer.read(KEY_BYTES + NONCE_BYTES)
    secret = SealedSecret(Secret(raw[:KEY_BYTES], length=KEY_BYTES), Secret(raw[KEY_BYTES:], length=NONCE_BYTES))
    asyncio.run(_serve(Path(sys.argv[1]), secret))


if __name__ == "__main__":
    main()
