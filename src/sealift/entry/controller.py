"""Composition root of the controller: `sealift controller init` and `sealift controller run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Initialised:
    """What `init` made; the two tokens are secret and shown once."""

    address: str  # https://host:port
    fingerprint: str
    admin_token: str
    join_token: str
    join_command: str  # takes the join token on its standard input


def init(state: Path, *, listen: str, addresses: Sequence[str]) -> Initialised:
    """Make a new controller in the directory ``state``, which must not exist or be empty; raises AlreadyExists."""
    raise NotImplementedError


def run(state: Path) -> None:
    """Serve until SIGTERM or SIGINT; raises NotFound when ``state`` holds no controller."""
    raise NotImplementedError
