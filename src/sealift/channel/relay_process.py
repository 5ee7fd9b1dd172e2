"""The main thread of a relay or splice process: take the specification, report, serve the control socket, end."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable
from typing import Final

from sealift.channel.relay_control import ControlServer, EventList
from sealift.channel.relay_ends import SourceEnd, TargetEnd
from sealift.channel.relay_move import Move
from sealift.errors import SealiftError

_STACK_BYTES: Final = 256 << 10

Opener = Callable[[socket.socket, EventList], tuple[Move, SourceEnd | TargetEnd]]


def run(spec_fd: int, opener: Opener) -> int:
    """Carry out the move that is handed over at ``spec_fd``; returns the exit status when told to end."""
    threading.stack_size(_STACK_BYTES)
    events = EventList()
    with socket.socket(fileno=spec_fd) as handover:
        if not handover.recv(1, socket.MSG_PEEK):  # it may come much later: an agent starts a relay before it needs one
            return 0
        handover.settimeout(10.0)
        move: Move | None = None
        try:
            move, end = opener(handover, events)
            server = ControlServer(move.spec.directory, events, move)
        except (SealiftError, OSError) as error:
            slug, what = (error.slug, error.what) if isinstance(error, SealiftError) else ("internal", str(error))
            if move is not None:
                move.close()
            _report(handover, {"error": slug, "what": what})
            print(f"cannot start: {what}", file=sys.stderr)
            return 1
        server.obey_signals()
        end.start()
        _report(handover, {"ready": True})
    server.serve()
    return 0


def _report(handover: socket.socket, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # whoever started us may be gone; the move goes on without
        handover.sendall(json.dumps(answer).encode() + b"\n")
