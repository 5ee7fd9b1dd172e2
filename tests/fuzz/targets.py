"""Every target by name: a function that takes any bytes and raises only when Sealift broke a promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import agent_targets, key_targets, resume_targets, stream_targets, wire_targets

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """``longest``: no input is longer; more would only be slower."""

    check: Callable[[bytes], None]
    longest: int

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def corpus(self) -> Path:
        """The inputs that are kept."""
        return CORPUS / self.name


TARGETS = {
    target.name: target
    for target in (
        Target(wire_targets.preface, 40),
        Target(wire_targets.handshake_responder, 256),
        Target(wire_targets.handshake_initiator, 256),
        Target(wire_targets.control_frames, 1500),
        Target(stream_targets.records, 512),
        Target(stream_targets.receive_half, 512),
        Target(stream_targets.receive_raw, 512),
        Target(resume_targets.ledger, 512),
        Target(resume_targets.resume, 512),
        Target(agent_targets.relay_spec, 2048),
        Target(agent_targets.vm_file, 4096),
        Target(agent_targets.join_token, 160),
        Target(agent_targets.commit_log, 1024),
        Target(key_targets.kmip_answer, 512),
    )
}
